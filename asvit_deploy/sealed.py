"""Files that carry a digest of themselves at their end, so that damage is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from asvit_deploy.bounded import open_regular
from asvit_deploy.files import sha256

SEAL = 32  # bytes of a digest at a file's end


def seal(path: Path) -> None:
    """Append to a file a digest of its bytes, for `check_seal`."""
    digest = bytes.fromhex(sha256(path))
    with open(path, "ab") as file:
        file.write(digest)


def check_seal(path: Path) -> None:
    """Compare a file with the digest that `seal` appended.

    Raises:
        ValueError: they differ.
    """
    size, digest = path.stat().st_size - SEAL, hashlib.sha256()
    with open_regular(path) as file:
        for place in range(0, size, 1 << 20):
            digest.update(file.read(min(1 << 20, size - place)))
        if file.read() != digest.digest():
            raise ValueError(f"{path} was damaged after it was written")
