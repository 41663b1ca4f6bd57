"""The prepared folder: what stands in its manifest, and whether it is whole and of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asvit_deploy import files
from asvit_deploy.errors import UserError
from gpu_parts.kit import MANIFEST

SCHEMA = 1
TABLES = ("device", "host", "data", "missing", "sha256", "made_by")
MAKE = "make it with `scripts/gpu_suite prepare DIR --sm NN`"


def read(folder: Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        UserError: there is no such folder, or `prepare` did not make it.
    """
    if not folder.is_dir():
        raise UserError(f"the prepared folder {folder} does not exist; {MAKE}")
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        schema, sms = found["schema"], [str(sm) for sm in found["sms"]]
        tables = [found[name] for name in TABLES]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {MANIFEST}, so it was not prepared; {MAKE}") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{path} is damaged; prepare the folder again") from None
    if schema != SCHEMA or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path} is of another version of this suite; prepare the folder again")
    return {**found, "sms": sms}


def check(folder: Path) -> dict[str, Any]:
    """The manifest, once every file is what it was.

    Raises:
        UserError: as `read`, or a file is missing or changed.
    """
    manifest = read(folder)
    for name, digest in manifest["sha256"].items():
        try:
            same = files.sha256(folder / name) == digest
        except OSError:
            raise UserError(f"{folder} is damaged: {name} is missing; prepare it again") from None
        if not same:
            raise UserError(f"{folder} is damaged: {name} has changed; prepare it again")
    return manifest


def refuse_other_gpu(folder: Path, manifest: dict[str, Any], gpu: dict[str, Any]) -> None:
    """Find out before the work whether its device code runs on this GPU.

    Raises:
        UserError: it was made for others, or for none.
    """
    sms, mine = manifest["sms"], gpu["sm"]
    if mine not in sms:
        made = f"SM {', '.join(sms)}" if sms else "rehearsals alone"
        raise UserError(
            f"{folder} was prepared for {made}, and {gpu['name']} is SM {mine}; prepare it with "
            f"--sm {mine}"
        )
