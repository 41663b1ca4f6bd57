"""`asvit_deploy.load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_path,
    given_facts,
    require_whole,
    say_load,
)
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from torch import nn

    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.models.vit import ViT


def load(
    ckpt: PathLike | nn.Module | Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
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

    It takes normalised pictures, float32 [B, 3, H, W], and returns their logits (or, without a
    head that tells classes apart, an embedding) [B, C] and a trace with the rows that each stage
    left, `length` int64 [B] a stage, class token included. How its pictures are prepared says
    `config.preprocessing`; `data.images.preprocess` does it. `save` writes it as a checkpoint.

    Args:
        ckpt: a file, a folder or a name that `asvit-deploy export --ckpt` takes, or "default"; a
            module of timm's or transformers' with a ViT; or a state dict of one. Weights in memory
            are copied.
        config: what `config.json` says, of weights in memory; by default a module's own
            (`config`, or timm's `pretrained_cfg`).
        preprocessor: what `preprocessor_config.json` says, of weights in memory, as
            `image_processor.to_dict()` gives it.
        dense: leave the thresholds out, so that every token stays.
        image_size: another size in pixels; the position embeddings are resized.
        arch: settles the architecture where the checkpoint fits several.
        ema: take the averaged weights of a training checkpoint.
        mean, std, crop_pct, interpolation, heads, activation: facts that weights cannot tell; by
            default they come from what lies beside or in the file, else from its architecture.
        say: gets a line on each such fact, and on what was left out.

    Raises:
        UserError: the file is missing, damaged, or holds no network that is known; or `config` or
            `preprocessor` are given for a file, or are none.
    """
    require_whole(image_size=image_size)
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    from asvit_deploy.checkpoints.load import build_model

    if isinstance(ckpt, (str, os.PathLike)):
        checkpoint = _of_path(ckpt, config, preprocessor, image_size, arch, ema, known, say)
    else:
        checkpoint = _of_memory(ckpt, config, preprocessor, image_size, arch, ema, known, say)
    say_load(checkpoint, say)
    return build_model(checkpoint, dense=dense)


def _of_path(
    ckpt: PathLike, config: Any, preprocessor: Any, image_size: int | None, arch: str | None,
    ema: bool, known: Given, say: Say,
) -> Checkpoint:  # fmt: skip
    if config is not None or preprocessor is not None:
        raise UserError(
            f"config and preprocessor are for weights in memory; for {os.fspath(ckpt)} put "
            "config.json and preprocessor_config.json beside the weights"
        )
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.classes.network import named, of_checkpoint

    checkpoint = load_checkpoint(checkpoint_path(ckpt, say), image_size, arch, ema, known)
    # What lies beside the checkpoint may not lie beside what is saved of it.
    return named(checkpoint, of_checkpoint(checkpoint, None, say, assume=False))


def _of_memory(
    ckpt: Any, config: Any, preprocessor: Any, image_size: int | None, arch: str | None,
    ema: bool, known: Given, say: Say,
) -> Checkpoint:  # fmt: skip
    from asvit_deploy.checkpoints import memory
    from asvit_deploy.checkpoints.load import load_state
    from asvit_deploy.classes.name_files import Unusable, names_in_config
    from asvit_deploy.classes.network import BESIDE, ClassNames, named

    held = memory.held(ckpt, config, preprocessor)
    checkpoint = load_state(held.state, held.name, held.beside, image_size, arch, ema, known)
    try:
        names = names_in_config(held.config) if held.config else None
    except Unusable as error:
        say(f"{error}: its class names are not used")
        return checkpoint
    if names is None or len(names) != checkpoint.config.num_classes:
        return checkpoint
    return named(checkpoint, ClassNames(tuple(names), BESIDE))
