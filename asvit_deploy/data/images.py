"""Pictures as a network's input: preprocessing, sets of pictures, and the photographs at hand."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from PIL import Image, ImageOps

from asvit_deploy.data.decode import PictureError, decode_picture, load_picture
from asvit_deploy.data.listing import others, pictures_below
from asvit_deploy.data.skips import Skips
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig

__all__ = ["ImageSet", "View", "decode_picture", "load_picture", "open_images", "pixels_of",
           "preprocess", "thinned"]  # fmt: skip

_T = TypeVar("_T")

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def preprocess(picture: Image.Image, config: ArchConfig) -> np.ndarray:
    """An RGB picture as the network's input, float32 [3, H, W] with H = W = `config.image_size`.

    The shorter side is resized to `int(image_size / crop_pct)` (both sides, where the network's
    pictures are squashed), the centre cut out, and the result is (pixel / 255 - mean) / std. Sizes
    and offsets round as torchvision rounds them.
    """
    rules, size = config.preprocessing, config.image_size
    short = int(size / rules.crop_pct)
    width, height = picture.size
    if rules.crop_mode == "squash":
        width, height = short, short
    elif width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    picture = picture.resize((width, height), _FILTERS[rules.interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
    mean, std = np.asarray(rules.mean, np.float32), np.asarray(rules.std, np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def pixels_of(image: np.ndarray, config: ArchConfig) -> np.ndarray:
    """The opposite of `preprocess`: the crop that the network sees, uint8 [H, W, 3]."""
    rules = config.preprocessing
    mean, std = np.asarray(rules.mean)[:, None, None], np.asarray(rules.std)[:, None, None]
    values = np.clip((image * std + mean) * 255, 0, 255)
    return np.ascontiguousarray(np.rint(values).astype(np.uint8).transpose(1, 2, 0))


@dataclass(frozen=True)
class View:
    """A whole picture, or a square window of it.

    `zoom` is the window's side as a fraction of the picture's shorter side, None for the whole
    picture; `at` is the place between the left/top (0) and right/bottom (1) ends.
    """

    name: str
    path: Path
    zoom: float | None = None
    at: tuple[float, float] = (0.5, 0.5)
    flipped: bool = False

    def picture(self) -> Image.Image:
        """The pixels of this view, RGB."""
        if self.zoom is None and not self.flipped:
            return load_picture(self.path)
        picture = _load_cached(self.path)
        if self.zoom is not None:
            side = round(self.zoom * min(picture.size))
            left = round(self.at[0] * (picture.width - side))
            top = round(self.at[1] * (picture.height - side))
            picture = picture.crop((left, top, left + side, top + side))
        return ImageOps.mirror(picture) if self.flipped else picture


@functools.lru_cache(maxsize=24)
def _load_cached(path: Path) -> Image.Image:
    """Views of one picture come far apart; all the sample photographs together fit in here."""
    return load_picture(path)


class ImageSet(Sequence[np.ndarray]):
    """Pictures as inputs of one architecture, read when asked for.

    `set[i]` is float32 [3, H, W] or raises UserError; `set[a:b]` is a smaller set. `names` are
    unique; `source` is one line that says what these pictures are and how many were skipped.
    `loaded` and `readable` pass unreadable ones over, as far as `skips` allows.
    """

    def __init__(
        self,
        views: Iterable[View],
        source: str,
        config: ArchConfig,
        skips: Skips | None = None,
        passed: dict[str, int] | None = None,
    ) -> None:
        self.views = tuple(views)
        self.names = [view.name for view in self.views]
        self.config = config
        self.skips = Skips() if skips is None else skips
        self.passed_over = passed or {}
        self._source = source

    @property
    def source(self) -> str:
        """Where they come from, how many of how many, and what was skipped so far."""
        return ", ".join(filter(None, (self._source, self.skips.summary())))

    @property
    def skipped(self) -> list[str]:
        """Names of the pictures that were skipped so far."""
        return list(self.skips.reasons)

    @property
    def account(self) -> dict[str, Any]:
        """For JSON: how many were skipped and for which reasons, and what lies beside them."""
        return {
            "skipped": len(self.skips),
            "skipped_by_reason": self.skips.by_reason(),
            "passed_over": self.passed_over,
        }

    def __len__(self) -> int:
        return len(self.views)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> ImageSet: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | ImageSet:
        if isinstance(index, slice):
            return self._of(self.views[index])
        return preprocess(self.views[index].picture(), self.config)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def _of(self, views: Iterable[View]) -> ImageSet:
        return ImageSet(views, self._source, self.config, self.skips, self.passed_over)

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        """Float32 [B, 3, H, W] of the pictures at `indices`."""
        return np.stack([self[index] for index in indices])

    def loaded(self) -> tuple[list[np.ndarray], list[str]]:
        """The pictures that can be read, as float32 [3, H, W], and their names.

        Raises:
            UserError: more cannot be read than may be skipped, or none can.
        """
        read = list(self.inputs())
        return [image for _, image in read], [name for name, _ in read]

    def inputs(self) -> Iterator[tuple[str, np.ndarray]]:
        """As `loaded`, one after the other, each with its name in front."""
        for view, picture in self._reading():
            yield view.name, preprocess(picture, self.config)

    def readable(self) -> ImageSet:
        """The set without those that cannot be read. Each is read once now, where any may be
        skipped, and later again when it is asked for.

        Raises:
            UserError: as `loaded`.
        """
        return self._of([view for view, _ in self._reading()]) if self.skips.limit else self

    def _reading(self) -> Iterator[tuple[View, Image.Image]]:
        left = 0
        for view in self.views:
            try:
                picture = view.picture()
            except PictureError as error:
                self.skips.add(view.name, error)
                continue
            left += 1
            yield view, picture
        if not left:
            raise UserError(f"none of the pictures can be read: {self.source}")


def open_images(
    folder: Path | None,
    config: ArchConfig,
    limit: int | None = None,
    skip_limit: int = 0,
    say: Callable[[str], None] | None = None,
) -> ImageSet:
    """The pictures of a folder (with its subfolders, sorted by path) or of one file.

    More than `limit` pictures are thinned out evenly. Without a folder: real photographs that
    scikit-image carries, in colour first, several crops of each.

    Args:
        skip_limit: so many may be unreadable, see `ImageSet.loaded`.
        say: gets a line on what was passed over in the folder, and one on each that was skipped.

    Raises:
        UserError: `folder` does not exist, holds no picture or a folder that may not be read; a
            single file is no picture; `limit` is not positive; scikit-image's photographs are
            needed and missing.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the number of images must be at least 1, not {limit}")
    if folder is None:
        return _sample_photographs(config, limit)
    if folder.is_file():
        load_picture(folder)  # the one picture: refuse it now, not at its first use
        return ImageSet([View(folder.name, folder)], f"the picture {folder}", config)
    if not folder.is_dir():
        what = "is neither a folder nor a file" if folder.exists() else "does not exist"
        raise UserError(f"the image folder {folder} {what}; check the path")
    found = pictures_below(folder)
    if not found.names:
        rest = found.passed.summary()
        raise UserError(
            f"the folder {folder} holds no picture that this Pillow reads"
            + (f", only {rest}" if rest else "")
            + "; put some into it, such as .jpg or .png"
        )
    for line in found.passed.lines(folder) if say else ():
        say(line)  # type: ignore[misc]
    taken = thinned(found.names, limit)
    views = [View(name, folder / name) for name in taken]
    of = "" if len(taken) == len(found.names) else f" of {len(found.names)}"
    passed = found.passed.counts()
    source = ", ".join(filter(None, (f"{len(taken)}{of} pictures in {folder}", others(passed))))
    return ImageSet(views, source, config, Skips(skip_limit, say), passed)


