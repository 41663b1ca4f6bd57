"""Which artefacts are meant where none is named: those of the current folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asvit_deploy.errors import UserError


def artefacts(named: Sequence[Path], *kinds: str, several: bool = False) -> list[Path]:
    """The artefacts that were named, or those that the current folder's sidecars describe.

    Raises:
        UserError: there are none, or more than one where one is meant.
    """
    if named:
        return list(named)
    from asvit_deploy.artefacts.opening import artefacts_here

    found = artefacts_here(*kinds)
    if len(found) > 1 and not several:
        raise UserError(f"several artefacts here, name one: {', '.join(map(str, found))}")
    return found
