"""What happens to training pictures after crop and mirror: RandAugment, erasing, mixing, repeats.

Every draw is seeded by a picture's number or by its pair's, so that a picture looks the same
whichever process makes it, and in whatever order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from asvit_deploy.data.randaugment import Colour, randaugmented
from asvit_deploy.errors import UserError

# Streams of draws, apart from one another and from the crops'.
_RANDAUGMENT, _ERASE, _MIX = 2, 3, 4
_ATTEMPTS = 10  # at a rectangle that lies within the picture


@dataclass(frozen=True)
class Augmentation:
    """What is done to training pictures beside crop and mirror; all of it off by default.

    Attributes:
        randaugment: magnitude on timm's scale, 0 to below 10 (the paper: 9); 0 is off. Two
            operations a picture, see `randaugment`.
        mixup: alpha of the Beta distribution of a pair's weights (the paper: 0.8); 0 is off.
        cutmix: alpha of the Beta distribution of the area that a pair exchanges (the paper: 1.0);
            0 is off. With both on, each pair takes either with even odds.
        erase: probability that a rectangle of a picture becomes noise (the paper: 0.25).
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

    def check_part(self, size: int, part: range) -> None:
        """Raise UserError where mixing would need a picture of another process."""
        if self.mixes and (part.start % 2 or (part.stop % 2 and part.stop != size)):
            raise UserError(
                f"mixup and cutmix mix pictures 2i and 2i+1, and a process has {part.start} to "
                f"{part.stop - 1} of a batch of {size}; make --batch-size an even number for each "
                "process"
            )

    def position(self, step: int, size: int, number: int) -> int:
        """Where picture `number` of batch `step` stands in the endless order of the pictures.

        So many pictures as there are copies follow one another, then their copies: copies are near
        enough for one process to decode them together, and none is mixed with its own.
        """
        several, block = self.repeats, self.repeats**2
        blocks, rest = divmod(size, block)
        different = blocks * several + min(several, rest)
        return step * different + number // block * several + number % several

    def changed(self, picture: Image.Image, fill: Colour, seed: int, number: int) -> Image.Image:
        """RandAugment, where it is on, by the draws of picture `number` of the run."""
        if not self.randaugment:
            return picture
        rng = np.random.default_rng((seed, _RANDAUGMENT, number))
        return randaugmented(picture, self.randaugment, fill, rng)

    def erase_from(self, image: Tensor, seed: int, number: int) -> None:
        """Erasing, where it is on, likewise; see `erase`."""
        if self.erase:
            erase(image, self.erase, np.random.default_rng((seed, _ERASE, number)))


NO_AUGMENTATION = Augmentation()


def erase(image: Tensor, probability: float, rng: np.random.Generator) -> None:
    """Fill a rectangle of 2-33 % of the area with noise, after Zhong et al. (2020), as DeiT does.

    Args:
        image: float32 [3, H, W], normalised; changed in place.
    """
    if rng.random() >= probability:
        return
    channels, height, width = image.shape
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.standard_normal((channels, h, w), np.float32)
            image[:, top : top + h, left : left + w] = torch.from_numpy(noise)
            return


def mixed(
    images: Tensor, labels: Tensor, classes: int, augmentation: Augmentation, seed: int, step: int,
    part: range,
) -> Tensor:  # fmt: skip
    """Mix pictures 2i and 2i+1 of a batch with one another: mixup (Zhang et al., 2018) or cutmix
    (Yun et al., 2019). The last picture of an odd batch stays as it is.

    Own lines in place of a library's mixer: those draw once or per picture from a running
    generator and mix across the whole batch, so that what a process gets would depend on how many
    there are. Here a pair's draw is seeded by (seed, step, i).

    Args:
        images, labels: [B, 3, H, W], changed in place, and int64 [B], the pictures `part` of batch
            `step`.

    Returns:
        Probabilities float32 [B, C].
    """
    soft = F.one_hot(labels, classes).float()
    for first in range(0, len(part) - 1, 2):
        rng = np.random.default_rng((seed, _MIX, step, part[first] // 2))
        own = _mix_pair(images[first], images[first + 1], augmentation, rng)
        pair = slice(first, first + 2)
        soft[pair] = own * soft[pair] + (1 - own) * soft[pair].flip(0)
    return soft


def _mix_pair(
    one: Tensor, other: Tensor, augmentation: Augmentation, rng: np.random.Generator
) -> float:
    """Mix two pictures [3, H, W] in place; the share of itself that each of them keeps."""
    cut = augmentation.cutmix > 0 and (augmentation.mixup == 0 or rng.random() < 0.5)
    alpha = augmentation.cutmix if cut else augmentation.mixup
    own = float(rng.beta(alpha, alpha))
    if not cut:
        before = one.clone()
        one.mul_(own).add_(other, alpha=1 - own)
        other.mul_(own).add_(before, alpha=1 - own)
        return own
    height, width = one.shape[1:]
    rows = _span(height, (1 - own) ** 0.5, rng)
    columns = _span(width, (1 - own) ** 0.5, rng)
    taken = one[:, rows, columns].clone()
    one[:, rows, columns] = other[:, rows, columns]
    other[:, rows, columns] = taken
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return 1 - area / (height * width)


def _span(side: int, share: float, rng: np.random.Generator) -> slice:
    """A part of a side around an even draw, cut off where it leaves the picture."""
    half, middle = round(side * share) / 2, int(rng.integers(side))
    return slice(max(0, round(middle - half)), min(side, round(middle + half)))