def thinned(items: Sequence[_T], limit: int | None) -> list[_T]:
    """All of them, or exactly `limit` of them spread evenly, in their order."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


# Photographs in the wheel of scikit-image (those it would download are not among them).
_COLOUR = (
    "chelsea.png",
    "coffee.png",
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "ihc.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_right.png",
)
_GREY = ("camera.png", "coins.png", "moon.png", "brick.png", "grass.png", "gravel.png", "cell.png")
_PLACES = {
    "centre": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "bottomright": (1.0, 1.0),
    "topright": (1.0, 0.0),
    "bottomleft": (0.0, 1.0),
}


def _views(paths: Sequence[Path]) -> Iterator[View]:
    """Every crop of every photograph; any first part of it is spread evenly over them."""
    crops: list[tuple[str, float | None, tuple[float, float]]] = [("", None, (0.5, 0.5))]
    for place, at in _PLACES.items():
        crops += [(f"-{zoom:.0%}-{place}".replace("%", ""), zoom, at) for zoom in (0.75, 0.5)]
    for flipped in (False, True):
        for suffix, zoom, at in crops:
            for path in paths:
                name = f"{path.stem}{suffix}{'-flipped' if flipped else ''}"
                yield View(name, path, zoom, at, flipped)


def _sample_photographs(config: ArchConfig, limit: int | None) -> ImageSet:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the sample photographs come with scikit-image, which is not installed; "
            'run "pip install scikit-image" or name a folder of pictures with --images'
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    colour, grey = ([data / name for name in names] for names in (_COLOUR, _GREY))
    colour = [path for path in colour if path.is_file()]
    grey = [path for path in grey if path.is_file()]
    if not colour:
        raise UserError(
            f"scikit-image in {data.parent} carries no photographs; reinstall it with pip or name "
            "a folder of pictures with --images"
        )
    views = [*_views(colour), *_views(grey)][:limit]
    photographs = len({view.path for view in views})
    source = f"{photographs} photographs that scikit-image carries, {len(views)} crops"
    return ImageSet(views, source, config)
