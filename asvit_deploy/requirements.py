"""What this package needs, as its own metadata says, and the command that gets it.

asvit-deploy itself is on no index, so `pip install "asvit-deploy[cpu]"` finds nothing: messages
name the missing packages.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@cache
def declared(extra: str = "") -> dict[str, Requirement]:
    """The requirements that hold here of the package (or of one of its extras), by pip's name.

    Empty where the package runs without being installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        lines = metadata.requires("asvit-deploy") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        of_extra = marker is not None and "extra ==" in str(marker)
        if of_extra == bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
            found[canonicalize_name(requirement.name)] = requirement
    return found


_EXTRAS = ("", "cpu", "gpu", "tensorrt", "rtx", "openvino", "train", "hub", "report")


def requirement_of(name: str) -> Requirement | None:
    """What is declared of a package, by itself or in an extra; None where nothing is."""
    return next((found[name] for extra in _EXTRAS if name in (found := declared(extra))), None)


def pip_install(*names: str) -> str:
    """The command that installs these packages in versions that will do."""
    words = []
    for name in names:
        wanted = requirement_of(name)
        words.append(f'"{name}{wanted.specifier}"' if wanted and wanted.specifier else name)
    return " ".join(["pip install", *words])


def pip_install_extra(extra: str) -> str:
    """The command that installs what an extra names."""
    found = declared(extra)
    if not found:
        return f'pip install ".[{extra}]" in the checkout'
    words = (f'"{name}{wanted.specifier}"' for name, wanted in found.items())
    return " ".join(["pip install", *words])
