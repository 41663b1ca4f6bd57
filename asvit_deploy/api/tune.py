"""`asvit_deploy.tune`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_files,
    checkpoint_path,
    given_facts,
    optional_path,
    require_at_least,
    require_numbers,
    require_one_of,
    require_whole,
    say_load,
)
from asvit_deploy.api.methods import require_sizes
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.tuning.demand import Demand
    from asvit_deploy.tuning.place import Place

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Frontier:
    """What adaptive brings here, and what it costs.

    Attributes:
        output: the folder.
        model: the winner's ONNX file, with its sidecar, `MODEL.choice.json` and, where that won,
            its engine beside it; None where nothing was exported.
        verdict: `go` (True, False, or None: not shown), `why`, `sentence`, `exit_code`, and the
            winner or what came nearest.
        points: every adaptive row that was timed, the fastest first: candidate, runtime, precision,
            batch, latency, speed-up over dense of the same runtime and precision, and what the
            judging pictures show; `certified` says that it meets the demand.
        promise: what a later measurement of the winner should find; None without one.
        report: all of `tune.json`.
    """

    output: Path
    model: Path | None
    verdict: dict[str, Any]
    points: list[dict[str, Any]]
    promise: dict[str, Any] | None
    report: dict[str, Any]

    @property
    def go(self) -> bool | None:
        return self.verdict["go"]


def tune(
    ckpt: PathLike, *, images: PathLike | None = None, labels: bool = False,
    max_drop: float = 0.5, min_cosine: float = 0.95, methods: str | Sequence[str] | None = None,
    batch: int | str | Sequence[int] = "1", runtime: str | Sequence[str] | None = None,
    precision: str | Sequence[str] | None = None, minutes: float | None = None,
    output: PathLike | None = None, image_size: int | None = None, arch: str | None = None,
    ema: bool = False, mean: Channels | None = None, std: Channels | None = None,
    crop_pct: float | None = None, interpolation: str | None = None, heads: int | None = None,
    activation: str | None = None, classes: PathLike | None = None, limit: int | None = None,
    seed: int = 0, threads: int = 1, skip_limit: int = 0, force: bool = False, say: Say = silent,
) -> Frontier:  # fmt: skip
    """Find out whether letting tokens leave is worth it here, and what it loses.

    The options are those of `asvit-deploy tune`.

    Args:
        images: pictures, some of which calibrate and the others judge; or "digits".
        labels: their folders are classes, and accuracy is what may be lost.
        max_drop: points of accuracy, or of the pictures whose top-1 changes, that may be lost at
            most, by a one-sided 95 % bound of each test. Tests of adaptive networks are in
            sequence, so that the chance that any passes falsely is 5 % in all; dense int8, bf16 and
            engines are tested beside them.
        min_cosine: of embeddings, the least mean cosine, likewise.
        methods: names; by default those that hold without training.
        batch: one or several; the verdict is of the first.
        runtime, precision: names; by default what is at hand, on a GPU engines of TensorRT in
            float32 and fp16 too.
        minutes: how long it may take at most; what is left out for it is said.
        output: a folder, by default `NAME.tune` here; one of an earlier run is taken up.
        threads: of every runtime; 0: every core.
        say: gets status lines; a progress bar goes with them.

    Raises:
        UserError: bad input, too few pictures, or a folder that holds others' files without
            `force`.
    """
    require_at_least(1, limit=limit)
    require_whole(image_size=image_size)
    require_at_least(0, skip_limit=skip_limit, seed=seed, threads=threads)
    require_numbers({"max_drop": max_drop, "min_cosine": min_cosine, "minutes": minutes})
    if seed > LARGEST_SEED:
        raise UserError(f"seed={seed} cannot be used; pass a number up to {LARGEST_SEED}")
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"minutes is {minutes:g}; give a number above 0 and not infinite")
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    names, data = optional_path(classes), optional_path(images)
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.checkpoints.places import name_of
    from asvit_deploy.classes.network import named, of_checkpoint
    from asvit_deploy.processor import require_threads
    from asvit_deploy.runners.onnx_runtime import import_onnxruntime
    from asvit_deploy.tuning import pictures
    from asvit_deploy.tuning.means import means
    from asvit_deploy.tuning.place import Place
    from asvit_deploy.tuning.session import Session, Wanted, require_demand

    require_demand(max_drop, min_cosine)
    require_threads(threads)
    import_onnxruntime()
    found = means(runtime, precision, batch)
    path = checkpoint_path(ckpt, say)
    sources = checkpoint_files(path)
    place = Place(optional_path(output) or Path(f"{name_of(path)}.tune"), name_of(path))
    place.check(force, sources)
    checkpoint = load_checkpoint(path, image_size, arch, ema, known)
    asked = _methods(checkpoint, methods)
    demand = _demand(checkpoint, labels, max_drop, min_cosine)
    say_load(checkpoint, say)
    shown = of_checkpoint(checkpoint, names, say)
    checkpoint, config = named(checkpoint, shown), checkpoint.config
    taken = pictures.read(path, data, config, shown, labels, limit, skip_limit, seed, say)
    for size in found.batches:
        if size > len(taken.judging):
            raise UserError(
                f"batch has {size}, and {len(taken.judging)} pictures judge; give more of them, or "
                "smaller batches"
            )
    say(
        f"{path}: {config.name}, {config.image_size} px; {taken.source}: "
        f"{len(taken.calibrating)} calibrate, {len(taken.judging)} others judge"
    )
    with place.claimed(force, sources):
        wanted = Wanted(demand, found, asked, minutes, seed, threads)
        report = finite(Session(checkpoint, taken, wanted, place, say).run())
        _write(place, report, say)
    model = place.model if report["exported"] else None
    return Frontier(place.folder, model, report["verdict"], report["frontier"],
                    report["promise"], report)  # fmt: skip


def _methods(checkpoint: Checkpoint, given: str | Sequence[str] | None) -> tuple[str, ...]:
    from asvit_deploy.reduction.methods import METHODS

    texts = [given] if isinstance(given, str) else list(given or ())
    named = dict.fromkeys(name.strip() for text in texts for name in text.split(","))
    for name in named:
        require_one_of("methods", name, tuple(METHODS))
        require_sizes(checkpoint, name)
        _require_numbers(checkpoint, name)
    if not named and checkpoint.reduction is not None:
        _require_numbers(checkpoint, checkpoint.reduction["name"])
    return tuple(named)


def _require_numbers(checkpoint: Checkpoint, name: str) -> None:
    """Raise UserError for a method that learned more than a few numbers, as dynamicvit's networks:
    tune compares what any weights can be given."""
    from asvit_deploy.reduction.methods import METHODS

    if METHODS[name].settled == "training":
        raise UserError(
            f"{checkpoint.path}: tune does not search for {name}, whose predictors are trained; "
            "run `asvit-deploy calibrate --budget` on a checkpoint of it, then `bench`"
        )


def _demand(
    checkpoint: Checkpoint, labels: bool, max_drop: float, min_cosine: float
) -> Demand:  # fmt: skip
    """Raises UserError where there is nothing to demand."""
    from asvit_deploy.tuning.demand import Demand

    config = checkpoint.config
    if config.output == "embedding":
        if labels:
            raise UserError(
                f"{checkpoint.path} gives embeddings and has no classes; leave --labels out: it is "
                "judged by the cosine with its dense network"
            )
        return Demand("embeddings", max_drop, min_cosine)
    if config.num_classes == 1:
        raise UserError(
            f"{checkpoint.path} has one output, a score and no class, so there is no top-1 to "
            "keep; `asvit-deploy calibrate` shows what a budget does to the score"
        )
    return Demand("labels" if labels else "classes", max_drop, min_cosine)


def _write(place: Place, report: dict[str, Any], say: Say) -> None:
    """The report, and the page where what draws it is installed."""
    from asvit_deploy.files import write_text

    write_text(place.report, json.dumps(report, indent=2, allow_nan=False) + "\n")
    from asvit_deploy.page import writing

    try:
        writing.require_extra()
        writing.write([report], place.page, force=True)
    except UserError as error:  # the verdict stands without it
        place.page.unlink(missing_ok=True)  # an earlier run's would say something else
        say(f"no {place.page.name}: {error}")


def finite(value: Any) -> Any:
    """JSON-ready, None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
