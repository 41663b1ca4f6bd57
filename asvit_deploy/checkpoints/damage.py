"""Damage that would load: what torch and safetensors do not check is checked here.

torch.save writes zip files, whose checksums torch.load leaves unread. What this tool writes carries
a digest of its contents besides. Two kinds of file carry nothing: those of torch.save before its
zip files, and `.safetensors` of others; of a changed weight in them nobody can know.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from asvit_deploy.checkpoints.refused import Refused

_PIECE = 1 << 20  # bytes of a member in memory at a time
_FOLDER = 0x10  # an attribute of MS-DOS
_ENCRYPTED = 0x2061  # the flags of a member that say so, and of a patch
# What of the end of a zip file is asked: entries here and in all, the directory's size and place.
_END, _END_SIZE = struct.Struct("<4s4xHHII2x"), 22
_LOCATOR, _END_64 = struct.Struct("<4s4xQ4x"), struct.Struct("<4s20xQQQQ")


class Damaged(Refused):
    """What is wrong with a file's bytes."""


_CUT = "is truncated or damaged; copy or download it again"


def check_archive(file: BinaryIO) -> bool:
    """Test every checksum of a zip file that torch.save wrote; other files are left to torch.load.

    Returns:
        Whether there are checksums. torch.save writes none where its `compute_crc32` is off.

    Raises:
        Damaged: a member differs from its checksum, or the file is none that torch.save writes.
    """
    try:
        file.seek(0)
        if file.read(4) != b"PK\x03\x04":  # what torch, too, takes for a zip file
            return False
        with zipfile.ZipFile(file) as archive:
            return _check_members(file, archive)
    except Damaged:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        raise Damaged(_CUT) from error
    except Exception as error:  # zipfile answers to bad bytes with many an exception
        raise Damaged(_CUT) from error
    finally:
        file.seek(0)


def _check_members(file: BinaryIO, archive: zipfile.ZipFile) -> bool:
    members = archive.infolist()
    names = [member.filename for member in members]
    lower = {name.lower() for name in names}  # torch finds a member by its name in any case
    if not any(name.endswith("/data.pkl") for name in lower) or any(
        name.endswith("/constants.pkl")
        for name in lower  # TorchScript's
    ):
        return True
    if len(lower) < len(names):
        raise Damaged("has two members of one name; save it again with torch.save")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Damaged(
            "is damaged, or compressed, which torch.save never does; copy it again, or save it "
            "again with torch.save"
        )
    for member in members:
        # What it takes for a folder, torch does not read at all: its memory is what lay there.
        folder = member.is_dir() or member.external_attr & _FOLDER
        if folder or member.flag_bits & _ENCRYPTED or member.compress_size != member.file_size:
            raise Damaged(_CUT)
    if sum(member.file_size for member in members) > file.seek(0, os.SEEK_END):
        raise Damaged(_CUT)
    _check_end(file, archive, len(members))
    summed = any(member.CRC for member in members)
    for member in members:
        with archive.open(member) as content:  # raises where its own header says another name
            while summed and content.read(_PIECE):  # raises where the checksum differs
                pass
    return summed


def _check_end(file: BinaryIO, archive: zipfile.ZipFile, count: int) -> None:
    """The file's end, by which torch finds the directory, must lead to the one that was read."""
    end = file.seek(0, os.SEEK_END) - _END_SIZE
    file.seek(max(end - _LOCATOR.size, 0))
    locator, record = file.read(_LOCATOR.size), file.read(_END_SIZE)
    mark, here, total, size, start = _END.unpack(record)
    if mark != b"PK\x05\x06":  # something stands behind the archive
        raise Damaged(_CUT)
    mark, place = _LOCATOR.unpack(locator)
    if mark == b"PK\x06\x07":
        file.seek(place)
        mark, here, total, size, start = _END_64.unpack(file.read(_END_64.size))
        if mark != b"PK\x06\x06":
            raise Damaged(_CUT)
        end = place
    if (here, total, start, start + size) != (count, count, archive.start_dir, end):
        raise Damaged(_CUT)


def digest(content: Any) -> str:
    """Hex sha256 of all that nested dicts, lists and tensors hold: names, types, shapes, values."""
    hasher = hashlib.sha256()
    _feed(hasher, content)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        hasher.update(f"tensor {value.dtype} {list(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        hasher.update(f"dict {len(value)};".encode())
        for item in value.items():
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(f"list {len(value)};".encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(f"{type(value).__name__} {value!r};".encode())


# --- our own `.safetensors` ---------------------------------------------------------------------

# Two, so that damage to the name of either is noticed by the other; files of before have neither.
_DIGEST, _COVERS = "content_sha256", "content_sha256_covers"
_ALL = "tensors and metadata"


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a `.safetensors` with a digest of it and of the tensors."""
    covered = {**unsealed(metadata), _COVERS: _ALL}
    return {**covered, _DIGEST: _digest_of(tensors, covered)}


def unsealed(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without what `sealed` added."""
    return {key: value for key, value in metadata.items() if key not in (_DIGEST, _COVERS)}


def is_sealed(metadata: Mapping[str, str]) -> bool:
    """Whether a file has a digest, or had one before it was damaged."""
    return _DIGEST in metadata or _COVERS in metadata


def check_seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Compare a file with its digest.

    Raises:
        Damaged: they differ.
    """
    covered = {key: value for key, value in metadata.items() if key != _DIGEST}
    if _digest_of(tensors, covered) != metadata.get(_DIGEST):
        raise Damaged(
            "is damaged, or was changed after this tool wrote it (its digest differs); copy it "
            "again, or make it again"
        )


def _digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return digest([dict(sorted(metadata.items())), dict(sorted(tensors.items()))])
