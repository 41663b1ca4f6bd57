"""Choice files: how this machine runs an ONNX file fastest, as `bench --save-choice` found it.

`--runtime auto` reads one, `MODEL.choice.json` unless another is named. It holds for one file, by
its sha256, and for one machine, by the name of its processor and the cores that may be used; it
carries a digest of its own fields, as sidecars do. `tune` writes them too, and may say that an
engine beside the file is the fastest: then it holds for that engine, and for the GPU.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from asvit_deploy.artefacts.artefact import Ways
from asvit_deploy.artefacts.engine_file import EngineArtefact, way_of
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.artefacts.opening import ENGINES, kind_of, open_artefact
from asvit_deploy.bounded import MOST_ONNX
from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.processor import cpu_name, require_threads, usable_cores
from asvit_deploy.runners.base import Runner
from asvit_deploy.runners.trt_plan import gpu_name
from asvit_deploy.runtimes import OF_KIND, TENSORRT
from asvit_deploy.sidecar import read_signed

KIND = "choice"
# What `--runtime auto` goes by; the other fields are there to be read.
_KINDS: dict[str, type] = {
    "kind": str, "model": str, "sha256": str, "models": list, "runtime": str, "way": str,
    "threads": int, "precision": str, "batch": int, "p50_ms": float, "backend": str, "cpu": str,
    "cores": int,
}  # fmt: skip


def choice_path(model: Path) -> Path:
    """`as_deit_s.onnx` -> `as_deit_s.onnx.choice.json`."""
    return model.with_name(model.name + ".choice.json")


@dataclass(frozen=True)
class RuntimeChoice:
    """How an artefact is to be run on this machine.

    Attributes:
        path: the file that says so.
        fields: of it, as `bench --save-choice` wrote them.
    """

    path: Path
    fields: dict[str, Any]

    def line(self, model: Path) -> str:
        """What is run, and why."""
        runtime, way, threads = (self.fields[name] for name in ("runtime", "way", "threads"))
        if runtime == TENSORRT:
            way = self.fields["engine"]["file"] + way.removeprefix(way_of(graph=False))
        of = "" if way in (runtime, "dense", "static") else f" ({way})"
        count = "all threads" if threads == 0 else f"{threads} thread{'s' * (threads > 1)}"
        return (
            f"{model} runs in {runtime}{of}, {count}: the fastest here at batch "
            f"{self.fields['batch']}, {self.fields['p50_ms']:.2f} ms at p50, says {self.path}"
        )

    def ways(self, artefact: OnnxArtefact, record: bool = True) -> Ways:
        """The one way to run it.

        Raises:
            UserError: its runtime, or the op's library, is not here any more.
        """
        runtime, way = self.fields["runtime"], self.fields["way"]
        if runtime == TENSORRT:
            return self._engine_ways(artefact)
        try:
            return artefact.ways(self.fields["threads"], record, (runtime,)).only(way)
        except KeyError:
            lacks = "the op's library is not here, `asvit-deploy build-plugins ort` makes it"
            if way != "library":
                lacks = f"{artefact.path} has no such way"
            raise UserError(f"{self.path} says {runtime} ({way}): {lacks}; {self.again}") from None
        except UserError as error:
            raise UserError(f"{self.path} says {runtime}: {error}") from None

    def _engine_ways(self, artefact: OnnxArtefact) -> Ways:
        """Likewise, of the engine that was built from the artefact."""
        said, way = self.fields["engine"], self.fields["way"]
        path = self.path.with_name(said["file"])
        try:
            engine = open_artefact(path)
            assert isinstance(engine, EngineArtefact)
            if engine.fields["digest"] != said["digest"] or not engine.built_from(artefact.path):
                raise UserError(f"{path} is another engine than the one that was timed")
            engine.require_runnable()
            if (here := gpu_name()) != said["gpu"]:
                raise UserError(f"it was timed on {said['gpu'][:80]}, and here is {here}")
            found = engine.ways().only(way)
        except KeyError:
            raise UserError(f"{self.path}: {path} has no way {way[:40]!r}; {self.again}") from None
        except UserError as error:
            raise UserError(f"{self.path} says {TENSORRT}: {error}; {self.again}") from None
        return Ways({way: lambda: found[way]}, {way: TENSORRT}, {way: engine.parity})

    @property
    def again(self) -> str:
        if self.fields["runtime"] == TENSORRT:
            return "run `asvit-deploy tune` again here, or name another --runtime"
        return again(self.path, self.fields["models"])

    def say_version(self, runner: Runner, say: Callable[[str], None]) -> None:
        """A line where another version of the runtime was measured than the one that runs."""
        here, measured = runner.describe()["backend"], self.fields["backend"]
        if here != measured:
            say(f"{self.path} is of {measured}, and {here} is installed; {self.again}")


def engine_fields(engine: EngineArtefact) -> dict[str, Any]:
    """What a choice file says of the engine that runs, which must lie beside it."""
    return {"file": engine.path.name, "digest": engine.fields["digest"], "gpu": gpu_name() or ""}


def again(path: Path, models: Iterable[object]) -> str:
    """The command that makes a choice file anew, as the end of a line.

    Args:
        models: names of files that are looked for beside it, or paths.
    """
    found = [path.with_name(name) if isinstance(name, str) else name for name in models]
    words = shlex.join(["asvit-deploy", "bench", *map(str, found), "--save-choice", str(path)])
    return f"run `{words} --force`"


def read_choice(artefact: OnnxArtefact, named: Path | None = None) -> RuntimeChoice:
    """The choice for an artefact on this machine.

    Args:
        named: the file, or None for the one beside the artefact.

    Raises:
        UserError: there is none; it is damaged, edited or of another schema; or it was made for
            another file or machine.
    """
    path = choice_path(artefact.path) if named is None else named
    if not _there(path):
        raise UserError(
            f"{path} does not exist; make it with `asvit-deploy bench {artefact.path} "
            f"--save-choice {path}`"
        )
    fields = read_signed(
        path, "choice file", f"it with `asvit-deploy bench {artefact.path} --save-choice {path} "
        "--force`", "kind",
    )  # fmt: skip
    _check_fields(path, fields)
    found = RuntimeChoice(path, fields)
    _require_model(found, artefact)
    _require_machine(found)
    return found


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # of which the one who reads it says more
        return True


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Refuse what this tool would not have written, digest or no."""

    def refuse(name: str) -> NoReturn:
        found = repr(fields.get(name))[:60]
        raise UserError(
            f"{path} says {name} {found}, which no choice file does; make it again with "
            "`asvit-deploy bench MODEL --save-choice`"
        )

    if fields["kind"] != KIND:
        raise UserError(
            f"{path} is no choice file but of kind {str(fields['kind'])[:40]!r}; name one that "
            "`asvit-deploy bench --save-choice` wrote"
        )
    for name, kind in _KINDS.items():
        if type(fields.get(name)) is not kind:
            refuse(name)
    if fields["runtime"] not in (*OF_KIND["onnx"], TENSORRT):
        refuse("runtime")
    if fields["runtime"] == TENSORRT:
        said = fields.get("engine")
        if not isinstance(said, dict) or not all(
            type(said.get(name)) is str for name in ("file", "digest", "gpu")
        ):  # fmt: skip
            refuse("engine")
        if kind_of(Path(said["file"])) not in ENGINES or Path(said["file"]).name != said["file"]:
            refuse("engine")
    if fields["threads"] < 0:
        refuse("threads")
    if not fields["models"] or not all(type(name) is str for name in fields["models"]):
        refuse("models")


