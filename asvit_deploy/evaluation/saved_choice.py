"""What `bench --save-choice` writes: the fastest way that was measured to run an ONNX file.

Candidates are rows of the files themselves: not those of dense twins, which are no files, nor of
other methods, nor of engines, which only TensorRT runs. The fastest has the lowest median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asvit_deploy import __version__, sidecar
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.artefacts.opening import kind_of
from asvit_deploy.artefacts.runtime_choice import KIND
from asvit_deploy.checkpoints.facts import fields_of
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.engine_bench import EngineBench
from asvit_deploy.evaluation.model_bench import ModelBench
from asvit_deploy.evaluation.timing import Row
from asvit_deploy.precision import FLOAT32
from asvit_deploy.runtimes import TORCH

Fields = dict[str, Any]


def candidates(paths: Sequence[Path], runtimes: Sequence[str] = ()) -> dict[str, Fields]:
    """The sidecars of the ONNX files among artefacts to bench, by path: one network's.

    Args:
        runtimes: those that bench is to run; none stands for the usual ones.

    Raises:
        UserError: there is no ONNX file, one cannot be read, they are of several networks, or
            nothing of what is named runs one as it is.
    """
    named = [path for path in paths if kind_of(path) in (None, "onnx")]
    if not named:
        raise UserError(
            "--save-choice says how to run an ONNX file, and only engines are named; name their "
            "ONNX file too, or leave --save-choice out"
        )
    found = {str(artefact.path): artefact for artefact in map(OnnxArtefact, named)}
    first, *others = found.values()
    for other in others:
        if key := _differs(first, other):
            raise UserError(
                f"--save-choice is for files of one network, and {first.path} and {other.path} "
                f"differ in {key}; bench them one by one"
            )
    fields = {path: artefact.fields for path, artefact in found.items()}
    exact = [one["precision"] for one in fields.values() if one["precision"] == FLOAT32.name]
    if tuple(runtimes) == (TORCH,) and not exact:
        raise UserError(
            f"--runtime {TORCH} runs the checkpoint of {first.path} in float32 and not the file: "
            "there is nothing to choose; name another runtime too"
        )
    return fields


def _differs(one: OnnxArtefact, other: OnnxArtefact) -> str | None:
    """In what two files are not of one network, or None; the dense form of one is of it."""

    def said(artefact: OnnxArtefact) -> Fields:
        fields, source = artefact.fields, artefact.fields["source"]
        own: Fields = {"checkpoint": source["sha256"], "averaged weights": source.get("ema")}
        own |= {"image size": fields["image_size"], **fields_of(artefact.config)}
        if one.adaptive and other.adaptive:
            own |= {name: fields.get(name) for name in ("thresholds", "stages", "reduction")}
        return own

    ours, theirs = said(one), said(other)
    return next((name for name, value in ours.items() if value != theirs[name]), None)


class _Timed(NamedTuple):
    """A row of a report."""

    report: ModelBench
    row: Row

    @property
    def threads(self) -> int:
        """As a runner takes it: 0 for every core, where there are several."""
        count = self.report.threads
        return 0 if count == self.report.machine["cores"] > 1 else count

    def brief(self) -> Fields:
        return {
            "model": Path(self.report.model).name, "row": self.row["name"],
            "threads": self.threads, "p50_ms": self.row["p50_ms"],
        }  # fmt: skip

    def said(self) -> str:
        count = self.report.threads
        return f"{self.row['name']}, {count} thread{'s' * (count > 1)}, {self.row['p50_ms']:.2f} ms"


class SavedChoice(NamedTuple):
    """What was found: the text of the file, and lines on it."""

    text: str
    lines: list[str]


def choose(
    reports: Sequence[ModelBench | EngineBench], files: Mapping[str, Fields]
) -> SavedChoice:  # fmt: skip
    """The fastest way in which one of these files was run.

    Args:
        files: what `candidates` gave.

    Raises:
        UserError: none was run.
    """
    benched = [one for one in reports if isinstance(one, ModelBench) and one.model in files]
    rows = [_Timed(report, row) for report in benched for row in report.rows]
    ranked = sorted((timed for timed in rows if "way" in timed.row), key=_by_median)
    if not ranked:
        raise UserError(
            f"no way to run {' or '.join(files)} was measured, so there is nothing to choose; name "
            "other runtimes"
        )
    best, *rest = ranked
    dense = [one for one in rows if not one.row["adaptive"] and "way" not in one.row]
    fastest_dense = min(dense, key=_by_median, default=None)
    fields = _fields(best, rest, fastest_dense, files)
    lines = [f"fastest: {best.report.model} in {best.said()} at p50"
             + (f"; next: {rest[0].report.model} in {rest[0].said()}" if rest else "")]  # fmt: skip
    if best.row["adaptive"] and fastest_dense is not None:
        faster = fastest_dense.row["p50_ms"] < best.row["p50_ms"]
        if faster or fields["verdict"] == "dense":
            lines.append(_dense_won(fastest_dense, files[fastest_dense.report.model]))
    if any(isinstance(one, EngineBench) for one in reports):
        lines.append("engines are no part of the choice, which is for ONNX files")
    return SavedChoice(sidecar.signed(fields), lines)


def _by_median(timed: _Timed) -> float:
    return timed.row["p50_ms"]


def _fields(
    best: _Timed, rest: Sequence[_Timed], dense: _Timed | None, files: Mapping[str, Fields]
) -> Fields:
    report, row, own = best.report, best.row, files[best.report.model]
    lost = {Path(p).name: f["sha256"] for p, f in files.items() if f["sha256"] != own["sha256"]}
    return choice_fields(
        Path(report.model).name, own, row["runtime"], row["way"], best.threads, row["p50_ms"],
        row["name"], row["runner"], report.machine,
        models=[Path(path).name for path in files], lost=lost,
        runner_up=rest[0].brief() if rest else None, verdict=_verdict(best, files),
        speedup=row.get("speedup"), fastest_dense=dense.brief() if dense else None,
        runs=report.runs, images=report.images,
    )  # fmt: skip


def choice_fields(
    model: str, own: Mapping[str, Any], runtime: str, way: str, threads: int, p50_ms: float,
    row: str, runner: Mapping[str, str], machine: Mapping[str, Any], batch: int = 1, **more: Any,
) -> Fields:  # fmt: skip
    """What a choice file says, before it is signed.

    Args:
        model: name of the file that is to be run.
        own: its sidecar.
        way: as `Artefact.ways` calls it.
        row: what was measured.
        runner: as `Runner.describe`.
        more: for readers alone; `models` and `lost` are for messages.
    """
    return {
        "kind": KIND, "model": model, "sha256": own["sha256"], "models": [model], "lost": {},
        "runtime": runtime, "way": way, "threads": threads, "precision": own["precision"],
        "computes_in": runner.get("precision"), "batch": batch, "p50_ms": p50_ms, "row": row,
        **more, "backend": runner["backend"], **machine, "tool": f"asvit-deploy {__version__}",
    }  # fmt: skip


def _verdict(best: _Timed, files: Mapping[str, Fields]) -> str | None:
    """Whether "adaptive" or "dense" wins in the runtime chosen, or a "draw"; None: not measured."""
    if not best.row["adaptive"]:
        return "dense" if any(fields["adaptive"] for fields in files.values()) else None
    if (speedup := best.row.get("speedup")) is None:
        return None
    return "adaptive" if speedup["low"] > 1 else "dense" if speedup["high"] < 1 else "draw"


def _dense_won(dense: _Timed, fields: Fields) -> str:
    source = fields["source"]
    made = fields.get("quantisation")
    int8 = f" --int8 {made['kind']}" if made and dense.row["precision"] == "int8" else ""
    return (
        f"the dense network is faster here ({dense.said()}); `asvit-deploy export --ckpt "
        f"{source.get('given', source['path'])} --dense{int8}` writes it as a file"
    )
