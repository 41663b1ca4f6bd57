"""RandAugment by Pillow, with the ranges of timm's `rand-mM-mstd0.5-inc1` (DeiT's and AS-ViT's)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Colour = tuple[int, int, int]
# (picture, strength from 0 to 1, 1 or -1, colour of what comes from outside) -> picture
Operation = Callable[[Image.Image, float, int, Colour], Image.Image]

_FULL = 10.0  # the magnitude at which strength is 1
_NOISE = 0.5  # standard deviation of a magnitude
_ODDS = 0.5  # of an operation that was drawn to be carried out
_DRAWN = 2  # operations
_OUTSIDE = 0.45  # of a side, the longest way that a picture is moved


def _rotate(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    return picture.rotate(sign * 30 * strength, Image.Resampling.BILINEAR, fillcolor=fill)


def _moved(picture: Image.Image, matrix: tuple[float, ...], fill: Colour) -> Image.Image:
    """The pixel at (x, y) comes from (ax + by + c, dx + ey + f)."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
    )


def _shear_x(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    return _moved(picture, (1, sign * 0.3 * strength, 0, 0, 1, 0), fill)


def _shear_y(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    return _moved(picture, (1, 0, 0, sign * 0.3 * strength, 1, 0), fill)


def _translate_x(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    return _moved(picture, (1, 0, sign * _OUTSIDE * strength * picture.width, 0, 1, 0), fill)


def _translate_y(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    return _moved(picture, (1, 0, 0, 0, 1, sign * _OUTSIDE * strength * picture.height), fill)


def _posterize(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    """At full strength timm would leave no bit, which Pillow refuses."""
    return ImageOps.posterize(picture, max(1, 4 - int(4 * strength)))


def _solarize(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * strength))


def _solarize_add(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
    """Dark pixels grow lighter."""
    added = int(110 * strength)
    return picture.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """More, or less, of a property."""

    def change(picture: Image.Image, strength: float, sign: int, fill: Colour) -> Image.Image:
        return kind(picture).enhance(max(0.1, 1 + sign * 0.9 * strength))

    return change


def _plain(change: Callable[[Image.Image], Image.Image]) -> Operation:
    """What knows no strength."""
    return lambda picture, strength, sign, fill: change(picture)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _plain(ImageOps.autocontrast),
    "Equalize": _plain(ImageOps.equalize),
    "Invert": _plain(ImageOps.invert),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhanced(ImageEnhance.Color),
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
}
_ALL = tuple(OPERATIONS.values())


def randaugmented(
    picture: Image.Image, magnitude: float, fill: Colour, rng: np.random.Generator
) -> Image.Image:
    """Two operations out of fifteen, each carried out every second time; Cubuk et al. (2020).

    As timm's, but that pixels are interpolated bilinearly, where DeiT's options say bicubic.

    Args:
        picture: RGB.
        magnitude: M, 0 to 10.
        fill: the colour of pixels from outside the picture.
    """
    for _ in range(_DRAWN):
        operation, carried_out = _ALL[rng.integers(len(_ALL))], rng.random() < _ODDS
        strength = min(max(rng.normal(magnitude, _NOISE), 0.0), _FULL) / _FULL
        sign = 1 if rng.random() < 0.5 else -1
        if carried_out:
            picture = operation(picture, strength, sign, fill)
    return picture
