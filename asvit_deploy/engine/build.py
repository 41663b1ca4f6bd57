"""ONNX to engine: make the graph, check it, build it in a process of its own, put it in place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from asvit_deploy import files, sidecar, trusted
from asvit_deploy.engine import process
from asvit_deploy.engine.compactions import Wanted, cut_blocks, physical_stages
from asvit_deploy.engine.comparison import Comparison, compare_graph
from asvit_deploy.engine.graphs import make_graph
from asvit_deploy.engine.job import Job, Profile
from asvit_deploy.engine.source import Source
from asvit_deploy.engine.warnings import unexpected
from asvit_deploy.errors import UserError
from asvit_deploy.graph import without_function
from asvit_deploy.ops import onnx_op
from asvit_deploy.precision import Half, of_option
from asvit_deploy.runners.trt_flavour import Flavour
from asvit_deploy.text import one_line

Batch = tuple[int, int, int]
CHECK_IMAGES = 64  # the rule means the same for any number; more take longer than the build
DEFAULT_BATCH: Batch = (1, 4, 8)


@dataclass(frozen=True)
class Options:
    """What may be asked of an engine.

    Attributes:
        precision: "fp16", "bf16" or None for float32.
        mode: "dynamic", "padded" or "bucketed" (`engine.bucketed`).
        batch: smallest, best and largest batch, for a dynamic-batch model.
        target_sms: compute capabilities such as "86"; RTX only.
        workspace: MiB, or None.
        level: builder optimisation level, or None.
        plugin: the op's TensorRT library, or None where the graph needs none.
        embed_plugin: put the library into the plan.
        layers: file for the inspector's JSON; enterprise only.
        version_compatible, hardware_compatible: enterprise only.
        images: folder of pictures to check on, or None for the sample photographs.
        limit: check on at most so many.
        checked: compare the graph before building.
        buckets: rows that segments take, or None for the automatic list; bucketed only.
        skip_limit: so many of the pictures may be unreadable.
        compact_at: blocks at which rows really leave and are not only hidden, "all", or None for
            what pays (`engine.compactions`); dynamic only.
    """

    precision: Half | None = None
    mode: str = "dynamic"
    batch: Batch | None = None
    target_sms: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    plugin: Path | None = None
    embed_plugin: bool = False
    layers: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    images: Path | None = None
    limit: int = CHECK_IMAGES
    checked: bool = True
    buckets: tuple[int, ...] | None = None
    skip_limit: int = 0
    compact_at: Wanted = None


@dataclass(frozen=True)
class Built:
    """What came of it.

    Attributes:
        checked: the comparison, or None where there was nothing to compare.
        warnings: what TensorRT warned of beyond the known list.
        fields: the sidecar.
        seconds: the builder's process, from start to end.
    """

    checked: Comparison | None
    warnings: list[str]
    fields: dict[str, Any]
    seconds: float


def default_output(source: Path, options: Options) -> Path:
    """`as_deit_s.onnx` -> `as_deit_s.fp16.engine`, `.fp16.padded.engine` or `.bucketed`, here."""
    ending = {"padded": "padded.engine", "bucketed": "bucketed"}.get(options.mode, "engine")
    return Path(".".join(filter(None, [source.stem, options.precision, ending])))


def refuse_misfits(flavour: Flavour, options: Options) -> None:
    """Raise UserError for options that this flavour, or this mode, does not have."""
    if options.mode == "bucketed":
        whole = {"--batch": options.batch, "--embed-plugin": options.embed_plugin,
                 "--layers": options.layers}  # fmt: skip
        for name, value in whole.items():
            if value:
                raise UserError(f"{name} does not go with --mode bucketed; leave it out")
    elif options.buckets is not None:
        raise UserError("--buckets needs --mode bucketed")
    if options.compact_at is not None and options.mode != "dynamic":
        raise UserError(f"--compact-at does not go with --mode {options.mode}; leave it out")
    if flavour.enterprise:
        if options.target_sms:
            raise UserError(
                "--target-sm needs --flavour tensorrt-rtx; TensorRT builds for the GPU it finds"
            )
        return
    wanted = {
        "--layers": options.layers,
        "--version-compatible": options.version_compatible,
        "--hardware-compatible": options.hardware_compatible,
    }
    for name, value in wanted.items():
        if value:
            raise UserError(f"{name} needs --flavour tensorrt; TensorRT-RTX does not have it")


def _refuse_packed(flavour: Flavour, source: Source) -> None:
    """Raise UserError for what packs pictures, where the flavour cannot."""
    packed = source.fields.get("batch") == "packed"
    needs = packed and any(node.op_type == "NonZero" for node in source.model.graph.node)
    if needs and not flavour.enterprise:
        raise UserError(
            f"{source.path} packs pictures by NonZero, which TensorRT-RTX does not have; export it "
            "with --batch dynamic"
        )


def batch_profile(source: Source, graph: onnx.ModelProto, batch: Batch | None) -> Profile | None:
    """Input shapes for the smallest, best and largest batch; None where the batch is fixed.

    Raises:
        UserError: a batch range for a fixed batch, one that does not rise, or an input whose other
            dimensions vary.
    """
    profile = {}
    for info in graph.graph.input:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        if all(dims):
            continue
        if not all(dims[1:]):
            raise UserError(f"{source.path}: only the batch of input {info.name} may vary")
        smallest, best, largest = batch or DEFAULT_BATCH
        if not 1 <= smallest <= best <= largest:
            raise UserError(
                f"--batch {smallest} {best} {largest} does not rise; name the smallest, the best "
                "and the largest batch, 1 or more"
            )
        rest = tuple(dims[1:])
        profile[info.name] = ((smallest, *rest), (best, *rest), (largest, *rest))
    if batch and not profile:
        raise UserError(
            f"{source.path} has a fixed batch; export it with --batch dynamic, or leave --batch out"
        )
    return profile or None


def build_engine(
    source: Source,
    output: Path,
    flavour: Flavour,
    options: Options,
    progress: process.Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Built:
    """Build an engine and put it in place with its sidecar.

    Nothing is written unless the graph agrees with its reference and the build succeeds.

    Args:
        output: the plan; a plain one that any loader of the same flavour and version takes.
        progress: called with how far TensorRT is.
        say: called with a line on how the comparison went, before the build.

    Raises:
        UserError: an option, the graph or the plugin does not fit, or the builder gives up.
        CheckFailed: the graph does not agree with its reference.
    """
    refuse_misfits(flavour, options)
    _refuse_packed(flavour, source)
    physical = None
    if options.mode == "dynamic":
        wanted = options.compact_at
        physical = physical_stages(source, wanted, options.images, options.skip_limit, say)
    graph = make_graph(source, options.mode, options.precision, physical)
    profile = batch_profile(source, graph, options.batch)
    profiles = [profile] if profile else []
    checked = None
    changed = options.precision or options.mode == "padded" or physical is not None
    if changed and options.checked:
        say(f"comparing the graph on up to {options.limit} images")
        checked = compare_graph(source, graph, options.precision, options.images, options.limit,
                        skip_limit=options.skip_limit, say=say)  # fmt: skip
        say(checked.summary)
    stages = len(onnx_op.nodes_of(graph.graph))
    if stages and options.plugin is None:
        raise UserError(
            f"{source.path} needs the TensorRT plugin; run `asvit-deploy build-plugins trt`, or "
            "build with --mode padded"
        )
    start = time.perf_counter()
    trusted.require_temporary()  # the builder reads there what to load
    with files.scratch("engine") as folder:
        job = make_job(folder, graph, flavour, options, profiles, stages)
        outcome = process.run(job, flavour, folder, str(source.path), progress)
        seconds = time.perf_counter() - start
        plan = Path(job.plan).read_bytes()
        layers = Path(job.layers).read_bytes() if job.layers else None
    fields = {
        **describe(source, flavour, options, outcome, checked, seconds), "profile": profile,
        "plugin": _plugin_fields(options) if outcome.plugin_layers else None,
    }  # fmt: skip
    if physical is not None:
        fields["compactions"] = [cut_blocks(source)[stage] for stage in physical]
    sidecar.write(output, plan, fields)
    if layers is not None and options.layers is not None:
        files.write_bytes(options.layers, layers)
    return Built(checked, unexpected(outcome.warnings), fields, seconds)


def make_job(
    folder: Path,
    graph: onnx.ModelProto,
    flavour: Flavour,
    options: Options,
    profiles: Sequence[Profile],
    stages: int,
) -> Job:
    """The build's order, its graph beside it without the op's function.

    With the function there, a parser that misses the plugin would quietly take the function.
    """
    path = folder / "graph.onnx"
    files.put(path, without_function(graph).SerializeToString())
    assert flavour.module is not None
    version, namespace = onnx_op.PLUGIN_ATTRIBUTES.values()
    plugin = options.plugin.resolve() if options.plugin and stages else None
    timing = _timing_folder() if flavour.enterprise else None
    return Job(
        module=flavour.module,
        enterprise=flavour.enterprise,
        onnx=str(path),
        plan=str(folder / "plan"),
        plugin=str(plugin) if plugin else None,
        creator=(onnx_op.OP_TYPE, version, namespace),
        embed_plugin=options.embed_plugin and plugin is not None,
        stages=stages,
        profiles=profiles,
        target_sms=options.target_sms,
        workspace=None if options.workspace is None else options.workspace << 20,
        level=options.level,
        timing_cache=str(timing) if timing else None,
        layers=str(folder / "layers.json") if options.layers else None,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
    )


def _timing_folder() -> Path | None:
    """Where TensorRT's timings are kept from build to build; they only save time."""
    try:
        folder = files.make_cache_dir()
        for path in folder.glob("timing-*"):  # and the lock that Polygraphy makes beside it
            with trusted.opened(path):
                pass
        return folder
    except UserError as error:
        print(one_line(f"timings are not kept, {error}"), file=sys.stderr)
        return None


