"""Makes picture folders and WebDataset shards for tests, by Pillow and the standard library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, size: tuple[int, int] = (50, 40)) -> bytes:
    """A picture of smooth colour blobs, so that where it was cut shows."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def picture_folder(root: Path, classes: Sequence[str] = ("cat", "dog"), count: int = 6) -> Path:
    """`count` pictures in a folder for each class; picture i of class c has seed 1000 c + i."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.png").write_bytes(png(1000 * label + i))
    return root


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT):
    """A tar file of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(entries: Sequence[tuple[str, bytes, int]]) -> list[tuple[str, bytes]]:
    """Members for (key, picture, label)."""
    found: list[tuple[str, bytes]] = []
    for key, picture, label in entries:
        found += [(f"{key}.png", picture), (f"{key}.cls", str(label).encode())]
    return found


def shards_of(folder: Path, target: Path, per_shard: int = 4) -> Path:
    """Shards of a picture folder, in the order in which the folder is read."""
    classes = sorted(path.name for path in folder.iterdir())
    entries = [
        (f"{name}_{path.stem}", path.read_bytes(), label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
    ]
    for start in range(0, len(entries), per_shard):
        shard = target / f"{start // per_shard:05}.tar"
        write_tar(shard, samples(entries[start : start + per_shard]))
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return target
