"""`asvit_deploy.build_engine`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from asvit_deploy.api.inputs import PathLike, optional_path, require_at_least, require_one_of
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, hide_bar, silent

if TYPE_CHECKING:
    from asvit_deploy.engine.build import Built, Options
    from asvit_deploy.engine.compactions import Wanted
    from asvit_deploy.runners.trt_flavour import Flavour

MODES = ("dynamic", "padded", "bucketed")
FLAVOURS = ("auto", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, or a bucketed folder of them.

    Attributes:
        output: the file or the folder; what is known of it lies beside or in it as JSON.
        fields: the same: flavour, mode, precision, plugin, how the graph compared, and so on.
        warnings: what TensorRT warned of beyond the lines that are known to be harmless.
    """

    output: Path
    fields: dict[str, Any]
    warnings: tuple[str, ...]


def build_engine(
    onnx: PathLike | None = None, *, output: PathLike | None = None, fp16: bool = False,
    bf16: bool = False, flavour: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto",
    mode: Literal["dynamic", "padded", "bucketed"] = "dynamic",
    buckets: str | Sequence[int] | None = None,
    compact_at: str | Sequence[int] | None = None, batch: tuple[int, int, int] | None = None,
    target_sm: str | int | Sequence[str | int] = (), workspace: int | None = None,
    level: int | None = None, plugin: PathLike | None = None, embed_plugin: bool = False,
    layers: PathLike | None = None,
    version_compatible: bool = False, hardware_compatible: bool = False,
    images: PathLike | None = None, limit: int = 64, skip_limit: int = 0, no_check: bool = False,
    force: bool = False, say: Say = silent,
) -> BuiltEngine:  # fmt: skip
    """Build a TensorRT engine from an ONNX file, after comparing its graph with PyTorch.

    The options are those of `asvit-deploy build-engine`.

    Args:
        onnx: by default the one ONNX artefact of the current folder.
        buckets: "auto", "64,128,197" or those numbers.
        compact_at: "auto", "all", "3,6,9" or those numbers: blocks at which a dynamic engine's rows
            really leave; at other cuts they are hidden.
        target_sm: GPU generations, such as ("86", "120").
        say: gets status lines; TensorRT's progress goes with them on a terminal.

    Raises:
        UserError: bad input, options that do not go together, no such TensorRT, a build that
            fails, or an output that cannot be written or is there without `force`.
        CheckFailed: the graph does not agree with PyTorch; nothing was written.
    """
    _check_ranges(flavour, mode, batch, workspace, level, limit, skip_limit)
    path = _model(onnx)
    precision = _precision(fp16, bf16)
    if buckets is not None and mode != "bucketed":
        raise UserError("--buckets needs --mode bucketed")
    from asvit_deploy.engine.build import Options, refuse_misfits
    from asvit_deploy.runners.trt_flavour import find_flavour

    found = find_flavour(flavour)
    targets = (target_sm,) if isinstance(target_sm, (str, int)) else target_sm
    wanted = Options(
        precision, mode, batch, tuple(map(_capability, targets)), workspace, level,
        optional_path(plugin), embed_plugin, optional_path(layers), version_compatible,
        hardware_compatible, optional_path(images), limit, not no_check, _buckets(buckets),
        skip_limit, _blocks(compact_at),
    )  # fmt: skip
    refuse_misfits(found, wanted)
    return _build(path, optional_path(output), found, wanted, force, say)


def _check_ranges(
    flavour: str, mode: str, batch: Sequence[int] | None, workspace: int | None,
    level: int | None, limit: int, skip_limit: int,
) -> None:  # fmt: skip
    require_one_of("flavour", flavour, FLAVOURS)
    require_one_of("mode", mode, MODES)
    require_at_least(1, workspace=workspace, limit=limit)
    require_at_least(0, level=level, skip_limit=skip_limit)
    if level is not None and level > 5:
        raise UserError(f"level={level} cannot be used; pass a whole number from 0 to 5")
    if batch is not None:
        if not isinstance(batch, Sequence) or len(batch) != 3:
            raise UserError(
                f"batch={batch!r} is not the smallest, best and largest batch; pass three"
            )
        for size in batch:
            require_at_least(1, batch=size)


