"""Bytes to objects: what a checkpoint file holds, of which nothing is ever run."""

from __future__ import annotations

import argparse
import errno
import os
import re
import reprlib
import warnings
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asvit_deploy.bounded import UNREADABLE, open_regular
from asvit_deploy.checkpoints import bounds
from asvit_deploy.checkpoints.damage import check_archive
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError, shortened
from asvit_deploy.memory import memory

# Endings of checkpoint files, the longer ones first.
ENDINGS = (".safetensors", ".pth.tar", ".pth", ".ckpt", ".pt", ".tar", ".bin")
_OLD_TORCH = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before its zip files
)
_UNSUMMED = (
    "has no checksums (torch's format of before 1.6, or saved with compute_crc32 off), so damage "
    "to its weights would go unnoticed; compare it with its source, or save it again"
)
_TOO_MUCH = "asks for more memory than its size can fill; save it again with torch.save"
_LONGEST_PATH = 4096  # characters, Linux's own limit
_LISTED = 3  # keys that a message names before it says how many more there are
_LONGEST_LISTED = 100  # characters of one of them
# How a file begins that Git LFS left in the place of another.
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTERS = 2048  # bytes; a pointer has some 130
POINTER = "a Git-LFS pointer, not the weights"
FETCH = "run `git lfs pull`, or download it again"


class _InertPath(str):
    """Stands in for a path among a run's options."""

    def __new__(cls, *parts: Any) -> _InertPath:
        text = "/".join(part for part in parts if isinstance(part, str))
        return super().__new__(cls, text[:_LONGEST_PATH])  # or one made of two would double


