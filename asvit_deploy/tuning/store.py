"""Measurements that are kept: one file each, found again by what it was measured of and how.

A measurement's name is the sha256 of all that it depends on: the machine and the versions on it,
the checkpoint, the pictures, and its own settings. So what another machine, network or folder of
pictures gave is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from asvit_deploy import sidecar
from asvit_deploy.errors import UserError
from asvit_deploy.files import write_text

KIND = "measured"


class Store:
    """A folder of measurements.

    Args:
        folder: made with the first of them.
        of: what all of them depend on, JSON-ready.
        say: gets a line on a file that cannot be used.

    Attributes:
        reused, added: how many were found, and made.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.folder, self.of, self.say = folder, dict(of), say
        self.reused = self.added = 0

    def _path(self, settings: Mapping[str, Any]) -> Path:
        whole = json.dumps({"of": self.of, "settings": settings}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.json"

    def found(self, settings: Mapping[str, Any]) -> Any:
        """What was measured with these settings; None: nothing was, or it cannot be read."""
        path = self._path(settings)
        if not path.is_file():
            return None
        try:
            fields = sidecar.read_signed(path, "measurement", "it", "kind", "value")
            if fields["kind"] != KIND:
                raise UserError(f"{path} is no measurement")
        except UserError as error:
            self.say(f"measured again: {error}")
            return None
        self.reused += 1
        return fields["value"]

    def keep(self, settings: Mapping[str, Any], value: Any) -> None:
        """Raises UserError where it cannot be written."""
        path = self._path(settings)
        path.parent.mkdir(exist_ok=True)
        # Not one line a number: a timing has thousands.
        text = sidecar.signed({"kind": KIND, "settings": dict(settings), "value": value}, None)
        write_text(path, text)
        self.added += 1

    def measured(self, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What is kept, or what is made now, which is kept then."""
        if (value := self.found(settings)) is not None:
            return value
        value = make()
        self.keep(settings, value)
        return value
