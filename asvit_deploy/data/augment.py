"""What happens to training pictures after crop and mirror: RandAugment, erasing, mixing, repeats.

Every draw is seeded by a picture's number or by its pair's, so that a picture looks the same
whichever process makes it, and in whatever order.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install

# Streams of draws, apart from one another and from the crops'.
_RANDAUGMENT, _ERASE, _MIX = 2, 3, 4

# Sides of a shear as kornia counts them: its magnitude times 180 is an angle in degrees, and timm's
# 0.3 is that angle's tangent.
_SHEAR = float(np.degrees(np.arctan(0.3)) / 180)
# Operation, and its parameter at kornia's magnitudes 0 and 30 (or -30 and 30, where it has a sign).
_POLICY: list[list[tuple[str, float, float]]] = [
    [("auto_contrast", 0.0, 1.0)],
    [("equalize", 0.0, 1.0)],
    [("invert", 0.0, 1.0)],
    [("rotate", -30.0, 30.0)],
    [("posterize", 1.0, 4.0)],
    [("solarize", 0.0, 1.0)],
    [("solarize_add", 0.0, 0.43)],
    [("color", 1.0, 1.9)],
    [("contrast", 1.0, 1.9)],
    [("brightness", 1.0, 1.45)],
    [("sharpness", 1.0, 1.9)],
    [("shear_x", -_SHEAR, _SHEAR)],
    [("shear_y", -_SHEAR, _SHEAR)],
    [("translate_x", -0.45, 0.45)],
    [("translate_y", -0.45, 0.45)],
]


@dataclass(frozen=True)
class Augmentation:
    """What is done to training pictures beside crop and mirror; all of it off by default.

    Attributes:
        randaugment: magnitude on timm's scale, 0 to below 10 (the paper: 9); 0 is off. Two
            operations a picture, see `randaugmented`.
        mixup: alpha of the Beta distribution of a pair's weights (the paper: 0.8); 0 is off.
        cutmix: alpha of the Beta distribution of the area that a pair exchanges (the paper: 1.0);
            0 is off. With both on, each pair takes either with even odds.
        erase: probability that a rectangle of a picture is blanked (the paper: 0.25).
        repeats: how often each picture stands in a batch (the paper, as DeiT: 3), every time with
            an augmentation of its own.
    """

    randaugment: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0
    repeats: int = 1

    @property
    def mixes(self) -> bool:
        """Whether labels are probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def check_installed(self) -> None:
        """Raise UserError where kornia is needed and missing: at the start, not in a worker."""
        if self.randaugment or self.erase:
            _kornia()

    def check_part(self, size: int, part: range) -> None:
        """Raise UserError where mixing would need a picture of another process."""
        if self.mixes and (part.start % 2 or (part.stop % 2 and part.stop != size)):
            raise UserError(
                f"mixup and cutmix mix pictures 2i and 2i+1, and a process has {part.start} to "
                f"{part.stop - 1} of a batch of {size}; make --batch-size an even number for each "
                "process"
            )

    def position(self, step: int, size: int, number: int) -> int:
        """Where picture `number` of batch `step` stands in the endless order of the pictures."""
        different = -(-size // self.repeats)
        return step * different + number % different


NO_AUGMENTATION = Augmentation()


def _kornia() -> Any:
    try:
        import kornia.augmentation.auto
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "kornia":
            raise
        raise UserError(
            "RandAugment and random erasing need kornia, which is not installed; "
            f"run: {pip_install('kornia')}"
        ) from error
    return kornia.augmentation


# kornia draws from torch's generator, of which a process has one, and its operations keep their
# last parameters in themselves: one picture at a time, whoever asks.
_drawing = threading.Lock()


def _renew_lock() -> None:
    """A fork may come while another thread draws, and that thread is not in the child."""
    global _drawing
    _drawing = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """torch's CPU generator seeded for the block, and as it was after it."""
    with _drawing, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the generators of GPUs too, and leave them so.
        torch.random.default_generator.manual_seed(_seed(*key))
        yield


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=4)
def _randaugment(magnitude: float) -> Any:
    return _kornia().auto.RandAugment(n=2, m=3 * magnitude, policy=_POLICY)


