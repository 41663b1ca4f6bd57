"""Picture files without their EXIF, for those that it keeps from being opened."""

from __future__ import annotations

import re
import struct


def without_exif(data: bytes) -> bytes | None:
    """The same picture without its EXIF; None where the file is of another format, or has none.

    JPEG is not among the formats: a block of any content is passed over there as it is opened.
    """
    if data[4:8] == b"ftyp":
        return _avif(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def _avif(data: bytes) -> bytes | None:
    """Its Exif item by another name. The turn of such a picture is kept elsewhere."""
    renamed, count = re.subn(rb"(infe.{8})Exif", rb"\1skip", data, flags=re.DOTALL)
    return renamed if count else None


def _png(data: bytes) -> bytes | None:
    """Without its eXIf chunks, whose checksum may be wrong."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + struct.unpack(">I", data[at : at + 4])[0]
        if data[at + 4 : at + 8] != b"eXIf":
            kept.append(data[at:end])
        at = end
    whole = b"".join([*kept, data[at:]])
    return whole if len(whole) < len(data) else None


def _webp(data: bytes) -> bytes | None:
    """Without its EXIF chunk, whose length may be wrong, and the metadata behind it."""
    at = 12
    while at + 8 <= len(data):
        size = struct.unpack("<I", data[at + 4 : at + 8])[0]
        if data[at : at + 4] == b"EXIF":
            break
        at += 8 + size + size % 2
    else:
        return None
    cut = bytearray(data[:at])
    cut[4:8] = struct.pack("<I", at - 8)
    if cut[12:16] == b"VP8X":
        cut[20] &= ~0x0C & 0xFF  # the flags that announce EXIF and XMP
    return bytes(cut)
