"""Where the weights of a checkpoint lie: a file, a hub's folder, or the shards of an index."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from asvit_deploy import sidecar
from asvit_deploy.checkpoints import formats, learned, unwrapping
from asvit_deploy.checkpoints.openclip_config import OPENCLIP_WEIGHTS
from asvit_deploy.checkpoints.reading import (
    ENDINGS,
    FETCH,
    POINTER,
    is_pointer,
    listed,
    read,
)
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.checkpoints.shards import index_of, is_index, read_shards, shards_of
from asvit_deploy.errors import UserError, shortened
from asvit_deploy.files import sha256

# What hubs call the weights of a folder, the best first.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pth",
    *OPENCLIP_WEIGHTS,
)  # fmt: skip
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What trainers keep in the same folder, and others' weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "trainer_state")
_FOREIGN = ("tf_model.h5", "flax_model.msgpack", "saved_model.pb", "rust_model.ot", "model.onnx")
_MOST_ENTRIES = 10_000  # of a folder that are looked at


def weights_at(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The file that holds the weights, or the index of their shards, and lines to report.

    Args:
        path: a file, which is that file, or a folder as hubs and trainers write it.

    Raises:
        Refused: a folder without weights, with several that differ, or with a PEFT adapter; or a
            file that is one shard of several.
    """
    if not os.path.isdir(path):  # Path.is_dir raises where a name is too long
        index = index_of(path) if os.path.isfile(path) else None
        if index is not None:
            raise Refused(f"is one shard of several; name its folder, or the index {index.name}")
        return path, ()
    found, lines = _in_folder(path)
    if len(found) > 1:
        _check_same(found)
        rest = listed(file.name for file in found[1:])
        lines = (f"the same weights lie beside it as {rest}", *lines)
    return found[0], lines


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that a checkpoint is read from: its weights, or an index and its shards; and the
    network that what a method learned lies beside.

    Raises:
        UserError: as `weights_at`, but that several files are not compared.
    """
    own = _own_files(path)
    beside = learned.backbone_named(own[0])
    return own if beside is None else (*own, *_own_files(beside))


def _own_files(path: Path) -> tuple[Path, ...]:
    """As `files_of`, without a network beside it, whose sha256 the file itself holds."""
    try:
        weights = _in_folder(path)[0][0] if os.path.isdir(path) else path
        return (weights, *(shards_of(weights) if is_index(weights) else ()))
    except Refused as refused:
        raise UserError(f"{shortened(path)} {refused}") from refused


def fingerprint(path: Path) -> str:
    """sha256 of a checkpoint's file; of shards, of theirs in order.

    Raises:
        UserError: as `files_of` and `files.sha256`.
    """
    first, *shards = _own_files(path)
    if not shards:
        return sha256(first)
    digests = [f"{sha256(file)} {file.name}\n" for file in (first, *shards)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def source_of(path: Path, **more: Any) -> dict[str, Any]:
    """As `sidecar.source_of`, of a checkpoint's file: with the sha256 of each shard of an index, by
    its name, and for what lies in the hub's cache with the repository and the commit."""
    if shards := {file.name: sha256(file) for file in _own_files(path)[1:]}:
        more["shards"] = shards
    if hub := repository_of(path):
        more["hub"] = hub
    return sidecar.source_of(path, **more)


def repository_of(path: Path) -> dict[str, str]:
    """For a file in the hub's cache, the repository and the commit that it is of."""
    folder = Path(os.path.abspath(path)).parent
    cached = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    if not cached.startswith("models--"):
        return {}
    repository = cached.removeprefix("models--").replace("--", "/")
    return {"repository": repository, "revision": folder.name}


def content_at(weights: Path) -> tuple[Any, dict[str, str], tuple[str, ...]]:
    """As `reading.read`, of an index's shards too."""
    if not is_index(weights):
        return read(weights)
    state, lines = read_shards(weights)
    return state, {}, lines


def name_of(path: Path) -> str:
    """What outputs made of a checkpoint are called: a folder's own name, that of a repository for
    one in a hub's cache, or a file's without its ending."""
    if not os.path.isdir(path):
        if is_index(path):
            return path.name.split(".", 1)[0]
        ending = next((end for end in ENDINGS if path.name.endswith(end)), "")
        return path.name.removesuffix(ending)
    place = Path(os.path.abspath(path))
    cached = place.parents[1].name if place.parent.name == "snapshots" else ""
    if cached.startswith("models--"):
        return cached.split("--")[-1]
    return place.name or "checkpoint"


def choose(names: Iterable[str]) -> str:
    """Which of a folder's files holds the weights, by their names alone.

    Raises:
        Refused: none does, or nothing says which.
    """
    names = list(names)
    known = _known_among(names)
    return known[0] if known else _only_among(names)


def is_weights(name: str) -> bool:
    """Whether a file's name is one of weights, and none of what trainers keep beside them."""
    return name.endswith(ENDINGS) and not name.startswith(_NO_WEIGHTS)


