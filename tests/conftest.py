"""Fixtures that every test may use: one thread, fixed seeds, small real artefacts."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from two_users import mark, planted, shared  # noqa: F401

from asvit_deploy.data.images import ImageSet, open_images
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op-calls", type=int, default=60, metavar="N",
                     help="random calls of the op under ASan and UBSan")  # fmt: skip


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # On a GPU a float32 convolution would otherwise be less than that.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def sharpened(config: ArchConfig, images: ImageSet, keep: tuple[float, ...] = (0.7, 0.7, 0.7),
              seed: int = 0) -> ViT:  # fmt: skip
    """Random weights with peaked attention; thresholds sit mid-gap at quantiles of real scores."""
    torch.manual_seed(seed)
    model = build(config).eval()
    pixels = torch.from_numpy(images.batch(range(len(images))))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)  # type: ignore[operator, union-attr]
        for stage, share in enumerate(keep):
            scores = [model(image[None])[1].scores[stage][0] for image in pixels]
            ordered = torch.cat(scores).sort().values
            cut = int(len(ordered) * (1 - share))
            middle = (ordered[cut - 1].double() + ordered[cut].double()) / 2
            model.thresholds[stage].fill_(middle.item())
    return model


def released_format(model: ViT) -> dict:
    """A checkpoint as the AS-ViT release writes it."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("thresholds."):
            key = key.replace("thresholds", "score_predictor") + ".keep_threshold"
        state[key] = value
    return {"model": state, "optimizer": {}, "epoch": 29, "scaler": {},
            "args": argparse.Namespace(lr=2e-5, accu=False)}  # fmt: skip


@pytest.fixture(scope="session")
def mini_config() -> ArchConfig:
    return arch("as_deit_mini")


@pytest.fixture(scope="session")
def photos(mini_config: ArchConfig) -> ImageSet:
    """Twelve real photographs at the small architecture's size."""
    return open_images(None, mini_config, limit=12)


@pytest.fixture(scope="session")
def mini(mini_config: ArchConfig, photos: ImageSet) -> ViT:
    """The small architecture, random but adaptive weights."""
    return sharpened(mini_config, photos)


@pytest.fixture(scope="session")
def mini_checkpoint(mini: ViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the released format."""
    path = tmp_path_factory.mktemp("checkpoint") / "as_mini.pt"
    torch.save(released_format(mini), path)
    return path


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run a command line in an empty folder, in this process."""
    from asvit_deploy.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def signed_copy(source: Path, target: Path, change=lambda proto: None, /, **fields: object) -> Path:
    """A copy of an ONNX artefact, changed, and with a sidecar that belongs to it."""
    import onnx

    from asvit_deploy import sidecar as artifact

    proto = onnx.load(source)
    change(proto)
    kept = artifact.read(source)
    for key in ("schema", "sha256", "digest"):
        del kept[key]
    artifact.write(target, proto.SerializeToString(), {**kept, **fields})
    return target


def raises_one_line(call: Callable[[], object], *words: str) -> None:
    """The call raises UserError with one line that holds the words."""
    from asvit_deploy.errors import UserError

    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def refused(result: Result, *words: str) -> None:
    """Exit 2, one line that holds the words, no traceback, nothing on stdout."""
    assert result.code == 2, result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="session")
