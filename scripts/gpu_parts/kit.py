"""What a part is given, and how it ends."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Report = dict[str, Any]
MANIFEST = "manifest.json"


class SkipPart(Exception):
    """A part that cannot run here, and why."""


class FailPart(Exception):
    """A part whose result is wrong; the second argument is what was measured."""

    def __init__(self, reason: str, result: Report | None = None) -> None:
        super().__init__(reason)
        self.reason, self.result = reason, result


def target(value: float, bound: float, at_most: bool) -> Report:
    """A figure beside what it should reach; missing it fails nothing."""
    met = value <= bound if at_most else value >= bound
    return {"value": value, "target": bound, "better": "lower" if at_most else "higher", "met": met}


@dataclass
class Kit:
    """The prepared folder and how to use it.

    Attributes:
        root: the prepared folder.
        scratch: a folder that goes away with the part.
        rehearse: host twins in place of device code, and the smallest sizes.
        save: keeps what is there so far, should the part be ended from outside.
    """

    root: Path
    scratch: Path
    rehearse: bool = False
    save: Callable[[Report], None] = field(default=lambda _: None)

    @functools.cached_property
    def manifest(self) -> Report:
        return json.loads((self.root / MANIFEST).read_text())

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def half(self) -> str:
        """The type to measure in; a CPU takes minutes for half precision."""
        return "float32" if self.rehearse else "float16"

    def batch(self, size: int) -> int:
        """As it is; small for a rehearsal."""
        return min(size, 2) if self.rehearse else size

    def file(self, role: str) -> Path:
        """What was built or made under that name, such as "plugin".

        Raises:
            SkipPart: it was not, with the reason that `prepare` gave.
        """
        kind = "host" if self.rehearse else "device"
        found = self.manifest[kind].get(role) or self.manifest["data"].get(role)
        if found is None:
            missing = self.manifest["missing"]
            words = missing.get(f"{kind} {role}") or missing.get(role) or "nothing asked for it"
            raise SkipPart(f"{role} was not prepared: {words}")
        return self.root / found

    def program(self, role: str) -> Path:
        """As `file`, something that can be run even where the copy to here lost its permissions.

        Raises:
            SkipPart: as `file`.
        """
        path = self.file(role)
        if os.access(path, os.X_OK):
            return path
        mine = self.scratch / path.name
        shutil.copyfile(path, mine)
        mine.chmod(0o755)
        return mine

    def some(self, calls: list[Any], share: int = 8) -> list[Any]:
        """All of them; one in `share` for a rehearsal."""
        return calls[::share] if self.rehearse else calls


def torch_for(kit: Kit) -> Any:
    """The module, set to compute float32 in float32.

    Raises:
        SkipPart: it is not installed, or has no GPU that it could use.
    """
    try:
        import torch
    except ImportError as error:
        raise SkipPart(f"torch cannot be imported ({error})") from None
    if not kit.rehearse and not torch.cuda.is_available():
        raise SkipPart(f"this torch ({torch.__version__}) has no CUDA, or it finds no GPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch
