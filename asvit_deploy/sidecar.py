"""Sidecars: `FILE.json` beside `FILE`, which says what the file is and where it came from.

A sidecar carries the sha256 of its artefact and a digest of its own fields, so a file that was
replaced and a sidecar that was edited are both noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

from asvit_deploy import __version__, claims
from asvit_deploy.bounded import MOST_BYTES, MOST_ONNX, MOST_TEXT, parse_json, read_bounded
from asvit_deploy.errors import UserError, shortened
from asvit_deploy.files import atomic_together, check_parent, check_writable, put, sha256

SCHEMA = 1
PATIENCE = 10.0  # seconds that a write without a claim of its own waits for another run's
_BETWEEN = 0.05  # seconds, far more than two renames take
# Artefacts by the ending of their file name.
KINDS = {".onnx": "onnx", ".engine": "engine", ".safetensors": "checkpoint"}


def sidecar_path(artefact: Path) -> Path:
    """`as_deit_s.onnx` -> `as_deit_s.onnx.json`.

    Raises:
        UserError: a path without a name, such as the current folder.
    """
    if not artefact.name:
        raise UserError(f"{artefact} names no file; give it a name")
    return artefact.with_name(artefact.name + ".json")


def check_target(path: Path, kind: str, force: bool, *sources: Path | None) -> None:
    """Find out before the work whether an artefact and its sidecar could be put at `path`.

    Args:
        kind: a value of `KINDS`; `find` knows artefacts by the ending that goes with it.
        sources: the work's own inputs, never to be replaced.

    Raises:
        UserError: another ending than that of `kind`, or `files.check_writable` refuses the
            artefact or the sidecar.
    """
    (suffix,) = (ending for ending, of in KINDS.items() if of == kind)
    if path.suffix != suffix and not path.is_dir():
        noun = "ONNX file" if kind == "onnx" else kind
        raise UserError(f"{path} cannot be written: give the {noun} a name in {suffix}")
    for file in (path, sidecar_path(path)):
        check_writable(file, force, *sources)


def claimed(
    path: Path, kind: str, force: bool, *sources: Path | None
) -> AbstractContextManager[None]:
    """No other run makes an artefact at `path` meanwhile; `check_target` is asked at both ends.

    Raises:
        UserError: another run is making it, or `check_target` refuses.
    """
    return claims.claimed(path, force, lambda: check_target(path, kind, force, *sources))


def _digest(fields: dict[str, Any]) -> str:
    rest = {key: value for key, value in fields.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def provenance(libraries: Iterable[str] = ("torch", "onnx", "onnxscript")) -> dict[str, Any]:
    """What made an artefact: this tool, its libraries, the command."""
    versions = {}
    for name in libraries:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "tool": f"asvit-deploy {__version__}",
        "libraries": versions,
        "python": platform.python_version(),
        "command": command_line(),
    }


def command_line() -> str:
    """What was called, as a shell would take it again."""
    return shlex.join([_program(Path(sys.argv[0])), *sys.argv[1:]])


def _program(path: Path) -> str:
    """What was called; `python -m asvit_deploy` has the name of a file that says nothing."""
    return "asvit-deploy" if path.name == "__main__.py" else path.name


def source_of(path: Path, **more: Any) -> dict[str, Any]:
    """The file that an artefact was made from, as `reference.source_file` looks for it.

    `path` is the file itself and `given` the name that it was given by, which may be a link: a
    hub's cache links `model.safetensors` to a file that is called by its digest.
    """
    return {
        "path": str(path.resolve()),
        "given": os.path.abspath(path),
        "size": path.stat().st_size,
        "sha256": sha256(path),
        **more,
    }


def write(artefact: Path, data: bytes, fields: dict[str, Any]) -> None:
    """Put an artefact and its sidecar in place, each whole or not at all.

    Two files take two renames, the artefact's first. A process that is killed between them leaves
    a new artefact beside an old sidecar or none: `read` refuses that pair by its sha256, and the
    next `write` puts that right. Of several writers at once the last one's pair stays; within a
    claim without `force` nothing is replaced.

    Raises:
        UserError: the folder cannot be written, another run has a claim on the artefact, or the
            caller's claim says no.
    """
    text = signed({**fields, "sha256": hashlib.sha256(data).hexdigest()})
    with (
        claims.claimed(artefact, check=lambda: check_parent(artefact), wait=PATIENCE),
        atomic_together(artefact, sidecar_path(artefact)) as (file, sidecar),
    ):
        put(file, data)
        put(sidecar, text)


def read(artefact: Path) -> dict[str, Any]:
    """The fields of an artefact's sidecar, checked against the artefact.

    Raises:
        UserError: the artefact or its sidecar is missing, unreadable, edited, or of a newer schema,
            or they do not belong together.
    """
    if artefact.is_dir():
        raise UserError(f"{artefact} is a folder; name a file in it that this tool made")
    path = sidecar_path(artefact)
    while True:
        if not artefact.is_file():
            raise UserError(f"{artefact} does not exist; name an artefact that this tool made")
        if not path.is_file():
            raise UserError(f"{artefact} has no sidecar {path.name} beside it; make it again")
        before = _identity(artefact, path)
        fields = read_signed(path, "sidecar", artefact.name, "sha256")
        most = MOST_ONNX if artefact.suffix == ".onnx" else MOST_BYTES
        if fields["sha256"] == sha256(artefact, most):
            return fields
        time.sleep(_BETWEEN)  # a writer may stand between its two renames
        if _identity(artefact, path) == before:
            raise UserError(f"{path} does not belong to {artefact} (sha256 differs); make it again")


def _identity(*paths: Path) -> list[tuple[int, ...]]:
    """What another file in the same place has not."""
    found = [path.stat() for path in paths if path.exists()]
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]


def describes(artefact: Path, kind: str) -> bool:
    """Whether there is a sidecar of ours, whole, for an artefact of this kind at that path."""
    path = sidecar_path(artefact)
    try:
        return path.is_file() and read_signed(path, "sidecar", "", "sha256").get("kind") == kind
    except UserError:
        return False


def signed(fields: dict[str, Any], indent: int | None = 2) -> str:
    """The fields as JSON, with the schema and a digest of them all.

    Args:
        indent: as `json.dumps`; None keeps long lists of numbers short.

    Raises:
        UserError: they are too long to be read again.
    """
    fields = {"schema": SCHEMA, **fields}
    text = json.dumps({**fields, "digest": _digest(fields)}, indent=indent) + "\n"
    if len(text) > MOST_TEXT:  # which `read_signed` would refuse
        raise UserError(
            f"what is to be said of the file takes {len(text):,} bytes, more than {MOST_TEXT:,}; "
            "shorten the class names"
        )
    return text


def read_signed(path: Path, noun: str, name: str, *needed: str) -> dict[str, Any]:
    """What `signed` wrote.

    Args:
        noun, name: how messages call the file and what it describes.
        needed: fields that must be there.

    Raises:
        UserError: it is unreadable, not ours, edited, or of another schema.
    """
    data = read_bounded(path, MOST_TEXT, noun)
    try:
        fields = parse_json(data)
        schema, digest, *_ = (fields[key] for key in ("schema", "digest", *needed))
        own = _digest(fields)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not a {noun} of this tool; make {name} again") from None
    if type(schema) is not int or schema != SCHEMA:
        raise UserError(
            f"{path} has schema {shortened(schema, 40)}, this version reads {SCHEMA}; update the "
            "tool"
        )
    if digest != own:
        raise UserError(f"{path} was edited after it was written; make {name} again")
    return fields


def find(folder: Path, *kinds: str) -> list[Path]:
    """Artefacts of these kinds in a folder, by their sidecars, in name order."""
    found = []
    # Not glob: it takes a folder that may not be read for an empty one.
    for sidecar in sorted(path for path in folder.iterdir() if path.suffix == ".json"):
        artefact = sidecar.with_suffix("")
        if KINDS.get(artefact.suffix) in kinds and artefact.is_file():
            found.append(artefact)
    return found
