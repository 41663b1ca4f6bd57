"""Bundles: artefacts of several files in one folder, with a manifest that says what they are.

`manifest.json` carries what a sidecar carries, and the sha256 of every file beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from asvit_deploy import claims
from asvit_deploy.bounded import MOST_BYTES
from asvit_deploy.errors import UserError
from asvit_deploy.files import atomic_folder, check_parent, put, sha256
from asvit_deploy.sidecar import PATIENCE, read_signed, signed

MANIFEST = "manifest.json"
_LONGEST = 255  # bytes of a file's name
# Bundles by the ending of their folder's name.
KINDS = {".bucketed": "bucketed"}


def check_target(path: Path, kind: str, force: bool) -> None:
    """Find out before the work whether a bundle could be put at `path`.

    Raises:
        UserError: another ending than that of `kind`, a file or a folder that is there already
            (with `force` a bundle of this kind may be), or a place that cannot be written.
    """
    (suffix,) = (ending for ending, of in KINDS.items() if of == kind)
    if path.suffix != suffix:
        raise UserError(f"{path} cannot be written: give the folder a name in {suffix}")
    check_parent(path)
    if path.is_dir():
        if not force:
            raise UserError(f"{path} exists already; pass --force to replace it")
        _refuse_foreign(path, kind)
    elif path.exists():
        raise UserError(f"cannot write {path}: it is a file; name another folder")


def claimed(path: Path, kind: str, force: bool) -> AbstractContextManager[None]:
    """No other run makes a bundle at `path` meanwhile; `check_target` is asked at both ends.

    Raises:
        UserError: another run is making it, or `check_target` refuses.
    """
    return claims.claimed(path, force, lambda: check_target(path, kind, force))


def _refuse_foreign(path: Path, kind: str) -> None:
    """Raise UserError where replacing `path` would remove what this tool did not write."""
    remedy = "remove it, or name another folder"
    try:
        fields = _manifest(path)
    except UserError:
        raise UserError(f"{path} is not a folder that this tool made; {remedy}") from None
    ours = {MANIFEST, *fields["files"]}
    foreign = sorted(file.name for file in path.iterdir() if file.name not in ours)
    if fields["kind"] != kind or foreign:
        what = f"holds {foreign[0]}, which is no part of it" if foreign else f"is no {kind} one"
        raise UserError(f"{path} {what}; {remedy}")


def write(folder: Path, files: Mapping[str, bytes], fields: dict[str, Any]) -> dict[str, Any]:
    """Put a bundle in place, whole or not at all; one that is there is replaced.

    Within a claim without `force`, nothing is.

    Args:
        files: contents by plain file name.
        fields: what the manifest says; `files` is added.

    Returns:
        The manifest's fields.

    Raises:
        UserError: the place cannot be written, another run has a claim on it, or the caller's own
            claim says no.
    """
    fingerprints = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    fields = {**fields, "files": fingerprints}
    with (
        claims.claimed(folder, check=lambda: check_parent(folder), wait=PATIENCE),
        atomic_folder(folder) as temporary,
    ):
        for name, data in files.items():
            put(temporary / name, data)
        put(temporary / MANIFEST, signed(fields))
    return fields


def remove(folder: Path) -> None:
    """Take a bundle away, the manifest last; where there is none, nothing happens.

    Raises:
        UserError: it is not a folder that this tool made, or holds other files too.
    """
    if folder.is_dir():
        _refuse_foreign(folder, KINDS[folder.suffix])
        for name in (*_manifest(folder)["files"], MANIFEST):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    fields = read_signed(path, "manifest", folder.name, "kind", "files")
    files = fields["files"]
    if not isinstance(files, dict) or not all(
        _is_plain(name) and isinstance(digest, str) for name, digest in files.items()
    ):
        raise UserError(f"{path} names no plain files; make {folder.name} again")
    return fields


def _is_plain(name: str) -> bool:
    """Whether a file of this name can lie in the folder, beside the manifest."""
    size = len(name.encode(errors="replace"))
    plain = name.isprintable() and not set(name) & {"/", "\\"}
    return plain and 0 < size <= _LONGEST and name not in (".", "..", MANIFEST)


def read(folder: Path) -> dict[str, Any]:
    """The fields of a bundle's manifest, checked against its files.

    Raises:
        UserError: the folder, its manifest or a file of it is missing, unreadable, edited or of
            another schema.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; name a folder that this tool made")
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST}; name a folder that this tool made")
    fields = _manifest(folder)
    for file in (folder / name for name in fields["files"]):
        if not file.is_file():
            raise UserError(f"{file} is missing; make {folder.name} again")
    if (size := sum((folder / name).stat().st_size for name in fields["files"])) > MOST_BYTES:
        raise UserError(
            f"the files of {folder} have {size:,} bytes, more than the {MOST_BYTES:,} of any such "
            "folder; name another"
        )
    for name, expected in fields["files"].items():
        file = folder / name
        if sha256(file) != expected:
            raise UserError(f"{file} was changed (sha256 differs); make {folder.name} again")
    return fields
