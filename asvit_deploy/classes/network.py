"""The names of a network's outputs, and where they came from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.classes import imagenet
from asvit_deploy.classes.name_files import Unusable, names_of_config, read_names
from asvit_deploy.errors import UserError

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.load import Checkpoint

Say = Callable[[str], None]

# Values of the field `classes_from`, next to "--classes FILE" and what `finetune` writes.
OWN = "the checkpoint"
BESIDE = "config.json beside the checkpoint"
ASSUMED = "ImageNet-1k's names, assumed"


@dataclasses.dataclass(frozen=True)
class ClassNames:
    """What a network's outputs are called, in their order; all different but in a file that some
    other tool wrote.

    Attributes:
        origin: as the sidecar's `classes_from`.
    """

    names: tuple[str, ...]
    origin: str

    @property
    def firm(self) -> bool:
        """Whether the network itself or the user says so, rather than a file that lay there."""
        return self.origin not in (BESIDE, ASSUMED)


def given_names(path: Path, count: int, network: object) -> ClassNames:
    """The names of `--classes FILE` for a network with `count` outputs.

    Raises:
        UserError: see `read_names`; another number of them.
    """
    names = read_names(path)
    if len(names) != count:
        raise UserError(
            f"{path} names {len(names)} class{'es' * (len(names) != 1)} and {network} has {count} "
            f"output{'s' * (count != 1)}; name each of them once, in their order"
        )
    return ClassNames(tuple(names), f"--classes {path.name}")


def of_checkpoint(
    checkpoint: Checkpoint, given: Path | None, say: Say, assume: bool = True
) -> ClassNames | None:
    """The names of a checkpoint's outputs: those given, its own, those of the `config.json` beside
    it, or ImageNet-1k's; None where its output is an embedding.

    Args:
        given: `--classes`.
        say: called with a line on whatever was found, assumed or passed over.
        assume: take ImageNet-1k's where there are no others and the network is of its kind.

    Raises:
        UserError: see `given_names`; the `config.json` is cut or contradicts itself.
    """
    path, config, metadata = checkpoint.path, checkpoint.config, checkpoint.metadata
    if config.output == "embedding":
        _say_no_classes(path, given, say)
        return None
    own = None
    if "classes" in metadata:
        names = tuple(json.loads(metadata["classes"]))
        own = ClassNames(names, metadata.get("classes_from", OWN))
    if given is not None:
        return _instead(given_names(given, config.num_classes, path), own, path, say)
    if own is not None:
        return own
    if (beside := _beside(path, config.num_classes, say)) is not None:
        return beside
    return _assumed(path, config.name, config.num_classes, say) if assume else None


def of_fields(
    path: Path, fields: dict[str, Any], given: Path | None, say: Say
) -> ClassNames | None:
    """As `of_checkpoint`, for an artefact with these sidecar fields."""
    own, count = None, fields["num_classes"]
    if fields.get("output") == "embedding":
        _say_no_classes(path, given, say)
        return None
    if fields.get("classes"):
        own = ClassNames(tuple(fields["classes"]), str(fields.get("classes_from") or OWN))
    if given is not None:
        return _instead(given_names(given, count, path), own, path, say)
    if own is not None and not own.firm:
        say(f"{path}, class names: {own.origin}; --classes FILE gives others")
    return own or _assumed(path, fields["arch"], count, say)


def named(checkpoint: Checkpoint, found: ClassNames | None) -> Checkpoint:
    """The checkpoint with these names in its metadata, for what is made from it."""
    if found is None:
        return checkpoint
    more = {"classes": json.dumps(found.names), "classes_from": found.origin}
    return dataclasses.replace(checkpoint, metadata={**checkpoint.metadata, **more})


def _say_no_classes(path: Path, given: Path | None, say: Say) -> None:
    if given is not None:
        say(f"{path} gives embeddings and has no classes: --classes {given} is not looked at")


def _instead(given: ClassNames, own: ClassNames | None, path: Path, say: Say) -> ClassNames:
    if own is not None and own.origin != ASSUMED and own.names != given.names:
        i, (old, new) = _first_difference(own.names, given.names)
        say(f"{path} has other class names ({own.origin}); {given.origin} wins: output {i} is "
            f"{new!r}, not {old!r}")  # fmt: skip
    return given


def _first_difference(old: Sequence[str], new: Sequence[str]) -> tuple[int, tuple[str, str]]:
    return next((i, pair) for i, pair in enumerate(zip(old, new)) if pair[0] != pair[1])


def _beside(path: Path, count: int, say: Say) -> ClassNames | None:
    config = path.with_name("config.json")
    if not config.is_file():
        return None
    try:
        names = names_of_config(config)
    except Unusable as error:
        say(f"{error}: its class names are not used")
        return None
    except UserError as error:
        raise UserError(
            f"{error}; or move it away from {path.name}, or pass --classes FILE where there is that"
        ) from None
    if names is None:
        return None
    if len(names) != count:
        say(f"{config} names {len(names)} classes and {path} has {count} outputs: not used")
        return None
    say(f"{path}: class names from {config}")
    return ClassNames(tuple(names), BESIDE)


def _assumed(path: Path, arch: str, count: int, say: Say) -> ClassNames | None:
    from asvit_deploy.models.archs import ARCHS

    # An architecture whose own head has other classes was never one of ImageNet's.
    row = ARCHS.get(arch)
    if count != imagenet.CLASSES or (row and row.num_classes != imagenet.CLASSES):
        return None
    say(f"{path} has {count} outputs and no class names: {ASSUMED}; --classes FILE gives others")
    return ClassNames(imagenet.names(), ASSUMED)
