"""How large a picture may be: decoding takes 600 MB at most, and its end is near.

C decoders are not stopped in the middle, so what they are given is bounded.
"""

from __future__ import annotations

import io
import struct

from PIL import IcoImagePlugin, Image

MAX_PIXELS = 100_000_000
MAX_FILE = 600_000_000  # bytes; 100 million pixels of three 16-bit values
_MEMORY = 600_000_000  # bytes: twice what the largest picture takes as 8-bit RGB
MOST_SCANNED = 1_500_000_000  # pixels of all scans of a JPEG; progressive ones have up to 14

# Bytes for each pixel while it is decoded, as measured with noise, and why.
_PLAIN = 6  # Pillow's own 4, and what a 16-bit or a palette's picture is made from
_CONVERTED = 8  # 4 from 4: other channels than red, green, blue; a picture that is turned
_BUFFERED = 12  # a JPEG of several scans: libjpeg keeps 2 for each channel until the last
_BY_FORMAT = {
    "AVIF": 24,  # planes of 16 bits, then RGBA three times
    "ICO": 12,  # picture and mask apart
    "JPEG2000": 30,  # 32 bits for each channel, twice; and the slowest: 2 million pixels a second
    "QOI": 8,  # decoded in Python, as a whole
    "TIFF": 12,  # a strip may be all of it: as the file has it, unpacked, and as a picture
    "WEBP": 24,  # the file twice, RGBA four times
}
_ONE_STEP = frozenset(("1", "L", "P", "RGB", "I;16", "I;16L", "I;16B", "I;16N"))


def most_pixels(picture: Image.Image, file: io.BufferedIOBase) -> tuple[int, str]:
    """How many pixels such a picture may have, and how messages call its kind.

    Args:
        picture: opened, and not loaded.
        file: the file that it is read from.
    """
    kind = f"{picture.format} picture"
    needs = _BY_FORMAT.get(picture.format or "", _PLAIN)
    if picture.format in ("JPEG", "MPO") and _buffered(picture, file):
        kind, needs = "progressive JPEG", _BUFFERED
    if needs < _CONVERTED and picture.mode not in _ONE_STEP:
        kind, needs = f"picture in {picture.mode}", _CONVERTED
    return _MEMORY // needs, kind


def most_turned() -> tuple[int, str]:
    """As `most_pixels`, of a picture that its orientation says to turn."""
    return _MEMORY // _CONVERTED, "picture that is to be turned"


def sizes(picture: Image.Image, file: io.BufferedIOBase) -> list[tuple[int, int]]:
    """Width and height; of an icon those of all that it holds too, which need not be as it says."""
    found = [picture.size]
    if isinstance(picture, IcoImagePlugin.IcoImageFile):
        place = file.tell()
        for entry in picture.ico.entry:
            file.seek(entry.offset)
            head = file.read(24)
            if len(head) == 24:
                png = head.startswith(b"\x89PNG")
                width, height = struct.unpack(*((">II", head[16:]) if png else ("<ii", head[4:12])))
                found.append((abs(width), abs(height) // (1 if png else 2)))  # a mask is below
        file.seek(place)
    return found


def _buffered(picture: Image.Image, file: io.BufferedIOBase) -> bool:
    """Whether a JPEG's first scan does not hold all channels in full; where that is not seen, so
    too."""
    if picture.info.get("progressive"):
        return True
    place, buffered = file.tell(), True
    file.seek(2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        length = int.from_bytes(head[2:], "big")
        if head[1] == 0xDA:
            buffered = file.read(1) != bytes([len(picture.getbands())])
            break
        file.seek(max(length - 2, 0), io.SEEK_CUR)
    file.seek(place)
    return buffered


def scans(file: io.BufferedIOBase) -> int:
    """How often a JPEG's pixels are gone through; each time may take two bytes of the file."""
    file.seek(0)
    count, last = 0, b""
    while part := file.read(1 << 20):
        count += part.count(b"\xff\xda") + (last + part[:1] == b"\xff\xda")
        last = part[-1:]
    file.seek(0)
    return count
