"""ONNX to segment engines: cut the graph, check the cut, build each segment for every bucket."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from asvit_deploy import files, trusted
from asvit_deploy.artefacts import bundle
from asvit_deploy.engine import process
from asvit_deploy.engine.buckets import choose_buckets, profiles_of
from asvit_deploy.engine.build import Built, Options, describe, make_job, refuse_misfits
from asvit_deploy.engine.comparison import Comparison, compare_graph, require_end
from asvit_deploy.engine.graphs import make_graph
from asvit_deploy.engine.source import Source
from asvit_deploy.engine.warnings import unexpected
from asvit_deploy.exporting.split import prefix_of, rows_of, split_segments, thresholds_of
from asvit_deploy.precision import of_option
from asvit_deploy.reduction.methods import method_of
from asvit_deploy.runners.bucketed import BucketedRunner, OrtStages, side_rows_of
from asvit_deploy.runners.trt_flavour import Flavour

# The cut moves no number: where another check judges the precision, a few pictures show a mistake.
FEW_IMAGES = 16


def build_bucketed(
    source: Source,
    output: Path,
    flavour: Flavour,
    options: Options,
    progress: process.Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Built:
    """Build one engine per segment and put them in place in one folder with a manifest.

    Nothing is written unless the segments agree with the reference and every build succeeds.

    Args:
        output: the folder: `stage_0.engine` and so on, each with one optimisation profile per
            bucket in the manifest's order (of segment 0 no shape varies), and `manifest.json`.
        progress, say: as `build_engine`.

    Raises:
        UserError: an option or the graph does not fit, or the builder gives up.
        CheckFailed: the graph or its segments do not agree with the reference.
    """
    refuse_misfits(flavour, options)
    graph = make_graph(source, "bucketed", options.precision)
    segments = split_segments(graph, str(source.path))
    rows, prefix = rows_of(segments), prefix_of(segments)
    buckets = choose_buckets(options.buckets, rows, str(source.path), prefix)
    checked = _check(source, graph, buckets, options, say) if options.checked else None
    start = time.perf_counter()
    plans, outcome = _build(segments, buckets, source, flavour, options, progress)
    seconds = time.perf_counter() - start
    fields = {
        **describe(source, flavour, options, outcome, checked, seconds),
        "kind": "bucketed",
        "buckets": list(buckets),
        "thresholds": thresholds_of(graph),
    }
    if side := side_rows_of(method_of(fields)):
        fields["side_rows"] = list(side)
    fields = bundle.write(output, plans, fields)
    return Built(checked, unexpected(outcome.warnings), fields, seconds)


def ort_runner(graph: onnx.ModelProto, buckets: Sequence[int], name: str) -> BucketedRunner:
    """A dynamic graph of ours in bucketed mode on ONNX Runtime's CPU."""
    backend = OrtStages(split_segments(graph, name), thresholds_of(graph))
    return BucketedRunner(backend, len(backend.thresholds), buckets)


def _check(
    source: Source, graph: onnx.ModelProto, buckets: Sequence[int], options: Options,
    say: Callable[[str], None],
) -> Comparison:  # fmt: skip
    """The segments in float32 against the reference, and the precision on the graph as a whole.

    The half segments run too where they can: ONNX Runtime has no bfloat16 on a CPU.
    """
    limit = min(options.limit, FEW_IMAGES) if options.precision else options.limit
    say(f"comparing the segments on up to {limit} images")
    require_end(source)  # before a session is made of any part
    cut = ort_runner(source.model, buckets, str(source.path))
    skip = options.skip_limit
    checked = compare_graph(source, source.model, None, options.images, limit, cut, skip, say)
    if options.precision and of_option(options.precision).runs_on("onnxruntime"):
        half = ort_runner(graph, buckets, str(source.path))
        compare_graph(source, graph, options.precision, options.images, limit, half, skip)
    if options.precision:
        say(f"comparing the graph on up to {options.limit} images")
        checked = compare_graph(
            source, graph, options.precision, options.images, options.limit, skip_limit=skip
        )
    say(checked.summary)
    return checked


def _build(
    segments: Sequence[onnx.ModelProto], buckets: Sequence[int], source: Source, flavour: Flavour,
    options: Options, progress: process.Progress,
) -> tuple[dict[str, bytes], process.Outcome]:  # fmt: skip
    """Plans by file name, and what the builders said together."""
    plans: dict[str, bytes] = {}
    total = process.Outcome()
    trusted.require_temporary()  # the builder reads there what to load
    for number, segment in enumerate(segments):
        title = f"segment {number + 1} of {len(segments)}"

        def relay(phase: str, done: int, of: int, title: str = title) -> None:
            progress(f"{title}: {phase}", done, of)

        with files.scratch("engine") as folder:
            profiles = profiles_of(segment, buckets)
            job = make_job(folder, segment, flavour, options, profiles, stages=0)
            outcome = process.run(job, flavour, folder, f"{title} of {source.path}", relay)
            plans[f"stage_{number}.engine"] = Path(job.plan).read_bytes()
        total.version = outcome.version
        total.layers += outcome.layers
        total.warnings += outcome.warnings
    return plans, total
