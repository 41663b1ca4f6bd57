"""The members of a tar file, one after the other, in a walk that only goes forward.

The standard library's `tarfile` reads each header here. Its own walk follows sizes below zero back
to where it was, tries each digit of a pax header against all that follow it, goes a call deeper
for every header of a header, and keeps all that it has seen.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20  # bytes of zeros that are passed over at once
_MOST_EXTRA = 1 << 20  # bytes of a long name or of pax records; a path has 4,096
_MOST_NUMBER = 20  # digits, of numbers below 2^64
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX, _GLOBAL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
_RECORD = re.compile(rb"([0-9]{1,7}) ")  # pax: its own length, then KEY=VALUE and a line end
_SPARSE = tarfile.GNUTYPE_SPARSE
_MAP_GOES_ON = 482, 504  # bytes of its header, and of a block of its map, that say so


@dataclass(frozen=True)
class Member:
    """What a header says, and where its data lies.

    Attributes:
        name: without a slash at its end.
        plain: a regular file whose data stands here whole.
        folder: a folder.
        offset, size: of the data, in bytes.
        apart: its header holds a part of the name at most; the whole stands before it.
    """

    name: str
    plain: bool
    folder: bool
    offset: int
    size: int
    apart: bool = False


class Members:
    """Iterates over a tar file, and over those that were joined to it, up to the zeros at the end.

    Attributes:
        archive: the number of the tar file, of several, that the last member is of.
        rest: whether something stands behind the end that is no tar file.

    Raises:
        tarfile.TarError: a header is damaged or says what cannot be, or the file is cut.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._length = file, os.fstat(file.fileno()).st_size
        self._at = 0
        self.archive, self.rest = 0, False

    def __iter__(self) -> Iterator[Member]:
        everywhere: dict[bytes, bytes] = {}
        here: dict[bytes, bytes] = {}
        long_name: bytes | None = None
        while True:
            info = self._header()
            if info is None:
                if here or long_name is not None or not self._next_archive():
                    break
                everywhere = {}
                continue
            start = self._at + _BLOCK
            if info.type in (*_PAX, _GLOBAL):
                records = _records(self._extra(info, start))
                (everywhere if info.type == _GLOBAL else here).update(records)
            elif info.type in (_LONG_NAME, _LONG_LINK):
                extra = self._extra(info, start)
                long_name = extra.split(b"\0")[0] if info.type == _LONG_NAME else long_name
            else:
                headers = {**everywhere, **here}
                member, end = self._member(info, start, headers, long_name)
                if end <= self._at or end > self._length:
                    raise tarfile.ReadError("unexpected end of data")
                self._at = end
                yield member
                here, long_name = {}, None
                continue
            self._at = start + _blocks(info.size)
        if here or long_name is not None:
            raise tarfile.ReadError("the header that should follow is missing")

    def _header(self) -> tarfile.TarInfo | None:
        """The header that stands there; None where the zeros stand that end the file."""
        self._file.seek(self._at)
        block = self._file.read(_BLOCK)
        if block == bytes(_BLOCK):
            return None
        if self._at > 0 and len(block) < _BLOCK:
            raise tarfile.ReadError(f"cut off at byte {self._at + len(block)}")
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if info.size < 0:
            raise tarfile.ReadError(f"a size of {info.size}")
        return info

    def _next_archive(self) -> bool:
        """Go to the next tar file behind the zeros that end one, if there is one."""
        self._at += _BLOCK
        while self._at < self._length:
            if (place := self._data_from(self._at)) is None:
                return False
            self._at = max(self._at, place // _BLOCK * _BLOCK)
            self._file.seek(self._at)
            piece = self._file.read(_PIECE)
            rest = len(piece) - len(piece.lstrip(b"\0"))
            self._at += rest // _BLOCK * _BLOCK
            if rest < len(piece):
                self.rest = not self._is_header()
                self.archive += 1
                return not self.rest
            if len(piece) < _PIECE:
                break
        return False

    def _data_from(self, place: int) -> int | None:
        """Where the next bytes stand that are no hole of the file; None where only a hole is."""
        number = self._file.fileno()
        here = os.lseek(number, 0, os.SEEK_CUR)  # on which the file's own buffer relies
        try:
            return os.lseek(number, place, os.SEEK_DATA)
        except OSError as error:  # not all systems know where holes are
            return None if error.errno == errno.ENXIO else place
        finally:
            os.lseek(number, here, os.SEEK_SET)

    def _is_header(self) -> bool:
        self._file.seek(self._at)
        try:
            tarfile.TarInfo.frombuf(self._file.read(_BLOCK), "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            return False
        return True

    def _extra(self, info: tarfile.TarInfo, start: int) -> bytes:
        if info.size > _MOST_EXTRA:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        if start + _blocks(info.size) > self._length:
            raise tarfile.ReadError("unexpected end of data")
        self._file.seek(start)
        return self._file.read(info.size)

    def _member(
        self,
        info: tarfile.TarInfo,
        start: int,
        headers: dict[bytes, bytes],
        long_name: bytes | None,
    ) -> tuple[Member, int]:
        """A member by its header and what stands before that, and where the next header is."""
        sparse = info.type == _SPARSE or any(key.startswith(b"GNU.sparse.") for key in headers)
        if info.type == _SPARSE:
            start = self._behind_map(start)
        size = _number(headers[b"size"]) if b"size" in headers else info.size
        name = headers.get(b"path", long_name)
        text = info.name if name is None else name.decode("utf-8", "surrogateescape")
        holds = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not sparse
        member = Member(text.rstrip("/"), plain, info.isdir(), start, size, name is not None)
        return member, start + (_blocks(size) if holds else 0)

    def _behind_map(self, start: int) -> int:
        """Where the data of a sparse member of the old GNU kind begins."""
        self._file.seek(start - _BLOCK)
        more = self._file.read(_BLOCK)[_MAP_GOES_ON[0]]
        while more:
            block = self._file.read(_BLOCK)
            if len(block) < _BLOCK:
                raise tarfile.ReadError("unexpected end of data")
            more, start = block[_MAP_GOES_ON[1]], start + _BLOCK
        return start


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > _MOST_NUMBER:
        raise tarfile.ReadError("a pax header whose size is no number")
    return int(text)


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax header."""
    at = 0
    while at < len(data) and data[at]:
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        key, equals, value = data[match.end() : end - 1].partition(b"=") if match else (b"",) * 3
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a damaged pax header")
        yield key, value
        at = end
