"""`asvit_deploy.export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_files,
    checkpoint_path,
    given_facts,
    optional_path,
    require_at_least,
    require_one_of,
    require_whole,
    say_load,
)
from asvit_deploy.api.methods import with_method
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asvit_deploy.parity import Parity

_PICTURES = 16  # to compare on
_INT8_PICTURES = 32  # half of them to quantise by


@dataclass(frozen=True)
class Exported:
    """An ONNX file that agrees with PyTorch.

    Attributes:
        output: the file; its sidecar lies beside it.
        pictures: what the comparison ran on.
        parity: how it went, by the size of the batches, such as "batch 1".
    """

    output: Path
    pictures: str
    parity: dict[str, Parity]


def export(
    ckpt: PathLike, *, output: PathLike | None = None, image_size: int | None = None,
    arch: str | None = None, method: str | None = None, budget: float | None = None,
    cuts: Sequence[int] | None = None, max_kept: int | None = None,
    batch: Literal["1", "dynamic", "packed"] = "1",
    ops: Literal["auto", "custom", "standard"] = "auto", opset: int | None = None,
    stage_outputs: bool = False, dense: bool = False,
    int8: Literal["dynamic", "static"] | None = None, ema: bool = False,
    mean: Channels | None = None, std: Channels | None = None, crop_pct: float | None = None,
    interpolation: str | None = None, heads: int | None = None, activation: str | None = None,
    images: PathLike | None = None, skip_limit: int = 0, classes: PathLike | None = None,
    force: bool = False, say: Say = silent,
) -> Exported:  # fmt: skip
    """Write one ONNX file and its sidecar, after comparing it with PyTorch.

    Its input `images` is float32 [B, 3, H, W], normalised, B being 1 or any number, see `batch`;
    the options are those of `asvit-deploy export`.

    Args:
        method: for dense weights, a method that keeps as many tokens of every picture, see
            `reduction.methods.RANKED`; else the checkpoint's own.
        budget, cuts: of that method: MACs as a fraction of the dense ones (0.65), and the blocks at
            which tokens leave.
        max_kept: of thresholds, the most rows that any picture keeps behind the last cut.
        int8: int8 linear layers of a file for one picture, rounded by its own ranges ("dynamic",
            for CPUs) or by those of pictures seen before ("static": QuantizeLinear and
            DequantizeLinear).
        say: gets a line on every fact that was taken or assumed, and on the comparison.

    Raises:
        UserError: bad input, or an output that cannot be written or is there without `force`.
        CheckFailed: the graph does not agree with PyTorch; nothing was written.
    """
    require_one_of("batch", batch, ("1", "dynamic", "packed"))
    require_one_of("ops", ops, ("auto", "custom", "standard"))
    if int8 is not None:
        require_one_of("int8", int8, ("dynamic", "static"))
        if batch != "1":
            raise UserError(
                "--int8 makes files of --batch 1: in a batch, ranges of one picture would round "
                "the others; leave --batch or --int8 out"
            )
        if ops == "custom":
            raise UserError(
                "--int8 runs the model to measure it, and --ops custom leaves out the function "
                "that runs it; take --ops auto or standard"
            )
    require_at_least(0, skip_limit=skip_limit)
    require_whole(image_size=image_size, opset=opset)
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    names, target = optional_path(classes), optional_path(output)
    from asvit_deploy import sidecar
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.classes.network import named, of_checkpoint
    from asvit_deploy.data.images import open_images
    from asvit_deploy.exporting.export import default_output, require_adaptive
    from asvit_deploy.exporting.export import export as write_checked
    from asvit_deploy.exporting.to_onnx import OPSET, check_opset
    from asvit_deploy.runners.onnx_runtime import import_onnxruntime

    import_onnxruntime()
    check_opset(opset := OPSET if opset is None else opset)
    place = checkpoint_path(ckpt, say)
    checkpoint = load_checkpoint(place, image_size, arch, ema, known)
    checkpoint = named(checkpoint, of_checkpoint(checkpoint, names, say))
    if dense and (method, budget, cuts, max_kept) != (None,) * 4:
        raise UserError("--dense has no method; drop it, or --method and what goes with it")
    checkpoint = with_method(checkpoint, method, budget, cuts, max_kept)
    if not dense:
        require_adaptive(checkpoint)
    target = target or default_output(place, dense, int8 is not None)
    config, kind = checkpoint.config, "dense" if dense else "adaptive"
    with sidecar.claimed(target, "onnx", force, *checkpoint_files(place), names):
        count = _PICTURES if int8 is None else _INT8_PICTURES
        pictures = open_images(optional_path(images), config, count, skip_limit, say)
        say_load(checkpoint, say)
        say(f"{place}: {kind} {config.name}, {config.image_size} px ({checkpoint.format})")
        parity = write_checked(
            checkpoint, target, pictures, batch, ops, dense, stage_outputs, ema, opset, int8, say
        )
    for name, result in parity.items():
        kept = ", ".join(f"{k:.1f}" for k in result.mean_kept)
        say(
            f"agrees with PyTorch at {name} on {result.images} images ({pictures.source})"
            + (f"; kept tokens per stage: {kept} of {config.image_tokens}" if kept else "")
        )
    return Exported(target, pictures.source, parity)
