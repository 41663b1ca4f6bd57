"""How the TensorRT plugin's libraries are built, found and refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from asvit_deploy.cli.main import main
from asvit_deploy.errors import UserError
from asvit_deploy.ops import trt_library
from asvit_deploy.ops.library import find_compiler
from asvit_deploy.ops.trt_library import (
    TrtHeaders,
    build_trt,
    check_trt_library,
    find_nvcc,
    find_trt_headers,
    find_trt_plugin,
    targets_of,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = find_nvcc()
    if found is None:
        pytest.skip("no nvcc")
    return found


@pytest.fixture
def own_cache(trt_headers, tmp_path, monkeypatch) -> Path:
    """An empty cache; the headers need not be fetched again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TensorRT_ROOT", str(trt_headers.folder))
    return tmp_path / "cache" / "asvit-deploy"


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def fake_headers(folder: Path, version: str) -> Path:
    """Headers of a version, in the form that TensorRT 10.8 and later have."""
    major, minor = version.split(".")
    folder.mkdir(parents=True)
    (folder / "NvInfer.h").touch()
    (folder / "NvInferVersion.h").write_text(
        f"#define TRT_MAJOR_ENTERPRISE {major}\n#define TRT_MINOR_ENTERPRISE {minor}\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< major.\n"
        "#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE //!< minor.\n"
    )
    return folder


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize("layout", ["", "include", "include/x86_64-linux-gnu"])
def test_headers_under_tensorrt_root_come_first(tmp_path, monkeypatch, layout):
    system = fake_headers(tmp_path / "system", "10.3")
    folder = fake_headers(tmp_path / "root" / layout, "11.1")
    monkeypatch.setattr(trt_library, "SYSTEM", (system,))
    monkeypatch.setenv("TensorRT_ROOT", str(tmp_path / "root"))
    assert find_trt_headers() == TrtHeaders(folder, (11, 1), "TensorRT_ROOT")
    monkeypatch.delenv("TensorRT_ROOT")
    assert find_trt_headers() == TrtHeaders(system, (10, 3), "installed")


def test_version_of_older_headers_is_a_plain_number(tmp_path):
    folder = fake_headers(tmp_path / "include", "10.0")
    (folder / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 10 //!< major.\n#define NV_TENSORRT_MINOR 7  //!< minor.\n"
    )
    headers = trt_library.read_trt_headers(folder, "here")
    assert headers is not None
    assert headers.version == (10, 7)
    (folder / "NvInferVersion.h").write_text("nothing of the kind\n")
    assert trt_library.read_trt_headers(folder, "here") is None


def test_installed_headers_of_an_old_tensorrt_are_passed_over(tmp_path, monkeypatch):
    old = fake_headers(tmp_path / "old", "8.6")
    new = fake_headers(tmp_path / "new", "10.9")
    monkeypatch.delenv("TensorRT_ROOT", raising=False)
    monkeypatch.setattr(trt_library, "SYSTEM", (old, new))
    said: list[str] = []
    assert find_trt_headers(said.append).folder == new
    assert "passed over: TensorRT 8.6" in said[0]
    monkeypatch.setenv("TensorRT_ROOT", str(old))
    with pytest.raises(UserError, match=r"TensorRT 8.6 .* is too old") as error:
        find_trt_headers()
    one_line(error)


def test_tensorrt_root_without_headers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TensorRT_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=f"TensorRT_ROOT={tmp_path} holds no NvInfer.h") as error:
        find_trt_headers()
    one_line(error)


