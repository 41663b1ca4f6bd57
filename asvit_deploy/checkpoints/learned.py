"""What a method learned, in a file of another's or in one of ours without its network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from asvit_deploy.bounded import parse_json
from asvit_deploy.checkpoints.reading import listed, metadata_at, quoted
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.reduction.dynamicvit import KEEP_RATE, DynamicViT, published_counts
from asvit_deploy.reduction.ltmp import LTMP, NEVER

BACKBONE = "backbone"  # the metadata's key: the network's file, by name and sha256
# Names as the releases write them, and as ours.
NAMES = (
    (r"score_predictor\.(\d+)\.((?:in|out)_conv\.\d+\.(?:weight|bias))",
     r"method.predictors.\1.\2"),
    (r"blocks\.(\d+)\.(merge|prune)_masker\.threshold", r"method.\2.\1"),
)  # fmt: skip
_PREDICTOR = re.compile(r"method\.predictors\.(\d+)\.")
_THRESHOLD = re.compile(r"method\.(merge|prune)\.(\d+)$")


@dataclass(frozen=True)
class Learned:
    """A method that a file of others holds.

    Attributes:
        state: the file's, the method's tensors as ours.
        fields: as `Reduction.fields`.
        notes: what was decided, a line each.
    """

    state: dict[str, Tensor]
    fields: dict[str, Any]
    notes: tuple[str, ...] = ()


def method_named(state: Mapping[str, Any]) -> str | None:
    """The method whose parameters stand in a state dict under the release's names."""
    if any(re.fullmatch(NAMES[0][0], key) for key in state):
        return "DynamicViT"
    return "LTMP" if any(re.fullmatch(NAMES[1][0], key) for key in state) else None


def learned_in(
    state: Mapping[str, Tensor], config: ArchConfig, options: Mapping[str, Mapping[str, Any]]
) -> Learned | None:
    """A method's parameters among a network's, under our names; None where there are none.

    Args:
        options: what the file says of how it was trained.

    Raises:
        Refused: there are not as many as the method has cuts.
    """
    if any(map(_PREDICTOR.match, state)):
        return _dynamicvit(dict(state), config, options)
    if any(map(_THRESHOLD.match, state)):
        return _ltmp(dict(state), config)
    return None


def _dynamicvit(
    state: dict[str, Tensor], config: ArchConfig, options: Mapping[str, Mapping[str, Any]]
) -> Learned:
    there = sorted({int(match[1]) for key in state if (match := _PREDICTOR.match(key))})
    blocks = DynamicViT.usual_blocks(config.stages, config.depth)
    if there != list(range(len(blocks))):
        raise Refused(
            f"has the predictors {listed(map(str, there))} where a DynamicViT of {config.depth} "
            f"blocks has {len(blocks)}, numbered from 0; pass an unmodified checkpoint"
        )
    given = {key: said["base_rate"] for key, said in options.items() if "base_rate" in said}
    rate, notes = KEEP_RATE, (
        f"its keep rate is assumed to be {KEEP_RATE}: nothing in the file says it (base_rate); "
        "`calibrate --budget` settles other counts",
    )  # fmt: skip
    for key, value in given.items():
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise Refused(
                f"says {key}.base_rate {quoted(value)}, which is no share of tokens above 0; pass "
                "an unmodified checkpoint"
            )
        rate, notes = float(value), (f"its keep rate is {value:g} ({key}.base_rate)",)
    made = {
        "name": DynamicViT.name, "blocks": list(blocks), "dim": config.dim,
        "kept": published_counts(config.image_tokens, len(blocks), rate),
    }  # fmt: skip
    return Learned(state, made, notes)


