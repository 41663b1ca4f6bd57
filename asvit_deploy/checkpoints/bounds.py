"""What a checkpoint file asks of the machine, found out before anything of it is built.

A pickle of 100 bytes can stand for a tuple of a billion values, and a zip file of one MiB for a
terabyte: such a file is refused from its opcodes and its directory alone.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from asvit_deploy.bounded import MOST_BYTES, open_regular
from asvit_deploy.checkpoints.refused import Refused

# The 4,000 tensors of a ViT-G and its optimiser take 150,000 opcodes and 1 MiB.
MOST_NAMES = 100_000  # tensors and whatever else has a name
MOST_NETWORKS = 64  # in one file; each is looked for among all names
LONGEST_NAME = 1000  # characters; a deep network under wrappers has 100
MOST_HEADER = 16 << 20  # bytes of JSON in front of a safetensors file
_MOST_PICKLE = 8 << 20  # bytes; each can make an object of 200
_MOST_OPCODES = 1_000_000
_HEAVIEST = 4 * _MOST_PICKLE  # values, and bytes of text, that objects stand for when written out
_MOST_DIRECTORY = 32 << 20  # bytes of a zip file's directory, some 70 a tensor
SPARE = 1 << 30  # bytes of memory that a load may take beside what the file holds
_OLD_PICKLES = 5  # with which a torch.save of before the zip files begins


def check(path: Path) -> None:
    """Refuse what torch.load would take too long over, or too much memory for.

    What is no file of torch.save at all passes: torch says so sooner than this could.

    Raises:
        Refused: it would.
    """
    with open_regular(path, "checkpoint file") as file:
        check_size(file)
        head = file.read(tarfile.BLOCKSIZE)
        if head[:4] == b"PK\x03\x04":
            _check_zip(file)
        elif _is_tar_header(head):  # torch would unpack it, and follow it wherever it points
            raise Refused("is a tar file, which torch.save stopped writing in 2017; save it again")
        else:
            file.seek(0)
            start = file.read(_MOST_PICKLE)
            rest = bool(file.read(1))
            if not _weigh(io.BytesIO(start), _OLD_PICKLES) and rest:
                _refuse_large()


def check_size(file: BinaryIO) -> None:
    """Refuse a file that is larger than any of a network here.

    Raises:
        Refused: it is.
    """
    if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
        raise Refused(
            f"has {size:,} bytes, more than {MOST_BYTES:,}; save only the model's weights"
        )


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _refuse_large() -> NoReturn:
    raise Refused("holds too many objects for a checkpoint; save the model's state_dict()")


# --- zip files ----------------------------------------------------------------------------------


def _check_zip(file: BinaryIO) -> None:
    if _directory_size(file) > _MOST_DIRECTORY:
        _refuse_large()
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # Entries may share their bytes, or be compressed, and so claim any size.
            if sum(entry.file_size for entry in entries) > size:
                raise Refused("claims to hold more than its size; save it again with torch.save")
            pickles = [e for e in entries if e.filename.endswith(".pkl")]
            for entry in pickles:
                if entry.file_size > _MOST_PICKLE:
                    _refuse_large()
                _weigh(io.BytesIO(archive.read(entry)), 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError):
        return  # damaged, which is found where it is read


def _directory_size(file: BinaryIO) -> int:
    """Bytes of a zip file's directory as its end states them: zipfile takes them all in at once."""
    size = file.seek(0, 2)
    file.seek(max(0, size - (1 << 16) - 98))  # a comment, the end, and zip64's end and locator
    tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    size = struct.unpack("<I", tail[end + 12 : end + 16])[0] if 0 <= end <= len(tail) - 22 else 0
    if size == 2**32 - 1 and 0 <= end64 <= len(tail) - 56:
        size = struct.unpack("<Q", tail[end64 + 40 : end64 + 48])[0]
    return size


# --- pickles ------------------------------------------------------------------------------------


def _weigh(stream: BinaryIO, count: int) -> bool:
    """Refuse pickles that hold too much; whether so many of them are whole.

    To hash a tuple, to compare it or to write it out takes a step for each value that it stands
    for, however often it holds the same one.
    """
    scale = _Scale()
    try:
        for _ in range(count):
            scale.start()
            for opcode, argument, _place in pickletools.genops(stream):
                scale.step(opcode, argument)
    except (ValueError, IndexError, KeyError, AttributeError, struct.error):
        return False  # no pickle, or a broken one
    return True


class _Scale:
    """A pickle machine that builds nothing: of every object it knows only what it stands for.

    An object is a list of one number, which the memo and the stack share, so that what is added to
    it later counts wherever it stands.
    """

    def __init__(self) -> None:
        self._opcodes, self._called = 0, 0
        self.start()

    def start(self) -> None:
        """Begin another pickle."""
        self._stack: list[list[int] | None] = []  # None is a mark
        self._memo: dict[int, list[int] | None] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Take one opcode."""
        self._opcodes += 1
        if self._opcodes > _MOST_OPCODES:
            _refuse_large()
        name, stack = opcode.name, self._stack
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            stack.append(None)
        else:
            self._other(opcode, argument)

    def _other(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        taken = self._taken(opcode)
        weight = sum(part[0] for part in taken if part is not None)
        if weight > _HEAVIEST:
            _refuse_large()
        if opcode.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ", "BUILD"):
            # What is called walks through its arguments, and each call may be given the same.
            self._called += weight
            if self._called > _HEAVIEST:
                _refuse_large()
        if opcode.name in ("GLOBAL", "STACK_GLOBAL") and "bytearray" in str(argument):
            raise Refused("holds a bytearray, which no weights are; save the model's state_dict()")
        if opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "ADDITEMS"):
            grown = taken[0]
            if grown is not None:
                grown[0] = weight
            self._stack.append(grown)
            return
        own = len(argument) if isinstance(argument, (str, bytes)) else 1
        for _ in opcode.stack_after:
            self._stack.append([weight + own])

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[list[int] | None]:
        """What an opcode takes off the stack, the lowest first."""
        stack, before = self._stack, opcode.stack_before
        found: list[list[int] | None] = []
        for kind in reversed(before):
            if kind is pickletools.stackslice:
                while (top := stack.pop()) is not None:
                    found.append(top)
            elif kind is not pickletools.markobject:
                found.append(stack.pop())
        return found[::-1]
