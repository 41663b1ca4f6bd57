"""`asvit_deploy.load`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_path,
    given_facts,
    require_whole,
    say_load,
)
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from asvit_deploy.models.vit import ViT


def load(
    ckpt: PathLike,
    *,
    dense: bool = False,
    image_size: int | None = None,
    arch: str | None = None,
    ema: bool = False,
    mean: Channels | None = None,
    std: Channels | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    heads: int | None = None,
    activation: str | None = None,
    say: Say = silent,
) -> ViT:
    """A checkpoint's network: a torch module in eval mode, float32, on the CPU.

    It takes normalised pictures, float32 [B, 3, H, W], and returns their logits [B, C] and a trace
    with the rows that each stage left, `length` int64 [B] a stage, class token included. How its
    pictures are prepared says `config.preprocessing`; `data.images.preprocess` does it.

    Args:
        ckpt: a file of any format that `asvit-deploy export --ckpt` takes, or "default".
        dense: leave the thresholds out, so that every token stays.
        image_size: another size in pixels; the position embeddings are resized.
        arch: settles the architecture where the checkpoint fits several.
        ema: take the averaged weights of a training checkpoint.
        mean, std, crop_pct, interpolation, heads, activation: facts that weights cannot tell; by
            default they come from what lies beside or in the file, else from its architecture.
        say: gets a line on each such fact, and on what was left out.

    Raises:
        UserError: the file is missing, damaged, or holds no network that is known.
    """
    require_whole(image_size=image_size)
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    from asvit_deploy.checkpoints.load import build_model, load_checkpoint

    checkpoint = load_checkpoint(checkpoint_path(ckpt), image_size, arch, ema, known)
    say_load(checkpoint, say)
    return build_model(checkpoint, dense=dense)