def _ltmp(state: dict[str, Tensor], config: ArchConfig) -> Learned:
    found = {
        kind: sorted(int(m[2]) for k in state if (m := _THRESHOLD.match(k)) and m[1] == kind)
        for kind in ("merge", "prune")
    }
    blocks = list(range(config.depth))
    for kind, there in found.items():
        if there != blocks:
            raise Refused(
                f"has {len(there)} of LTMP's {kind} thresholds where {config.name} has "
                f"{config.depth} blocks; pass a complete checkpoint"
            )
    notes: tuple[str, ...] = ()
    if config.prefix % 2:
        notes = (
            "its release pairs rows from the class token on, and this tool image tokens: of each "
            "two neighbours the other one merges, so outputs differ from its own code's",
        )
    if config.saving().last_block == "prefix":
        last = blocks.pop()
        del state[f"method.merge.{last}"], state[f"method.prune.{last}"]
        notes += ("left out, not needed for its output: LTMP's thresholds of the last block",)
    for block in blocks:
        # There pairs merge above a cosine; here below 1 - cosine. 1 and 0 are its "never".
        for kind in ("merge", "prune"):
            key = f"method.{kind}.{block}"
            if state[key].numel() != 1 or not state[key].is_floating_point():
                raise Refused(f"has {key} of shape {list(state[key].shape)}, no threshold; pass an "
                              "unmodified checkpoint")  # fmt: skip
            value = state[key].float().reshape(())
            state[key] = (1 - value if kind == "merge" else value).clamp_min(NEVER)
    return Learned(state, {"name": LTMP.name, "blocks": blocks}, notes)


# --- a file of ours that lies beside its network ------------------------------------------------


def record_of(path: Path, backbone: Path) -> str:
    """What a file says of its network's.

    Raises:
        UserError: it lies in another folder, or would be replaced.
    """
    if os.path.exists(path) and path.samefile(backbone):
        raise UserError(f"{path} is not written: it is the network that this is of; name another")
    if backbone.absolute().parent.resolve() != path.absolute().parent.resolve():
        raise UserError(f"{path} is not written: it must lie beside its network, {backbone}")
    return json.dumps({"name": backbone.name, "sha256": sha256(backbone)})


def backbone_of(path: Path, metadata: Mapping[str, str]) -> Path:
    """The network that a file's numbers are of, which lies beside it.

    Raises:
        Refused: it does not, or is another one.
    """
    try:
        name, digest = _recorded(metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"says {BACKBONE} {quoted(metadata[BACKBONE])}, which names no file beside it; write "
            "it again with this tool"
        ) from error
    there = path.parent / name
    if not there.is_file():
        raise Refused(
            f"holds what a method learned and not its network, {name} (sha256 {digest[:12]}...), "
            "which is not beside it; put it there"
        )
    if (own := sha256(there)) != digest:
        raise Refused(
            f"is of another network than the {name} beside it (sha256 {own[:12]}... where "
            f"{digest[:12]}... is meant); put its own there"
        )
    return there


def check_same(network: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    """Refuse a network that is not read as it was when a file was made on it.

    Args:
        network: what it says of itself today, as `ours.stated`.
    """
    for key in sorted(network.keys() - {"schema"}):
        if (said := metadata.get(key)) != network[key]:
            raise Refused(
                f"was made on a network with {key} {quoted(said)}, and what lies beside it has "
                f"{quoted(network[key])}; put back what lay beside that, or make the file again"
            )


def backbone_named(path: Path) -> Path | None:
    """The file beside it that a file of ours names as its network, if it is there."""
    try:
        there = path.parent / _recorded(metadata_at(path))[0]
    except (ValueError, KeyError, TypeError):
        return None
    return there if os.path.isfile(there) else None


def _recorded(metadata: Mapping[str, str]) -> tuple[str, str]:
    """Name and sha256 of a network's file."""
    record = parse_json(metadata[BACKBONE])
    name, digest = record["name"], record["sha256"]
    if not isinstance(name, str) or not isinstance(digest, str) or Path(name).name != name:
        raise ValueError(BACKBONE)
    return name, digest


def joined(
    state: Mapping[str, Tensor], metadata: dict[str, str], backbone: Any,
    check: Callable[[dict[str, Tensor], ArchConfig], tuple[dict[str, Any], dict[str, Tensor]]],
) -> Any:  # fmt: skip
    """A network's checkpoint with what a method learned on it.

    Args:
        backbone: a `Checkpoint`.
        check: whole state, config -> the method's fields and the state, once they fit.
    """
    if backbone.adaptive:
        raise Refused(f"is of {backbone.path}, whose tokens leave already; put a dense one there")
    fields, whole = check({**backbone.state, **state}, backbone.config)
    note = f"its network is {backbone.path.name} beside it"
    return replace(
        backbone, state=whole, adaptive=True, reduction=fields,
        metadata={**backbone.metadata, **metadata}, notes=(*backbone.notes, note),
    )  # fmt: skip
