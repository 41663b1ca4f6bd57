"""From an artefact back to the checkpoint it was made from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from asvit_deploy.bounded import MOST_BYTES
from asvit_deploy.checkpoints import default_checkpoint, facts
from asvit_deploy.checkpoints.load import Checkpoint, build_model, load_checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.models.archs import ARCHS, described
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.methods import restored, within

_KINDS: dict[str, type] = {
    "arch": str, "adaptive": bool, "image_size": int, "num_classes": int, "stages": list,
    "thresholds": list, "batch": str, "precision": str, "preprocessing": dict, "source": dict,
}  # fmt: skip


def check_fields(artefact: Path, fields: dict[str, Any]) -> None:
    """Refuse a sidecar whose fields are not what every step relies on.

    Raises:
        UserError: it names the first such field.
    """

    def refuse(name: str) -> NoReturn:
        found = repr(fields.get(name))[:60]
        raise UserError(f"the sidecar of {artefact} says {name} {found}; make {artefact} again")

    for name, kind in _KINDS.items():
        if type(fields.get(name)) is not kind:
            refuse(name)
    try:
        config = described(fields["arch"], fields.get("architecture"))
    except (ValueError, TypeError):
        refuse("architecture" if "architecture" in fields else "arch")
    thresholds, classes, source = fields["thresholds"], fields.get("classes"), fields["source"]
    if not all(type(t) is float for t in thresholds):
        refuse("thresholds")
    if classes is not None and (
        not isinstance(classes, list)
        or len(classes) != fields["num_classes"]
        or not all(type(name) is str for name in classes)
    ):
        refuse("classes")
    if not isinstance(fields.get("classes_from"), str | None):
        refuse("classes_from")
    if not all(type(source.get(key)) is str for key in ("path", "sha256")):
        refuse("source")
    if fields.get("output", "logits") != config.output:
        refuse("output")
    if fields.get("prefix", 1) != config.prefix:
        refuse("prefix")
    if "reduction" in fields:
        try:
            with torch.device("meta"):
                own = restored(fields["reduction"], config.prefix)
        except (ValueError, TypeError, AttributeError):
            refuse("reduction")
        if not within(own, config.depth) or not own.fits(config.dim):
            refuse("reduction")
        if fields.get("appended") != own.appends:
            refuse("appended")
        if len(thresholds) != len(own.boundaries()):
            refuse("thresholds")
    elif len(thresholds) != len(fields["stages"]):
        refuse("thresholds")
    try:
        facts.recorded(config, fields)
    except ValueError as error:
        refuse(str(error))
    try:
        config_of(fields)
    except (UserError, TypeError) as error:
        raise UserError(
            f"arch, image_size and stages in the sidecar of {artefact} do not go together "
            f"({str(error).partition(';')[0]}); make {artefact} again"
        ) from None


def boundaries_of(fields: dict[str, Any]) -> list[float | None]:
    """As `ViT.boundaries`, from a sidecar; empty when dense."""
    if "reduction" in fields and fields["adaptive"]:
        return list(fields["thresholds"]) or [None] * len(fields["reduction"]["blocks"])
    return list(fields["thresholds"])


def method_of(fields: dict[str, Any]) -> Reduction | None:
    """The method that a sidecar describes, without what it learned; None for AS-ViT's own, before
    the blocks of the stages."""
    if "reduction" not in fields:
        return None
    with torch.device("meta"):
        return restored(fields["reduction"], fields.get("prefix", 1))


def config_of(fields: dict[str, Any]) -> ArchConfig:
    """The architecture that a sidecar describes, with its own preprocessing, heads and epsilon."""
    row = described(fields["arch"], fields.get("architecture"))
    config = row.at(fields["image_size"], fields["num_classes"])
    config = config.with_stages(fields["stages"]) if fields.get("stages") else config
    return facts.recorded(config, fields)


def source_file(artefact: Path, record: dict[str, Any], noun: str, maker: str) -> Path:
    """Where an artefact's source is.

    Where it was given, at the file that a link there led to, beside the artefact under either
    name, or there under any name with the recorded size and sha256.

    Args:
        record: a sidecar's `source`, as `sidecar.source_of` makes it; older ones hold only `path`
            and `sha256`.
        noun: what the source is.
        maker: the command that made the artefact.

    Raises:
        UserError: it is gone, or has other contents now.
    """
    recorded, given = Path(record["path"]), Path(str(record.get("given") or record["path"]))
    folder = artefact.absolute().parent
    named = (given, recorded, folder / given.name, folder / recorded.name, _packaged(given.name),
             _in_hub(record.get("hub"), given.name))  # fmt: skip
    there = [path for path in dict.fromkeys(filter(None, named)) if _is_file(path)]
    left = MOST_BYTES  # of which so many are read, however many files have the size
    for path in (*there, *_of_size(folder, record.get("size"))):
        left -= path.stat().st_size
        if left < 0:
            break
        with contextlib.suppress(PermissionError):
            if sha256(path) == record["sha256"]:
                return _with_shards(path, record.get("shards"), artefact, maker)
    again = f"run `asvit-deploy {maker}` again"
    if closed := [path for path in there if not os.access(path, os.R_OK)]:
        raise UserError(f"{closed[0]} may not be read; check its permissions, or {again}")
    if there:
        raise UserError(f"{there[0]} changed since {artefact} was made from it; {again}")
    raise UserError(f"the {noun} of {artefact}, {given}, is gone; put it back, or {again}")


def _packaged(name: str) -> Path | None:
    """The package's own checkpoint of that name: each installation has it in another place."""
    with contextlib.suppress(UserError):
        if (packaged := default_checkpoint()).name == name:
            return packaged
    return None