def _in_folder(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The weights in a folder, the best first, and lines on what is taken and passed over."""
    names = _entries(folder)
    there = set(names)
    looked_at = (name for name in names if name in WEIGHTS or _is_alone(name, there))
    odd = {name: found for name in looked_at if (found := _no_weights(folder / name))}
    lines = [f"{name} beside it is {what}; it is passed over" for name, (what, _) in odd.items()]
    if known := [folder / name for name in _known_among(names) if name not in odd]:
        return known, tuple(lines)
    left = [name for name in names if name not in odd]
    if odd and not any(_is_alone(name, there) for name in left):
        name, (what, advice) = next(iter(odd.items()))
        raise Refused(f"is a folder without weights: its {name} is {what}; {advice}")
    lines.insert(0, f"the only checkpoint of the folder {folder} is taken")
    return [_only_other(folder, left)], tuple(lines)


def _is_alone(name: str, there: set[str]) -> bool:
    """Whether a file has the name of weights, and there is no index that it is a shard of."""
    index = index_of(Path(name))
    return is_weights(name) and (index is None or index.name not in there)


def _no_weights(file: Path) -> tuple[str, str] | None:
    """What has the name of weights and is something else, and what to do; None for weights."""
    if file.is_dir():  # others may be a run's, with weights in them
        return ("a folder", "name the checkpoint in it") if file.name in WEIGHTS else None
    if not file.is_file():
        return ("a link to nothing" if file.is_symlink() else "no regular file",
                "put it back, or download it again")  # fmt: skip
    if is_index(file):
        try:
            shards = shards_of(file)
        except Refused:  # which whoever reads it says
            return None
        pointers = [shard.name for shard in shards if is_pointer(shard)]
        what = f"an index of shards that Git LFS did not fetch ({listed(pointers)})"
        return (what, FETCH) if pointers else None
    return (POINTER, FETCH) if is_pointer(file) else None


def _known_among(names: Iterable[str]) -> list[str]:
    there = set(names)
    if adapters := [name for name in _ADAPTERS if name in there]:
        raise Refused(
            f"holds a PEFT adapter ({listed(adapters)}), not the network; merge it first "
            "(model.merge_and_unload()) and save the result with save_pretrained"
        )
    return [name for name in WEIGHTS if name in there]


def _entries(folder: Path) -> list[str]:
    found = list[str]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.append(entry.name)
                if len(found) > _MOST_ENTRIES:
                    raise Refused(
                        f"is a folder of over {_MOST_ENTRIES:,} files; name the checkpoint in it"
                    )
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}; check its permissions") from error
    return sorted(found)


def _only_other(folder: Path, names: list[str]) -> Path:
    """The one checkpoint of a folder that has none by a hub's name."""
    runs = [name for name in names if any((folder / name / own).is_file() for own in WEIGHTS)]
    if runs and not any(map(is_weights, names)):
        raise Refused(
            f"is a folder without weights of its own; {listed(runs)} in it have some: name one"
        )
    files = [name for name in names if not (folder / name).is_dir()]
    return folder / _only_among(files or [f"{name}/" for name in names])


def _only_among(names: list[str]) -> str:
    files = [name for name in names if is_weights(name)]
    shards = [name for name in files if index_of(Path(name)) is not None]
    if shards:
        raise Refused(f"holds shards ({listed(shards)}) without their index; download it again")
    if len(files) == 1:
        return files[0]
    if files:
        raise Refused(f"holds {len(files)} checkpoints ({listed(files)}); name one of them")
    if foreign := [name for name in names if name in _FOREIGN]:
        raise Refused(
            f"is a folder without PyTorch's weights (it has {listed(foreign)}); save them as "
            "model.safetensors"
        )
    what = f"it has {listed(names)}" if names else "it is empty"
    raise Refused(f"is a folder without weights ({what}); name a checkpoint file, or a hub folder")


def _check_same(found: Iterable[Path]) -> None:
    """Refuse a folder with several sets of weights, unless all are one network's."""
    first, *others = files = list(found)
    mine = _network(first, files)
    for other in others:
        theirs = _network(other, files)
        if differ := _difference(mine, theirs):
            raise Refused(
                f"is a folder with two sets of weights, {first.name} and {other.name}, that differ "
                f"({differ}); name the file that is meant"
            )


def _difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Where two networks are not the same, or the empty text."""
    if odd := sorted(mine.keys() ^ theirs.keys()):
        return f"only one has {listed(odd)}"
    for key, value in mine.items():
        other = theirs[key]
        if value.shape != other.shape or not torch.equal(value.float(), other.float()):
            return key
    return ""


def _network(file: Path, files: list[Path]) -> dict[str, torch.Tensor]:
    """A network under our own names, in the file's own types."""
    try:
        content, _, _ = content_at(file)
        return formats.translate(unwrapping.select(content, False).state)[0].state
    except Refused as refused:
        names = listed(one.name for one in files)
        raise Refused(
            f"holds several files of weights ({names}), of which {file.name} {refused}"
        ) from None