@functools.lru_cache(maxsize=1)
def _erasing() -> Any:
    return _kornia().RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 3.3), p=1.0)


@torch.no_grad()
def randaugmented(images: Tensor, magnitude: float, seed: int, numbers: Sequence[int]) -> Tensor:
    """Two operations on each picture, after Cubuk et al. (2020), by kornia.

    The parameters at full magnitude are timm's where kornia has the same operation. What differs
    from timm's `rand-m9-mstd0.5-inc1`, with which DeiT and AS-ViT were trained: the magnitude has
    no noise; an operation that was drawn is always carried out (there, every second time), and the
    second is never the first again; colour, contrast and sharpness only grow; kornia's contrast
    scales the pixels, as timm's brightness does, and its brightness adds to them; solarize takes a
    higher threshold at a higher magnitude; pixels from outside the picture are black.

    Args:
        images: float32 [B, 3, H, W] between 0 and 1.
        magnitude: above 0 and below 10.
        numbers: those of the B pictures in the run; with `seed` they decide every draw.

    Returns:
        float32 [B, 3, H, W] between 0 and 1.
    """
    changed, operations = [], _randaugment(magnitude)
    for image, number in zip(images, numbers):
        with _seeded(seed, _RANDAUGMENT, number):
            changed.append(operations(image[None])[0].clamp(0, 1))
    return torch.stack(changed)


@torch.no_grad()
def erased(images: Tensor, probability: float, seed: int, numbers: Sequence[int]) -> Tensor:
    """A rectangle of 2-33 % of the area set to zero, after Zhong et al. (2020), by kornia.

    On normalised pictures zero is the mean colour; timm's `pixel` mode, DeiT's, fills in noise.

    Args:
        images: float32 [B, 3, H, W], normalised.
        numbers: see `randaugmented`.
    """
    changed, erasing = [], _erasing()
    for image, number in zip(images, numbers):
        with _seeded(seed, _ERASE, number):
            hit = torch.rand(()).item() < probability
            changed.append(erasing(image[None])[0] if hit else image)
    return torch.stack(changed)


def mixed(
    images: Tensor, labels: Tensor, classes: int, augmentation: Augmentation, seed: int, step: int,
    part: range,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pictures 2i and 2i+1 of a batch mixed with one another: mixup (Zhang et al., 2018) or cutmix
    (Yun et al., 2019). The last picture of an odd batch stays as it is.

    Own lines in place of a library's mixer: those draw once or per picture from a running
    generator and mix across the whole batch, so that what a process gets would depend on how many
    there are. Here a pair's draw is seeded by (seed, step, i).

    Args:
        images, labels: [B, 3, H, W] and int64 [B], the pictures `part` of batch `step`.

    Returns:
        Images of the same shape, and probabilities float32 [B, C].
    """
    images, soft = images.clone(), F.one_hot(labels, classes).float()
    for first in range(0, len(part) - 1, 2):
        pair = slice(first, first + 2)
        rng = np.random.default_rng((seed, _MIX, step, part[first] // 2))
        images[pair], own = _pair_mixed(images[pair], augmentation, rng)
        soft[pair] = own * soft[pair] + (1 - own) * soft[pair].flip(0)
    return images, soft


def _pair_mixed(
    images: Tensor, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, float]:
    """Two pictures [2, 3, H, W] and the share of itself that each of them keeps."""
    cut = augmentation.cutmix > 0 and (augmentation.mixup == 0 or rng.random() < 0.5)
    alpha = augmentation.cutmix if cut else augmentation.mixup
    own = float(rng.beta(alpha, alpha))
    if not cut:
        return own * images + (1 - own) * images.flip(0), own
    height, width = images.shape[2:]
    rows = _span(height, (1 - own) ** 0.5, rng)
    columns = _span(width, (1 - own) ** 0.5, rng)
    other = images.flip(0)
    images = images.clone()
    images[:, :, rows, columns] = other[:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return images, 1 - area / (height * width)


def _span(side: int, share: float, rng: np.random.Generator) -> slice:
    """A part of a side around an even draw, cut off where it leaves the picture."""
    half, middle = round(side * share) / 2, int(rng.integers(side))
    return slice(max(0, round(middle - half)), min(side, round(middle + half)))