def _in_hub(record: Any, name: str) -> Path | None:
    """A file of a repository in this machine's cache, which may be elsewhere than it was."""
    if not isinstance(record, dict):
        return None
    repository, revision = record.get("repository"), record.get("revision")
    if not isinstance(repository, str) or not isinstance(revision, str):
        return None
    from asvit_deploy.checkpoints.hub import cached_file

    return cached_file(repository, revision, name)


def _with_shards(index: Path, shards: Any, artefact: Path, maker: str) -> Path:
    """The file, once the shards that it names, if any, are those that were read."""
    again = f"run `asvit-deploy {maker}` again"
    for name, digest in shards.items() if isinstance(shards, dict) else ():
        shard = index.with_name(str(name))
        if not _is_file(shard):
            raise UserError(f"a shard of {artefact}'s checkpoint, {shard}, is gone; put it back, "
                            f"or {again}")  # fmt: skip
        if sha256(shard) != digest:
            raise UserError(f"{shard} changed since {artefact} was made from it; {again}")
    return index


def _is_file(path: Path) -> bool:
    """As `Path.is_file`; what lies in a closed folder is as good as gone."""
    try:
        return path.is_file()
    except OSError:
        return False


def _of_size(folder: Path, size: Any) -> Iterator[Path]:
    """The files of a folder that are of this size, so that no other need be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_file() and entry.stat().st_size == size:
                    yield Path(entry.path)


def reference_model(artefact: Path, fields: dict[str, Any], dense: bool = False) -> ViT:
    """The PyTorch model that an artefact must agree with; `dense` gives its dense twin.

    Raises:
        UserError: as `source_file` and `load_checkpoint`.
    """
    return build_model(reference_checkpoint(artefact, fields), dense=dense)


def reference_checkpoint(artefact: Path, fields: dict[str, Any]) -> Checkpoint:
    """The checkpoint of an artefact, with the facts and the method that the artefact records.

    Raises:
        UserError: as `source_file` and `load_checkpoint`.
    """
    checkpoint = source_checkpoint(artefact, fields)
    if "reduction" in fields:  # which dense weights do not say, or say without the file's bounds
        checkpoint = replace(checkpoint, adaptive=True, reduction=fields["reduction"])
    return checkpoint


def source_checkpoint(artefact: Path, fields: dict[str, Any]) -> Checkpoint:
    """As `reference_checkpoint`, with what the checkpoint itself says of a method.

    Raises:
        UserError: likewise.
    """
    record = fields["source"]
    path = source_file(artefact, record, "checkpoint", "export")
    arch = fields["arch"] if fields["arch"] in ARCHS else None
    return load_checkpoint(
        path, fields["image_size"], arch, ema=record.get("ema", False),
        recorded=config_of(fields),
    )  # fmt: skip
