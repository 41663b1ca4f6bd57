"""Formats of checkpoints: a file each, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable

from asvit_deploy.checkpoints.formats.base import Format, State, Translated
from asvit_deploy.checkpoints.formats.hf_clip import HfClip
from asvit_deploy.checkpoints.formats.hf_dinov2 import HfDinov2
from asvit_deploy.checkpoints.formats.hf_vit import HfVit
from asvit_deploy.checkpoints.formats.openclip import OpenClip
from asvit_deploy.checkpoints.formats.timm import Timm
from asvit_deploy.checkpoints.reading import listed
from asvit_deploy.checkpoints.refused import Refused

# The first that recognises a network takes it.
FORMATS: tuple[type[Format], ...] = (HfVit, HfDinov2, HfClip, OpenClip, Timm)


def translate(state: State) -> tuple[Translated, type[Format]]:
    """A network's names, without their prefix, as ours, and whose they were.

    Raises:
        Refused: they are of no format that is known.
    """
    for found in FORMATS:
        if found.recognises(state):
            return found.translate(state), found
    raise Refused(
        f"is no ViT that is known here (keys such as {listed(state)}); name a checkpoint of "
        f"{_names()}"
    )


def _names() -> str:
    names: Iterable[str] = (found.name for found in FORMATS)
    return ", ".join(names)
