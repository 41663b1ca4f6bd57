"""Ways to spoil a file: by its bytes, by its JSON, by the fields that a digest vouches for."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


def flip(rng: random.Random, data: bytes) -> bytes:
    """One bit."""
    changed = bytearray(data)
    place = rng.randrange(len(data))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def head(rng: random.Random, data: bytes) -> bytes:
    """Some bits near the beginning, or near the end, where formats say what follows."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        near = rng.randrange(min(len(data), 600))
        changed[near if rng.random() < 0.5 else -1 - near] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, rng.randrange(len(data)), len(data) - 1))]


def without(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 2, 7, 512, 4096)) :]


def twice(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    end = start + rng.choice((1, 8, 64, 512, 4096))
    return data[:end] + data[start:end] + data[end:]


def number(rng: random.Random, data: bytes) -> bytes:
    """A number of one to eight bytes that is far from the one that stood there."""
    size = rng.choice((1, 2, 4, 8))
    start = rng.randrange(max(1, min(len(data) - size, 4096)))
    value = rng.choice(NUMBERS) % 256**size
    order = rng.choice(("little", "big"))
    return data[:start] + value.to_bytes(size, order) + data[start + size :]


def foreign(rng: random.Random, data: bytes) -> bytes:
    """Another file altogether."""
    return rng.choice((
        b"", b"\0", b"text\n", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000,
        b"\xff\xfe" * 500, b"PK\x03\x04" + data[4:], b"\x80\x02" + data[2:], b"\x89PNG\r\n\x1a\n",
        b"version https://git-lfs.github.com/spec/v1\n", bytes(4096), rng.randbytes(2048),
    ))  # fmt: skip


BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    flip, head, cut, without, twice, number, foreign,
)  # fmt: skip


def spoiled(rng: random.Random, data: bytes) -> bytes:
    """The bytes, changed in one way."""
    return rng.choice(BYTES)(rng, data or b"\0")


# --- JSON ---------------------------------------------------------------------------------------


def odd_values(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice((3, 200, 900))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice((
        None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, 10**4000, "",
        "x" * 100_000, "\x1b[2J\u202e", "\ud800", "\0", "../../etc/passwd", [], {}, [1, "a", None],
        {"a": {"b": [1]}}, deep, ["x"] * 5000, {str(i): i for i in range(2000)}, [[]] * 10,
    ))  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value another could stand, the whole aside."""
    found = []
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value[:5])
    for key, part in inner:
        found += [(*above, key), *places(part, (*above, key))]
    return found


def changed_json(rng: random.Random, content: Any) -> Any:
    """The value with one to three parts of it changed, gone, or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        there = places(content)
        if not there:
            return odd_values(rng)
        place = rng.choice(there)
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        if rng.random() < 0.15:
            del inner[place[-1]]
        elif rng.random() < 0.2:
            source: Any = content
            for key in rng.choice(there):
                source = source[key]
            inner[place[-1]] = copy.deepcopy(source)
        else:
            inner[place[-1]] = odd_values(rng)
    return content


def as_json(content: Any) -> bytes:
    """JSON of anything, long numbers too."""
    import sys

    before = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else None
    if before is not None:
        sys.set_int_max_str_digits(0)
    try:
        return json.dumps(content).encode()
    except (RecursionError, ValueError):
        return b"[" * 5000
    finally:
        if before is not None:
            sys.set_int_max_str_digits(before)


def signed(fields: Any) -> bytes:
    """A sidecar or manifest as whoever edits one would sign it again."""
    if not isinstance(fields, dict):
        return as_json(fields)
    rest = {key: value for key, value in fields.items() if key != "digest"}
    try:
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    except (ValueError, TypeError, RecursionError):
        digest = ""
    return as_json({**rest, "digest": digest})


def resigned(rng: random.Random, data: bytes, **kept: Any) -> bytes:
    """A signed file with fields changed and signed again, which no digest shows."""
    fields = changed_json(rng, json.loads(data))
    return signed({**fields, **kept} if isinstance(fields, dict) else fields)
