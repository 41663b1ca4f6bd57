"""Parts that are done, made one file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from asvit_deploy.bulk.pictures import Part
from asvit_deploy.bulk.store import Store

LINES, EMBEDDINGS = ".jsonl", ".npz"


def join_lines(path: Path, store: Store, parts: Sequence[Part]) -> None:
    """JSON lines: one a picture, in the pictures' order."""
    with open(path, "wb") as file:
        for part in parts:
            file.writelines(store.lines(part))


def join_embeddings(
    path: Path, store: Store, parts: Sequence[Part], read: int, width: int, model: str
) -> None:
    """A .npz that `numpy.load` opens: `embeddings` float32 [P, C]; `images` [P], their names;
    `skipped` [S] and `reasons` [S]; and `model`, the sha256 of the ONNX file.

    Args:
        read: P, pictures that were not skipped.
        width: C.
    """
    images, skipped, reasons = list[str](), list[str](), list[str]()
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo("embeddings.npy"), "w", force_zip64=True) as file:
            shape = {"descr": "<f4", "fortran_order": False, "shape": (read, width)}
            np.lib.format.write_array_header_1_0(file, shape)
            for record in _records(store, parts):
                if "skipped" in record:
                    skipped.append(record["image"])
                    reasons.append(record["skipped"])
                else:
                    images.append(record["image"])
                    file.write(np.array(record["embedding"], "<f4").tobytes())
        named = {"images": images, "skipped": skipped, "reasons": reasons, "model": model}
        for name, values in named.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.array(values, dtype=np.str_), allow_pickle=False)


def _records(store: Store, parts: Sequence[Part]) -> Iterator[dict]:
    for part in parts:
        yield from map(json.loads, store.lines(part))
