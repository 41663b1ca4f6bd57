"""Latency at batch 1, MACs and kept tokens of artefacts, beside their dense twins."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asvit_deploy import files, sidecar, trusted
from asvit_deploy.artefacts.artefact import Artefact
from asvit_deploy.artefacts.engine_file import EngineArtefact
from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
from asvit_deploy.artefacts.opening import (
    artefacts_here,
    engines_of,
    kind_of,
    open_artefact,
    paths_of,
)
from asvit_deploy.claims import claimed
from asvit_deploy.data.images import ImageSet, open_images
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.arguments import path_of, require_least
from asvit_deploy.evaluation.engine_bench import EngineBench, bench_engine
from asvit_deploy.evaluation.model_bench import ModelBench, bench_model
from asvit_deploy.evaluation.saved_choice import candidates, choose
from asvit_deploy.evaluation.sweep import Rounds, run_sweep
from asvit_deploy.evaluation.sweep_points import (
    Asked,
    Given,
    Plan,
    asked,
    plans,
    require_sweepable,
)
from asvit_deploy.page import writing as page
from asvit_deploy.processor import usable_cores
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners.trt_plan import Allowed, named_plugin
from asvit_deploy.runtimes import OF_KIND, chosen, of_kind, require_library_used, require_used
from asvit_deploy.status import silent

_THREADS = {"1": [1], "all": [0], "both": [1, 0]}  # 0: every core
Benches = list[ModelBench | EngineBench]
_Plans = dict[Path, tuple[ImageSet, list[Plan]]]  # of a file: its pictures and its sweeps


@dataclass(frozen=True)
class _Wanted:
    """How every artefact is run; names as in `bench`."""

    images: Path | None
    limit: int
    skip_limit: int
    runs: int
    warmup: int
    threads: list[int]
    methods: tuple[str, ...]
    runtimes: tuple[str, ...]
    memory: bool
    say: Callable[[str], None]
    sweeps: Asked


def bench(
    models: str | Path | Sequence[str | Path] = (),
    *,
    images: str | Path | None = None,
    limit: int = 64,
    skip_limit: int = 0,
    runs: int = 200,
    warmup: int = 50,
    threads: str = "both",
    methods: str | Sequence[str] | None = None,
    library: str | Path | None = None,
    plugin: str | Path | None = None,
    allow_engine_code: bool = False,
    output: str | Path | None = None,
    html: str | Path | None = None,
    save_choice: str | Path | None = None,
    force: bool = False,
    runtime: str | Sequence[str] | None = None,
    memory: bool = False,
    sweep_batch: Given = None,
    sweep_budget: Given = None,
    sweep_size: Given = None,
    say: Callable[[str], None] = silent,
) -> Benches:
    """Time artefacts one picture at a time, every variant in turn, in one process.

    Args:
        models: ONNX files, engines and bundles; none stands for the adaptive ONNX artefact of the
            current folder and, on a machine with a GPU, the engines that were built from it.
        images: folder of pictures, or None for the photographs of scikit-image.
        limit: use at most so many pictures.
        skip_limit: so many of them may be unreadable.
        runs: timed rounds, 10 or more; each runs every variant once.
        warmup: untimed rounds first.
        threads: "1", "all" cores or "both" in turn, for ONNX artefacts.
        methods: names of methods with fixed counts to time beside an ONNX artefact, at its mean
            MACs; a text names several with commas.
        library: the op's library for ONNX Runtime, or None for the one that `build-plugins` made.
        plugin: the op's TensorRT library, likewise.
        allow_engine_code: run code that an engine brings along.
        output: also write the reports there as JSON.
        html: also make a page of them there, as `asvit_deploy.report` does.
        save_choice: write there which runtime, way and number of threads ran the ONNX files, all of
            one network, fastest; runtime "auto" reads `MODEL.choice.json` beside MODEL.
        force: replace a file that is there.
        runtime: only rows of these, of `runtimes.NAMES`; a text names several with commas. Without
            it, all that are installed and compute in the file's own precision.
        memory: also measure what each ONNX model takes, in a process of its own (Linux).
        sweep_batch: also time an adaptive ONNX artefact at these batches, beside its dense twin and
            fixed counts at its MACs; numbers, or a text of several with commas.
        sweep_budget: likewise, its method fitted to these shares of the dense MACs.
        sweep_size: likewise, its checkpoint at these image sizes, fitted to its own share.
        say: gets status lines; a progress bar is shown only where this is given.

    Returns:
        one for each ONNX artefact and number of threads, and for each engine.

    Raises:
        UserError: an artefact that was named, or every one that was found, cannot be opened or run;
            a runtime that was named is missing, or runs none of them; the pictures cannot be read;
            a sweep is asked for that cannot be made; `output`, `html` or `save_choice` cannot be
            written, a page takes what is not installed, or there is nothing to choose.
    """
    require_least(1, limit=limit)
    require_least(0, skip_limit=skip_limit, warmup=warmup)
    require_least(10, runs=runs)
    if threads not in _THREADS:
        raise UserError(f"threads is {threads!r}; give one of {', '.join(_THREADS)}")
    allowed = Allowed(named_plugin(path_of(plugin)), allow_engine_code)
    named, target, saved = paths_of(models), path_of(output), path_of(save_choice)
    shown = path_of(html)
    wanted = _Wanted(path_of(images), limit, skip_limit, runs, warmup, _counts(threads),
                     _methods(methods), chosen(runtime), memory, say,
                     asked(sweep_batch, sweep_budget, sweep_size))  # fmt: skip
    if wanted.sweeps:
        _require_onnx(named)
    require_used(wanted.runtimes, [kind_of(path) or "onnx" for path in named])
    require_library_used(library, wanted.runtimes)
    paths = named or _here(say)
    with contextlib.ExitStack() as stack:
        if shown is not None:
            page.require_extra()
        for file in _outputs({"--output": target, "--html": shown, "--save-choice": saved}):
            stack.enter_context(_output(file, force, paths))
        files_of_one = {} if saved is None else candidates(paths, wanted.runtimes)
        found = find_op_library(path_of(library), say)
        opened: Callable[[Path], Artefact]
        opened = partial(open_artefact, library=found, allowed=allowed)
        planned: _Plans = {}
        if wanted.sweeps and named:
            opened = functools.cache(opened)
            planned = _plans(named, opened, wanted)
        reports = _all(paths, bool(named), opened, wanted, planned)
        if target is not None:
            files.write_text(target, as_json(reports) + "\n")
        if shown is not None:
            page.write([report.as_dict() for report in reports], shown, force)
        if saved is not None:
            choice = choose(reports, files_of_one)
            files.write_text(saved, choice.text)
            for line in choice.lines:
                say(f"{saved}: {line}")
    return reports


def _counts(threads: str) -> list[int]:
    """Numbers of threads, 0 for every core: of one core both are the same."""
    found = _THREADS[threads]
    return found[:1] if usable_cores() == 1 else found


def _outputs(given: dict[str, Path | None]) -> list[Path]:
    """The files to write, by their options: no two are one."""
    seen: dict[str, str] = {}
    for option, path in given.items():
        if path is not None and (twin := seen.setdefault(os.path.realpath(path), option)) != option:
            raise UserError(f"{twin} and {option} both name {path}; name two files")
    return [path for path in given.values() if path is not None]


def _methods(names: str | Sequence[str] | None) -> tuple[str, ...]:
    found = tuple(names.split(",") if isinstance(names, str) else names or ())
    for name in found:
        if name not in RANKED:
            raise UserError(f"methods has {name!r}; give some of {', '.join(RANKED)}")
    return found


def _require_onnx(named: Sequence[Path]) -> None:
    """Raise UserError where a sweep is asked for and an engine was named."""
    for path in named:
        if kind_of(path) in OF_KIND and kind_of(path) != "onnx":
            raise UserError(
                f"{path} is an engine, built for one size and budget; sweeps take its ONNX file"
            )


def as_json(reports: Benches) -> str:
    """What `output` gets."""
    return json.dumps([report.as_dict() for report in reports], indent=2)


def _output(
    target: Path, force: bool, models: Sequence[Path]
) -> contextlib.AbstractContextManager[None]:
    """No other run makes `target` meanwhile, and it is none of the models."""
    chosen = [path for path in models if path.is_file()]
    inputs = [*chosen, *map(sidecar.sidecar_path, chosen)]
    return claimed(target, force, lambda: files.check_writable(target, force, *inputs))


def _plans(
    named: Sequence[Path], opened: Callable[[Path], Artefact], wanted: _Wanted
) -> _Plans:  # fmt: skip
    """The sweeps of every file, before the first is timed: one that cannot be made is refused."""
    artefacts = [artefact for path in named if isinstance(artefact := opened(path), OnnxArtefact)]
    for artefact in artefacts:
        require_sweepable(artefact, wanted.sweeps)
    planned: _Plans = {}
    for artefact in artefacts:
        pictures = _pictures(artefact, wanted)
        made = plans(artefact, pictures, wanted.sweeps, wanted.say)
        planned[artefact.path] = pictures, made
    return planned


def _all(
    paths: list[Path], named: bool, opened: Callable[[Path], Artefact], wanted: _Wanted,
    planned: _Plans,
) -> Benches:  # fmt: skip
    """The reports; of artefacts that nobody named, one that cannot run costs a line."""
    reports: Benches = []
    failures: list[UserError] = []
    for path in paths:
        try:
            reports += _bench(opened(path), wanted, planned)
        except UserError as error:
            if named:
                raise
            wanted.say(f"not run: {error}")
            failures.append(error)
    if failures and not reports:
        raise failures[0]
    return reports


def _bench(artefact: Artefact, wanted: _Wanted, planned: _Plans) -> Benches:
    """The report on each way of benching this kind of artefact."""
    runs, warmup, say = wanted.runs, wanted.warmup, wanted.say
    if isinstance(artefact, EngineArtefact):
        of_kind(artefact.path, "engine", wanted.runtimes)
        trusted.require_temporary()  # engines are built there, and run
        artefact.require_runnable()
        if wanted.sweeps:  # and nobody named it
            say(f"{artefact.path}: no sweeps, which take ONNX files")
        if wanted.memory:
            say(f"{artefact.path}: no memory, which is measured of ONNX files")
        return [bench_engine(artefact, _pictures(artefact, wanted), warmup, runs, say)]
    assert isinstance(artefact, OnnxArtefact)
    runtimes = of_kind(artefact.path, "onnx", wanted.runtimes)
    if artefact.path in planned:
        pictures, sweeping = planned[artefact.path]
    else:
        pictures = _pictures(artefact, wanted)
        sweeping = plans(artefact, pictures, wanted.sweeps, say)
    reports: Benches = []
    for count in wanted.threads:
        report = bench_model(
            artefact, pictures, count, warmup, runs, wanted.methods, say, runtimes, wanted.memory
        )
        sweeps = [run_sweep(artefact, pictures, plan, count, Rounds(warmup, runs), runtimes, say)
                  for plan in sweeping]  # fmt: skip
        reports.append(replace(report, sweeps=sweeps))
    return reports


def _pictures(artefact: Artefact, wanted: _Wanted) -> ImageSet:
    """What an artefact is run on."""
    found = open_images(
        wanted.images, artefact.config, wanted.limit, wanted.skip_limit, wanted.say
    ).readable()
    wanted.say(f"{artefact.path}: {len(found)} images ({found.source})")
    return found


def _here(say: Callable[[str], None]) -> list[Path]:
    """The one adaptive artefact of the current folder, and its engines."""
    found = artefacts_here("onnx")
    readable = {path: fields for path in found if (fields := _fields(path, len(found) > 1, say))}
    adaptive = [path for path, fields in readable.items() if fields["adaptive"]] or list(readable)
    if not adaptive:
        sidecar.read(found[0])  # raises: none of them can be read
    if len(adaptive) > 1:
        names = ", ".join(map(str, adaptive))
        raise UserError(f"several artefacts here, name the ones to bench: {names}")
    return [*adaptive, *_engines_beside(adaptive[0], say)]


def _fields(path: Path, several: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
    """A sidecar; of several, one that cannot be read costs a line and no more."""
    try:
        return sidecar.read(path)
    except UserError as error:
        if not several:
            raise
        say(f"not run: {error}")
        return None


def _engines_beside(onnx: Path, say: Callable[[str], None]) -> list[Path]:
    """The engines here that were built from `onnx`, where they can run."""
    engines = engines_of(Path(), onnx, lambda reason: say(f"not run: {reason}"))
    if engines and not torch.cuda.is_available():
        names = ", ".join(map(str, engines))
        say(f"not run, for want of an NVIDIA GPU that PyTorch sees: {names}")
        return []
    return engines
