"""Drawings of `visualize` for the page: their panels, smaller, as data in the page itself."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path

from asvit_deploy.drawing.figure import panels_of
from asvit_deploy.files import no_link
from asvit_deploy.page.facts import Picture

SIDE = 192  # pixels of a panel at most, which the page shows at half of that or somewhat more
_QUALITY = 80
_MOST_PIXELS = 40_000_000  # of a drawing: thirty panels of 1,000 x 1,000 pixels
_MOST_BYTES = 80_000_000


@dataclass(frozen=True)
class Embedded:
    """A picture's panels as `data:` addresses, each with its caption's two lines."""

    picture: Picture
    panels: tuple[tuple[str, str, str], ...]

    @property
    def size(self) -> int:
        return sum(len(address) for address, _, _ in self.panels)


def embedded(picture: Picture, folder: Path | None) -> Embedded | str:
    """The panels of a drawing, or in a few words why there are none."""
    if folder is None:
        return "which folder it lies in is not known"
    try:
        # Not by a link: it may lead anywhere.
        with open(folder / picture.file, "rb", opener=_no_wait) as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if len(data) > _MOST_BYTES:
        return "it is too large"
    found = _panels(data, len(picture.panels))
    if isinstance(found, str):
        return found
    return Embedded(picture, tuple((address, *caption)
                                   for address, caption in zip(found, picture.panels)))  # fmt: skip


def _no_wait(path: str, flags: int) -> int:
    return no_link(path, flags | os.O_NONBLOCK)


def _panels(data: bytes, count: int) -> list[str] | str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as drawing:
            boxes = panels_of(drawing.size, count)
            if boxes is None or drawing.width * drawing.height > _MOST_PIXELS:
                return f"it is no drawing of {count} panels"
            whole = drawing.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"it is no whole PNG ({type(error).__name__})"
    return [_address(whole.crop(box)) for box in boxes]


def _address(panel: object) -> str:
    from PIL import Image

    assert isinstance(panel, Image.Image)
    panel.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    panel.save(file, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