def _model(onnx: PathLike | None) -> Path:
    from asvit_deploy.artefacts.opening import artefacts_here

    if onnx is not None and (path := optional_path(onnx)):
        return path
    found = artefacts_here("onnx")
    if len(found) > 1:
        raise UserError(f"several artefacts here, name one: {', '.join(map(str, found))}")
    return found[0]


def _precision(fp16: bool, bf16: bool) -> Literal["fp16", "bf16"] | None:
    if fp16 and bf16:
        raise UserError("--fp16 and --bf16 exclude each other; pass one of them")
    return "fp16" if fp16 else "bf16" if bf16 else None


def _capability(value: str | int) -> str:
    text = str(value)
    if not (text.isdecimal() and 2 <= len(text) <= 3):
        raise UserError(f"target_sm {text!r} is not a compute capability such as 86 or 120")
    return text


def _buckets(given: str | Sequence[int] | None) -> tuple[int, ...] | None:
    from asvit_deploy.engine.buckets import parse_buckets

    if given is None:
        return None
    return parse_buckets(given if isinstance(given, str) else ",".join(map(str, given)))


def _blocks(given: str | Sequence[int] | None) -> Wanted:
    from asvit_deploy.engine.compactions import parse_blocks

    if given is None:
        return None
    return parse_blocks(given if isinstance(given, str) else ",".join(map(str, given)))


def _build(
    path: Path, output: Path | None, flavour: Flavour, wanted: Options, force: bool, say: Say
) -> BuiltEngine:
    """Claim what will be written, build, and say what came of it."""
    from asvit_deploy import sidecar
    from asvit_deploy.artefacts import bundle
    from asvit_deploy.claims import claimed
    from asvit_deploy.engine.bucketed import build_bucketed
    from asvit_deploy.engine.build import build_engine as build_plan
    from asvit_deploy.engine.build import default_output
    from asvit_deploy.engine.plugin import with_plugin
    from asvit_deploy.engine.source import open_source
    from asvit_deploy.files import check_writable

    target, layers = output or default_output(path, wanted), wanted.layers
    with contextlib.ExitStack() as claims:
        if wanted.mode == "bucketed":
            claims.enter_context(bundle.claimed(target, "bucketed", force))
        else:
            claims.enter_context(sidecar.claimed(target, "engine", force, path))
        if layers is not None:
            claims.enter_context(claimed(layers, force, lambda: check_writable(layers, force)))
        source = open_source(path)
        if source.artefact is None:
            say(f"{path} is not an artefact of ours: built as it is, compared with nothing")
        if source.needs_plugin and wanted.mode == "dynamic":
            wanted = with_plugin(wanted, flavour, say)
        build = build_bucketed if wanted.mode == "bucketed" else build_plan
        with _Bar(say) as bar:
            built = build(source, target, flavour, wanted, bar.update, say)
    _say_built(built, flavour.title, say)
    return BuiltEngine(target, built.fields, tuple(built.warnings))


class _Bar:
    """TensorRT's progress on a terminal's stderr."""

    def __init__(self, say: Say) -> None:
        self._hidden = hide_bar(say)

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(desc="build", disable=self._hidden, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, phase: str, done: int, of: int) -> None:
        self._bar.set_description(phase, refresh=False)
        self._bar.total, self._bar.n = of, done
        self._bar.refresh()


def _say_built(built: Built, title: str, say: Say) -> None:
    """What was built, and every warning that is not known to be harmless."""
    fields = built.fields
    for warning in built.warnings:
        say(f"TensorRT warns: {warning}")
    sms = ", ".join(f"SM{sm}" for sm in fields["target_sms"])
    say(
        f"{title} {fields['flavour_version']}: {fields['mode']}"
        + (f", {fields['precision']}" if fields["precision"] else "")
        + (f", for {sms}" if sms else "")
        + (f", buckets {', '.join(map(str, fields['buckets']))}" if "buckets" in fields else "")
        + f", {fields['plugin_layers']} plugin layers, {fields['build_seconds']} s"
    )