class _Short(reprlib.Repr):
    """Writes a foreign value out so far as a message shows it: of 200 bytes of pickle can come a
    list that takes gigabytes, and a number too long for Python to write."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.repr_OrderedDict = self.repr_dict

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else "a number of many digits"

    def repr_instance(self, x: Any, level: int) -> str:
        plain = isinstance(x, (bool, float, complex, torch.dtype, torch.device, type(None)))
        return repr(x) if plain else f"a {type(x).__name__}"


# Classes that training scripts save beside the weights: argparse's own is as inert as a dict, and
# stand-ins load under the names of the others, of which nothing is imported. Torch fills none but
# a plain dict.
_KNOWN: list[Any] = [
    argparse.Namespace,
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "lightning.fabric.utilities.data.AttributeDict"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (dict, "lightning.pytorch.utilities.parsing.AttributeDict"),
    (_InertPath, "pathlib.PosixPath"),
    (_InertPath, "pathlib.PurePosixPath"),
    (_InertPath, "pathlib.WindowsPath"),
    (_InertPath, "pathlib._local.PosixPath"),
    (_InertPath, "pathlib._local.WindowsPath"),
]


_SHORT = _Short()


def listed(names: Any) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = (shortened(name, _LONGEST_LISTED) for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown) + more


def quoted(value: Any) -> str:
    """A foreign value in one line, not too long."""
    # Not str: a pickle of 200 bytes can hold a list that takes gigabytes to write out.
    text = value if isinstance(value, str) else _SHORT.repr(value)
    short = text if len(text) <= 40 else f"{text[:40]}…"
    return repr(short) if isinstance(value, str) else " ".join(short.split())


def read(path: Path) -> tuple[Any, dict[str, str], tuple[str, ...]]:
    """The objects in a file, the metadata of a `.safetensors`, and lines for the load to report.

    Formats are recognised by content. The checksums of torch.save's zip files are tested; a
    `.safetensors` has none of its own, see `damage.check_seal` for ours.

    Raises:
        Refused: it cannot be read, is damaged, would ask too much of the machine, or is no
            checkpoint.
    """
    if os.path.isdir(path):
        raise Refused("is a folder; name the checkpoint file in it")
    try:
        with open_regular(path, "checkpoint file") as file:
            bounds.check_size(file)
            head = file.read(len(_POINTER))
    except (FileNotFoundError, ValueError):  # of a name that holds a zero
        raise Refused("does not exist; check the path") from None
    except OSError as error:
        raise _unread(error) from error
    if not head:
        raise Refused("is empty; copy or download it again")
    if head == _POINTER:
        raise Refused(f"is {POINTER}; {FETCH}")
    # A safetensors file starts with the length of its header, which is JSON.
    if head[8:9] == b"{" and (length := int.from_bytes(head[:8], "little")) < 100_000_000:
        if length > bounds.MOST_HEADER:
            raise Refused("holds too many objects for a checkpoint; save only the model's weights")
        return *_read_safetensors(path), ()
    return _read_torch(path)


def _unread(error: OSError) -> Refused:
    """What the system said when a checkpoint was opened or read."""
    if error.errno in UNREADABLE:
        what = "check the disk, or copy the file from elsewhere"
    else:
        what = "check the path" if error.errno == errno.ENAMETOOLONG else "check its permissions"
    return Refused(f"cannot be read: {error.strerror or error}; {what}")


def is_pointer(path: Path) -> bool:
    """Whether Git LFS has left a pointer in the place of a file, which was not fetched."""
    try:
        if os.path.getsize(path) > _POINTERS:
            return False
        with open_regular(path) as file:
            return file.read(len(_POINTER)) == _POINTER
    except (OSError, UserError):  # which reading it will say
        return False


def metadata_at(path: Path) -> dict[str, str]:
    """What the header of a `.safetensors` says; nothing where that cannot be read, as reading all
    of it will say."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with open_regular(path) as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > bounds.MOST_HEADER:
            return {}
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, UserError, ValueError, MemoryError):
        return {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > bounds.MOST_NAMES:
                raise Refused(
                    "holds too many objects for a checkpoint; save only the model's weights"
                )
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise Refused("is truncated or damaged; copy or download it again") from error
    except OSError as error:
        raise _unread(error) from error
    except MemoryError as error:
        raise Refused(_TOO_MUCH) from error


def _read_torch(path: Path) -> tuple[Any, dict[str, str], tuple[str, ...]]:
    try:
        bounds.check(path)
        with (
            torch.serialization.safe_globals(_KNOWN),
            warnings.catch_warnings(),
            open_regular(path, "checkpoint file") as file,  # one and the same for both readers
            memory.within(2 * path.stat().st_size + bounds.SPARE),
        ):
            warnings.simplefilter("ignore")  # what matters of them comes as an error
            summed = check_archive(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        return content, {}, () if summed else (_UNSUMMED,)
    except (UserError, Refused):
        raise
    except MemoryError as error:
        raise Refused(_TOO_MUCH) from error
    except OSError as error:
        raise _unread(error) from error
    except Exception as error:  # torch answers to bad bytes with nearly any exception
        _refuse_unread(path, str(error))


def _refuse_unread(path: Path, message: str) -> NoReturn:
    """Say in one line why torch.load did not read a file."""
    # torch names what it would have had to import: "Unsupported global: GLOBAL a.B was not an
    # allowed global" or, for modules it never allows, "unsupported GLOBAL a.B whose module".
    code = re.search(r"unsupported (?:global: )?GLOBAL ([\w.]+)", message, re.I)
    if code or re.search(r"unsupported class|trying to call reduce", message, re.I):
        name = f" ({code[1]})" if code else ""
        raise Refused(
            f"holds pickled code{name}, which was not run; save only the model's state_dict()"
        )
    if "can't allocate memory" in message:
        raise Refused(_TOO_MUCH)
    if "TorchScript" in message:
        raise Refused("is a TorchScript archive; save the model's state_dict() instead")
    with open(path, "rb") as file:
        head = file.read(len(_OLD_TORCH))
    if head == _OLD_TORCH or (head[:4] == b"PK\x03\x04" and _cut_or_torch_zip(path)):
        raise Refused("is truncated or damaged; copy or download it again")
    if head[:1] == b"\x80" and "Unsupported operand" in message:
        raise Refused(
            "is a pickle that torch.save did not write; it was not run; name a checkpoint file"
        )
    raise Refused(
        "is not a checkpoint (neither safetensors nor torch.save); name a file that holds one"
    )


def _cut_or_torch_zip(path: Path) -> bool:
    """Whether a zip file has lost its end, or holds what torch.save puts into one."""
    if not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return True
