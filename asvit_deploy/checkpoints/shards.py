"""Weights in several files, and the index that says which tensor lies in which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asvit_deploy.bounded import MOST_TEXT, parse_json, read_bounded
from asvit_deploy.checkpoints.reading import listed, quoted, read
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError

# One of one is a whole network.
_SHARD = re.compile(r".+-\d{5}-of-(?!00001\.)\d{5}\.(?:safetensors|bin)")
_MOST = 256  # shards; a network that fits into memory has a few
_LONGEST = 255  # bytes of a file's name


def is_index(path: Path) -> bool:
    """Whether a file is one that names shards."""
    return path.name.endswith((".safetensors.index.json", ".bin.index.json"))


def index_of(shard: Path) -> Path | None:
    """The index beside a file that is one shard of several; None for another file."""
    if not _SHARD.fullmatch(shard.name):
        return None
    stem, ending = shard.name.rsplit("-of-", 1)[0].rsplit("-", 1)[0], shard.suffix
    return shard.with_name(f"{stem}{ending}.index.json")


def shards_of(index: Path, there: bool = True) -> list[Path]:
    """The files that an index names, in its order.

    Args:
        there: refuse an index whose files are missing.

    Raises:
        Refused: it is no index, or names files that are missing or lie elsewhere.
    """
    return [index.with_name(name) for name in dict.fromkeys(_weight_map(index, there).values())]


def read_shards(index: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All tensors that an index names, and lines for the load to report.

    Raises:
        Refused: as `shards_of` and `reading.read`; or shards and index disagree.
    """
    places = _weight_map(index)
    state: dict[str, Any] = {}
    notes: dict[str, None] = {}
    held: dict[str, str] = {}
    for shard in shards_of(index):
        try:
            content, _, lines = read(shard)
        except Refused as refused:
            raise Refused(f"names a shard that cannot be read: {shard} {refused}") from refused
        notes.update({f"{shard.name} {line}": None for line in lines})
        if not isinstance(content, Mapping):
            raise Refused(f"names {shard.name}, which is no state dict; download it again")
        for key, value in content.items():
            if key in held:
                raise Refused(
                    f"names shards that both hold {quoted(key)[1:-1]}: {held[key]} and "
                    f"{shard.name}; download them again"
                )
            held[key], state[key] = shard.name, value
    if missing := [key for key, name in places.items() if held.get(key) != name]:
        key = missing[0]
        raise Refused(
            f"names tensors that its shards lack, such as {quoted(key)[1:-1]} in {places[key]}; "
            "download them again"
        )
    if unknown := [key for key in held if key not in places]:
        raise Refused(
            f"does not name all that its shards hold ({listed(unknown)}); download them again"
        )
    count = len(shards_of(index))
    return state, (f"its weights lie in {count} shard{'s' * (count > 1)}", *notes)


def _weight_map(index: Path, there: bool = True) -> dict[str, str]:
    try:
        content = parse_json(read_bounded(index, MOST_TEXT, "index of shards"))
    except UserError as error:
        raise Refused(str(error).removeprefix(f"{index} ")) from None
    except ValueError:
        raise Refused("is cut or no JSON; download it again") from None
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise Refused("has no weight_map that names shards; download it again")
    for key, name in places.items():
        plain = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
        long = plain and len(name.encode(errors="replace")) > _LONGEST
        if not plain or long or "\\" in name or "\0" in name:
            raise Refused(f"names {quoted(name)} for {quoted(key)}, no file beside it; correct it")
    names = list(dict.fromkeys(places.values()))
    if len(names) > _MOST:
        raise Refused(f"names {len(names)} shards, more than {_MOST}; pass a smaller network")
    if there and (missing := [name for name in names if not index.with_name(name).is_file()]):
        raise Refused(f"names shards that are not there ({listed(missing)}); download them again")
    return dict(places)
