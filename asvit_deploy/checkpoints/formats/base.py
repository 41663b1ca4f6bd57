"""What a format is: whose names a state dict has, and how they become ours, which are timm's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from asvit_deploy.checkpoints.refused import Refused

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Translated:
    """A network under our own names.

    Attributes:
        state: as `ViT.state_dict` has it; in the file's own types, not yet checked.
        traits: those of `models.config.ArchConfig` that the format settles and shapes do not tell,
            such as `head`.
        left_out: names in the file that its output does not need.
        notes: what the format decided and a load must say, a line each.
        resizes: whether the family's own code takes pictures of any size, to which it resizes the
            positions.
    """

    state: dict[str, Tensor]
    traits: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    resizes: bool = False


class Format(Protocol):
    """Names that one library or release gives to the weights of a ViT.

    Attributes:
        name: what messages call it.
        blocks, others: what names under a network's prefix begin with, in its blocks and before
            them; where both are found lies a network.
        model_types: values of `model_type` in a transformers config whose weights these are.
    """

    name: ClassVar[str]
    blocks: ClassVar[str]
    others: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    @staticmethod
    def recognises(state: State) -> bool:
        """Whether a network's names, without their prefix, are of this format."""
        ...

    @staticmethod
    def translate(state: State) -> Translated:
        """The network under our names.

        Raises:
            Refused: it is of this format, and yet no network that is known here.
        """
        ...


def rename(state: State, table: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Names by the first pattern that fits them whole; the others stay.

    Raises:
        Refused: two become one.
    """
    rules = [(re.compile(pattern), ours) for pattern, ours in table]
    made: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        match = next(((m, ours) for rule, ours in rules if (m := rule.fullmatch(key))), None)
        name = key if match is None else match[0].expand(match[1])
        if name in made:
            raise Refused(f"has both {key} and {origin[name]}, which are one; leave one of them")
        made[name], origin[name] = value, key
    return made


def without(state: dict[str, Tensor], pattern: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state less the names that the pattern fits whole, and those names."""
    gone = tuple(key for key in state if re.fullmatch(pattern, key))
    return {key: value for key, value in state.items() if key not in gone}, gone


def fused_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`attn.q.weight`, `attn.k.weight`, `attn.v.weight` of each block as one `attn.qkv.weight`.

    A projection without a bias beside others with one counts as zero.

    Raises:
        Refused: one of the three is missing, or they are not of one shape and type.
    """
    made: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)", key):
            parts.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            made[key] = value
    for name, three in parts.items():
        given = next(iter(three.values()))
        if name.endswith("bias"):
            three = {part: three.get(part, torch.zeros_like(given)) for part in "qkv"}
        if len(three) < 3:
            raise Refused(f"lacks a part of {name}; pass a complete checkpoint")
        if len({(value.shape, value.dtype) for value in three.values()}) > 1 or given.ndim == 0:
            raise Refused(f"has parts of {name} that do not fit each other; pass an unmodified one")
        made[name] = torch.cat([three["q"], three["k"], three["v"]])
    return made