_OF_THE_FILE = ("schema", "sha256", "digest", "source", "tool", "libraries", "python", "command",
                "compared")  # fmt: skip


def _precision(source: Source, options: Options) -> str | None:
    """What was asked for, or the file's own where that is int8; a foreign file's is not known."""
    if source.artefact is None:
        return None
    if source.fields.get("precision") == "int8":
        return "int8"
    return of_option(options.precision).name


def describe(
    source: Source,
    flavour: Flavour,
    options: Options,
    outcome: process.Outcome,
    checked: Comparison | None,
    seconds: float,
) -> dict[str, Any]:
    """A sidecar's fields: the model as its ONNX describes it, and what the build added."""
    model = {key: value for key, value in source.fields.items() if key not in _OF_THE_FILE}
    own = {
        "kind": "engine",
        "flavour": flavour.name,
        "flavour_version": outcome.version,
        "precision": _precision(source, options),
        "mode": _mode(source, options),
        "ops": source.fields.get("ops") if options.mode == "dynamic" else "standard",
        "target_sms": list(options.target_sms),
        "level": options.level,
        "workspace": options.workspace,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "layers": outcome.layers,
        "plugin_layers": outcome.plugin_layers,
        "outputs": outcome.outputs,
        "build_seconds": round(seconds, 2),
        "checked": checked and checked.fields(),
        "source": sidecar.source_of(source.path, checkpoint=source.fields.get("source")),
    }  # fmt: skip
    return {**model, **own, **sidecar.provenance(("onnx", "onnxruntime", "polygraphy", "torch"))}


def _mode(source: Source, options: Options) -> str:
    if source.artefact is None:
        return "foreign"
    if not source.adaptive:
        return "dense"
    return "static" if source.fields["mode"] == "static" else options.mode


def _plugin_fields(options: Options) -> dict[str, Any]:
    assert options.plugin is not None
    # No path: what loads the engine takes no library from where a file says that one is.
    return {"sha256": files.sha256(options.plugin), "embedded": options.embed_plugin}
