"""What a file of our own says of itself must fit what it holds: later steps take it from there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from asvit_deploy.bounded import parse_json
from asvit_deploy.checkpoints import facts
from asvit_deploy.checkpoints.damage import check_seal, is_sealed
from asvit_deploy.checkpoints.reading import quoted
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import described, description
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.reduction.methods import restored, within

FORMAT = "asvit-deploy"
# 2 has stages of its own, 3 other facts than the arch's, 4 another method than thresholds, 5 an
# architecture that is no row of the table, 6 its network in another file; what came before would
# ignore them.
SCHEMA = 6
FACTS, METHOD, TRAITS, BESIDE = 3, 4, 5, 6


def parsed(value: str) -> Any:
    """JSON, or the text as it is."""
    try:
        return parse_json(value)
    except ValueError:
        return value


def stated(config: ArchConfig) -> dict[str, str]:
    """What a file of ours says of its network; the schema is one that has all of it."""
    own = {
        "format": FORMAT,
        "schema": "1",
        "arch": config.name,
        "image_size": str(config.image_size),
        "num_classes": str(config.num_classes),
    }
    traits = description(config)
    row, known = described(config.name, traits), facts.fields_of(config)
    if config.stages != row.stages:
        own |= {"schema": "2", "stages": json.dumps(config.stages)}
    if known != facts.fields_of(row):
        own["schema"] = str(FACTS)
    if traits is not None:
        own |= {"schema": str(TRAITS), "architecture": json.dumps(traits)}
    return own | {name: json.dumps(value) for name, value in known.items()}


def check_schema(metadata: Mapping[str, str]) -> None:
    """Refuse a file of a newer schema, or one that lacks what every schema has."""
    schema = metadata.get("schema", "")
    if not (schema.isascii() and schema.isdecimal()):
        raise Refused("does not say its schema; write it again with this tool")
    if len(schema.lstrip("0")) > 9 or int(schema) > SCHEMA:
        raise Refused(
            f"has schema {quoted(schema)[1:-1]}, this version reads up to {SCHEMA}; update the tool"
        )
    if not {"arch", "image_size", "num_classes"} <= metadata.keys():
        raise Refused(
            "does not say its arch, image_size and num_classes; write it again with this tool"
        )


def stated_config(metadata: Mapping[str, str]) -> ArchConfig:
    """The architecture that a file of ours says it is: a row of the table, or one of its own."""
    traits = parsed(metadata["architecture"]) if "architecture" in metadata else None
    name = metadata["arch"]
    try:
        if traits is not None and not isinstance(traits, dict):
            raise ValueError("architecture")
        return described(name, traits)
    except ValueError as error:
        raise Refused(
            f"says it is {quoted(name)}, which no network here is ({error}); write it again with "
            "this tool"
        ) from error


def check_sealed(content: Any, metadata: Mapping[str, str]) -> None:
    """Compare a file that has a digest with it; older files have none, nor have those of others."""
    if is_sealed(metadata):
        check_seal(content, metadata)


def check_metadata(metadata: Mapping[str, str], config: ArchConfig) -> None:
    """What our own file says of itself must fit its tensors: later steps take it from here."""
    for key, holds in (("image_size", config.image_size), ("num_classes", config.num_classes)):
        if metadata[key] != str(holds):
            raise Refused(
                f"says {key} {quoted(metadata[key])} but holds {holds}; write it again with this "
                "tool"
            )
    if "budget" in metadata and not 0 < _number(metadata["budget"]) < math.inf:
        raise Refused(
            f"says budget {quoted(metadata['budget'])}, which is no number above 0; write it "
            "again with this tool"
        )
    if "classes" in metadata:
        names = parsed(metadata["classes"])
        fits = isinstance(names, list) and len(names) == config.num_classes
        if not fits or not all(isinstance(name, str) for name in names):
            raise Refused(
                f"says classes {quoted(metadata['classes'])}, which is no JSON list of "
                f"{config.num_classes} names; write it again with this tool"
            )


def staged(metadata: Mapping[str, str], config: ArchConfig) -> ArchConfig:
    """The architecture with the stages that the file names, where they are not its usual ones."""
    if "stages" not in metadata:
        return config
    stages = parsed(metadata["stages"])
    try:
        return config.with_stages(stages if isinstance(stages, list) else [])
    except (UserError, TypeError) as error:
        raise Refused(
            f"says stages {quoted(metadata['stages'])}, which do not fit {config.name}; write it "
            "again with this tool"
        ) from error


def method_of(metadata: Mapping[str, str], config: ArchConfig) -> dict[str, Any] | None:
    """The fields of a method other than thresholds, once they fit the network."""
    if "reduction" not in metadata:
        return None
    fields = parsed(metadata["reduction"])
    try:
        with torch.device("meta"):
            made = restored(fields if isinstance(fields, dict) else {}, config.prefix)
        if not within(made, config.depth) or not made.fits(config.dim):
            raise ValueError("cuts outside the network, or of another width")
    except (ValueError, TypeError) as error:
        raise Refused(
            f"says reduction {quoted(metadata['reduction'])}, which does not fit {config.name}; "
            "write it again with this tool"
        ) from error
    return fields


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