def powerless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The start of a command line whose process must keep to permissions, as root need not."""
    if os.geteuid() != 0:
        return []
    rights = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    secret = tmp_path_factory.mktemp("secret") / "file"
    secret.touch(mode=0)
    if shutil.which("setpriv") is None:
        pytest.skip("root passes over permissions, and there is no setpriv to take that away")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("root passes over permissions, and setpriv may not take that away here")
    assert subprocess.run([*prefix, "cat", secret], capture_output=True).returncode != 0
    return prefix


_SEVERAL = """
import contextlib, io, json, sys
from asvit_deploy.cli.main import main
results = []
for args in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as end:
            code = int(end.code or 0)
    results.append((code, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="session")
def powerless_cli(powerless: list[str]) -> Callable[..., list[Result]]:
    """Run command lines in a folder, all in one process that must keep to permissions."""

    def run(folder: Path, *commands: list[object]) -> list[Result]:
        done = subprocess.run(
            [*powerless, sys.executable, "-c", _SEVERAL], cwd=folder, capture_output=True,
            text=True, input=json.dumps([list(map(str, args)) for args in commands]),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [Result(*result) for result in json.loads(done.stdout)]

    return run


@pytest.fixture(scope="session")
def op_library() -> Path:
    """The op's ONNX Runtime library, in the user's cache."""
    from asvit_deploy.errors import UserError
    from asvit_deploy.ops.library import build_ort

    try:
        return build_ort()
    except UserError as error:
        pytest.skip(str(error))


EXPORTS = (("1", "auto"), ("dynamic", "auto"), ("1", "standard"), ("1", "custom"))


@pytest.fixture(scope="session")
def mini_artifacts(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The small model exported, by (batch, ops), each where it is first asked for."""
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.exporting.export import export

    folder = tmp_path_factory.mktemp("artifacts")

    class Exports(dict[tuple[str, str], Path]):
        def __missing__(self, key: tuple[str, str]) -> Path:
            path = folder / f"mini_{key[0]}_{key[1]}.onnx"
            checkpoint = load_checkpoint(mini_checkpoint)
            export(checkpoint, path, open_images(None, checkpoint.config, limit=4), *key)
            self[key] = path
            return path

    return Exports()


@pytest.fixture(scope="session")
def rtx():
    """The TensorRT-RTX flavour; its builder needs no GPU."""
    from asvit_deploy.runners.trt_flavour import RTX

    if RTX.module is None or importlib.util.find_spec("polygraphy") is None:
        pytest.skip("TensorRT-RTX is not installed (scripts/setup cpu,train,dev,rtx)")
    return RTX


@pytest.fixture(scope="session")
def trt_plugin(rtx) -> Path:
    """The op's TensorRT plugin; a build never runs its kernel, so the host twin's will do."""
    from asvit_deploy.errors import UserError

    try:
        from asvit_deploy.ops.trt_library import build_trt

        return build_trt(twin=True)
    except (ImportError, UserError) as error:
        pytest.skip(f"no TensorRT plugin here: {error}")


@pytest.fixture(scope="session")
def ort_headers():
    """ONNX Runtime's headers, and a compiler to use them."""
    from asvit_deploy.errors import UserError
    from asvit_deploy.ops.headers import find_headers
    from asvit_deploy.ops.library import find_compiler

    try:
        find_compiler()
        return find_headers()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def trt_headers(compiler):
    """TensorRT's headers, and a compiler to use them."""
    from asvit_deploy.errors import UserError
    from asvit_deploy.ops.trt_library import find_trt_headers

    try:
        return find_trt_headers()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compiler() -> str:
    """A C++ compiler."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


_SECONDS = 20  # of processor time; so long a wait is none, but on a machine that others use it may
_WAIT = 120  # take this many seconds to come by


@pytest.fixture(scope="session")
def warm() -> Iterator[subprocess.Popen[str]]:
    """See `tests/warm.py`: libraries are imported once, and every child begins with them."""
    program = Path(__file__).with_name("warm.py")
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def ends(warm: subprocess.Popen[str]) -> Callable[..., str]:
    """Read a file by a line of code in a child: what it said, or "fine".

    More than `mebibytes` beside what the libraries take, or more than `seconds` of processor time,
    its children's with it, fail the test.
    """

    def run(code: str, path: Path, mebibytes: int = 512, seconds: float = _SECONDS) -> str:
        job = {"code": code, "path": str(path), "folder": os.getcwd(), "seconds": _WAIT,
               "environment": dict(os.environ)}  # fmt: skip
        assert warm.stdin is not None
        assert warm.stdout is not None
        warm.stdin.write(json.dumps(job) + "\n")
        warm.stdin.flush()
        done = json.loads(warm.stdout.readline())
        assert "failed" not in done, done["failed"]
        assert "\n" not in done["said"]
        assert done["used"] < mebibytes, done
        assert done["seconds"] < seconds, done
        return done["said"]

    return run