def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TensorRT_ROOT", raising=False)
    monkeypatch.setattr(trt_library, "SYSTEM", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "asvit-deploy" / "headers"


def test_headers_are_taken_from_the_wheel_and_kept(tmp_path, monkeypatch):
    cache = nothing_installed(tmp_path, monkeypatch)
    try:
        taken = find_trt_headers()
    except UserError as error:
        pytest.skip(f"no package index here: {error}")
    assert taken.version == (10, 14)
    assert [path.name for path in cache.iterdir()] == [taken.folder.name]
    assert "Apache-2.0" in (taken.folder / "NvInfer.h").read_text()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert find_trt_headers().folder == taken.folder


def test_wheel_with_other_content_is_refused(tmp_path, monkeypatch):
    """pip checks the digest; without an index it fails before, and nothing is kept either way."""
    cache = nothing_installed(tmp_path, monkeypatch)
    monkeypatch.setattr(trt_library, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="pip cannot get them") as error:
        find_trt_headers()
    assert "set TensorRT_ROOT" in one_line(error)
    assert list(cache.iterdir()) == []


def test_without_index_one_line_says_what_to_do(tmp_path, monkeypatch):
    cache = nothing_installed(tmp_path, monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="no TensorRT headers here, and pip cannot get") as error:
        find_trt_headers()
    assert "--mode padded" in one_line(error)
    assert list(cache.iterdir()) == []


# ---------------------------------------------------------------- CUDA


def executable(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def test_nvcc_of_cuda_home_comes_before_the_path(tmp_path, monkeypatch):
    home = executable(tmp_path / "cuda" / "bin" / "nvcc")
    path = executable(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(path.parent))
    assert find_nvcc() == home
    monkeypatch.delenv("CUDA_HOME")
    assert find_nvcc() == path


def test_targets_are_the_gpus_here_or_code_for_any(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert targets_of([]) == ("ptx75",)
    executable(tmp_path / "nvidia-smi", "echo 12.0; echo 8.6; echo 8.6; echo '[N/A]'")
    assert targets_of([]) == ("sm86", "sm120", "ptx120")
    assert targets_of(["90", "100"]) == ("sm90", "sm100", "ptx100")
    assert targets_of(["all"])[0] == "sm75"
    assert targets_of(["all"])[-2:] == ("sm121", "ptx121")


@pytest.mark.slow
def test_without_nvcc_one_line_says_so_and_the_twin_is_built(own_cache, monkeypatch):
    monkeypatch.setattr(trt_library, "find_nvcc", lambda: None)
    with pytest.raises(UserError, match="no CUDA compiler: no nvcc") as error:
        build_trt()
    assert "--mode padded" in one_line(error)
    assert not own_cache.exists()
    assert build_trt(twin=True).name == "libasvit_trt_host.so"


def test_without_cpp_compiler_one_line_says_so(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"neither g\+\+ nor clang\+\+ found; install") as error:
        build_trt(twin=True)
    assert "ONNX Runtime" not in one_line(error)


def test_compiler_that_cannot_be_run_is_blamed_itself(own_cache, tmp_path, monkeypatch):
    script = tmp_path / "cxx"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(UserError, match=r"cxx cannot compile .*it cannot be run: No such") as error:
        build_trt(twin=True)
    assert str(own_cache) not in one_line(error)


def test_gpu_that_nvcc_does_not_know_is_one_line(own_cache, nvcc):
    with pytest.raises(UserError, match=r"cannot compile .*compute_42") as error:
        build_trt(sms=["42"])
    assert "--target-sm" in one_line(error)
    assert list(own_cache.iterdir()) == []


# ---------------------------------------------------------------- the files


def symbols(library: Path) -> str:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    return subprocess.run(["nm", "-D", library], capture_output=True, text=True).stdout


def test_library_has_the_two_entries_and_needs_no_tensorrt(trt_headers):
    names = symbols(build_trt(twin=True))
    assert set(re.findall(r" T (\w+)", names)) == {"getCreators", "setLoggerFinder"}
    assert not re.search(r" U \w*(nvinfer|getPlugin|getInfer|cuda)", names)


def test_self_registering_library_is_another_file(trt_headers):
    library = build_trt(twin=True).with_name("libasvit_trt_autoreg_host.so")
    names = symbols(library)
    assert re.search(r" U getPluginRegistry", names)
    assert not re.search(r" T \w", names)


@pytest.mark.parametrize(("shift", "code"), [(0, 7), (1, 0)], ids=["its own", "another"])
def test_self_registering_library_asks_only_its_own_tensorrt(trt_headers, tmp_path, shift, code):
    """A registry of another major is laid out otherwise: a call would end the process."""
    version = (trt_headers.version[0] + shift) * 10000
    (tmp_path / "process.cpp").write_text(
        "#include <dlfcn.h>\n#include <cstdlib>\n"
        f'extern "C" int getInferLibVersion() {{ return {version}; }}\n'
        'extern "C" void* getPluginRegistry() { exit(7); }\n'
        "int main(int, char** a) { return dlopen(a[1], RTLD_NOW) ? 0 : 1; }\n"
    )
    command = [*find_compiler(), "-rdynamic", "process.cpp", "-ldl", "-o", "process"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = build_trt(twin=True).with_name("libasvit_trt_autoreg_host.so")
    done = subprocess.run([tmp_path / "process", library], capture_output=True, text=True)
    assert done.returncode == code
    said = f"built for TensorRT {trt_headers.version[0]}, and the process runs"
    assert (said in done.stderr) == bool(shift)


def test_usable_library_has_no_reason_against_it(trt_headers):
    assert check_trt_library(build_trt(twin=True)) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be loaded"),
        (b"not a library\n", "cannot be loaded"),
        (b"\x7fELF" + bytes(200), "cannot be loaded"),
        (None, "no such file"),
    ],
)
def test_file_that_is_no_library_is_named_so(tmp_path, content, reason):
    file = tmp_path / "some.so"
    if content is not None:
        file.write_bytes(content)
    said = check_trt_library(file)
    assert said is not None
    assert reason in said
    assert "\n" not in said


def test_other_library_is_named_so(compiler, tmp_path):
    (tmp_path / "other.cpp").write_text("int answer() { return 42; }")
    command = [compiler, "-shared", "-fPIC", "other.cpp", "-o", "other.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    reason = check_trt_library(tmp_path / "other.so")
    assert reason == "it is a library, but not of TensorRT plugins"


@pytest.mark.slow
def test_a_library_whose_loading_never_ends_is_given_up(compiler, tmp_path, monkeypatch):
    from asvit_deploy import child

    monkeypatch.setattr(child, "PATIENCE", 2)
    (tmp_path / "other.cpp").write_text(
        "__attribute__((constructor)) static void c() { for (volatile int i = 0;; ++i) {} }"
    )
    command = [compiler, "-shared", "-fPIC", "other.cpp", "-o", "other.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = check_trt_library(tmp_path / "other.so")
    assert said == "loading it does not end within 2 s"


@pytest.mark.slow
def test_cache_is_found_again_and_a_stale_build_or_a_twin_is_not(own_cache, nvcc, monkeypatch):
    build_trt(twin=True)
    assert find_trt_plugin() is None
    said: list[str] = []
    library = build_trt(sms=["86"], say=said.append)
    assert f"headers: TensorRT {find_trt_headers().version[0]}." in said[0]
    assert library.name == "libasvit_trt.so"
    assert library.with_name("libasvit_trt_autoreg.so").is_file()
    assert find_trt_plugin() == library
    before = library.stat().st_mtime_ns
    assert build_trt(sms=["86"]) == library
    assert library.stat().st_mtime_ns == before
    monkeypatch.setattr(trt_library, "FLAGS", (*trt_library.FLAGS, "-g"))
    assert find_trt_plugin() is None


@pytest.mark.slow
def test_failed_build_keeps_the_library_that_was_there(own_cache, monkeypatch):
    library = build_trt(twin=True)
    content = library.read_bytes()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="false cannot compile") as error:
        build_trt(twin=True, force=True)
    one_line(error)
    assert library.read_bytes() == content
    assert len(list(library.parent.iterdir())) == 4, "two libraries, and a digest of each"


def test_unwritable_cache_is_named(trt_headers, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TensorRT_ROOT", str(trt_headers.folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a writable folder") as error:
        build_trt(twin=True)
    one_line(error)


# ---------------------------------------------------------------- the command, the wheel, CMake


def run_main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["build-plugins", *arguments])
    return int(end.value.code or 0)


@pytest.mark.slow
def test_command_prints_the_path_alone_on_stdout(own_cache, nvcc, capsys):
    assert run_main("trt", "--target-sm", "86") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{build_trt(sms=['86'])}\n"
    assert "headers: TensorRT" in printed.err


def test_command_without_nvcc_fails_in_one_line(trt_headers, capsys, monkeypatch):
    monkeypatch.setattr(trt_library, "find_nvcc", lambda: None)
    assert run_main("trt") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def test_command_refuses_what_is_no_gpu_generation(capsys):
    assert run_main("trt", "--target-sm", "9x") == 2
    assert "'9x' is not a compute capability" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [("trt", "--target-sm", "86", "89"), ("--target-sm", "86", "89", "trt"),
     ("--target-sm=86", "89", "trt", "--force"), ("--target-sm", "86", "--target-sm", "89", "trt")],
)  # fmt: skip
def test_several_gpu_generations_after_one_option(arguments, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(trt_library, "build_trt", lambda **options: asked.append(options["sms"]))
    assert run_main(*arguments) == 0
    assert asked == [("86", "89")]


@pytest.mark.slow
def test_sources_travel_in_the_wheel(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    listing = ["git", "ls-files", "-co", "--exclude-standard", "plugins", "trt_plugins"]
    named = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sources = {name for name in named.splitlines() if not name.endswith(".md")}
    assert len(sources) > 12
    assert {f"asvit_deploy/_cpp/{name}" for name in sources} == {
        name for name in inside if name.startswith("asvit_deploy/_cpp/")
    }
    assert {f"asvit_deploy/classes/{name}" for name in ("imagenet_1k.txt", "NOTICE")} <= inside
    assert wheel.stat().st_size < 10e6  # no library came along
    assert not [name for name in inside if ".so" in Path(name).suffixes]


@pytest.mark.slow
def test_builds_with_cmake(trt_headers, tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    environment = os.environ | {"TensorRT_ROOT": str(trt_headers.folder)}
    configure = ["cmake", "-S", ROOT / "trt_plugins", "-B", tmp_path, "-DASVIT_HOST_TWIN=ON"]
    subprocess.run(configure, check=True, capture_output=True, env=environment)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    assert check_trt_library(tmp_path / "libasvit_trt_host.so") is None
    assert (tmp_path / "libasvit_trt_autoreg_host.so").is_file()