def _require_model(choice: RuntimeChoice, artefact: OnnxArtefact) -> None:
    """Raise UserError where the choice is of another file, or contradicts it."""
    fields, model = choice.fields, artefact.path
    # Of a file without a sidecar of its own, the fields are another's.
    own = sha256(model, MOST_ONNX) if artefact.borrowed else artefact.fields["sha256"]
    if own != fields["sha256"]:
        lost = fields.get("lost")
        if isinstance(lost, dict) and own in lost.values():
            raise UserError(
                f"{choice.path} says that {fields['model']} is faster here than {model.name}; name "
                f"{fields['model']}, or leave --runtime auto out"
            )
        raise UserError(
            f"{choice.path} was made for another file than {model} (sha256 differs from that of "
            f"{fields['model']}), or it was exported again; {again(choice_path(model), [model])}"
        )
    if fields["precision"] != artefact.fields["precision"]:
        raise UserError(
            f"{choice.path} says {fields['precision'][:40]} and the sidecar of {model} "
            f"{artefact.fields['precision']}; {again(choice.path, [model])}"
        )


def _require_machine(choice: RuntimeChoice) -> None:
    """Raise UserError where the choice is of another machine."""
    fields, cpu, cores = choice.fields, cpu_name(), usable_cores()
    if (fields["cpu"], fields["cores"]) != (cpu, cores):
        raise UserError(
            f"{choice.path} was made on another machine ({_machine(fields['cpu'], fields['cores'])}"
            f"; here {_machine(cpu, cores)}); {choice.again}"
        )
    try:
        require_threads(fields["threads"])
    except UserError as error:
        raise UserError(f"{choice.path}: {error}") from None


def _machine(cpu: str, cores: int) -> str:
    return f"{' '.join(cpu.split())[:80]}, {cores} core{'s' * (cores != 1)}"


def run_as_chosen(
    artefact: OnnxArtefact, named: Path | None, say: Callable[[str], None]
) -> Ways:  # fmt: skip
    """What `--runtime auto` runs: one way, opened and recording.

    Args:
        named: as `read_choice`.
        say: gets a line on what is run, and one where the runtime's version is another.

    Raises:
        UserError: as `read_choice`, or it cannot be run any more.
    """
    choice = read_choice(artefact, named)
    ways = choice.ways(artefact)
    try:
        (runner,) = ways.values()
    except UserError as error:
        raise UserError(f"{choice.path} says {choice.fields['runtime']}: {error}") from None
    say(choice.line(artefact.path))
    choice.say_version(runner, say)
    return ways
