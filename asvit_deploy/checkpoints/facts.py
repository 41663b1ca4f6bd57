"""Facts that weights cannot tell: how pictures are prepared, heads, the norms' epsilon.

They come from an option, our own file's metadata, the config files beside a checkpoint, or what
it holds of its training. What none of these says is assumed by the row of the table, and the line
that `Origins` makes always says which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from asvit_deploy.bounded import parse_json
from asvit_deploy.checkpoints.fact_source import FactSource, checked, meant
from asvit_deploy.checkpoints.reading import quoted
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig, HeadName, Preprocessing

_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
_OF_NETWORK = ("heads", "eps", "activation", "pooling", "positions_resize")
_FACTS = (*_PREPROCESSING, *_OF_NETWORK)
ASSUMED = "assumed"
_OPTION = "option"
_OURS = "its metadata"


@dataclass(frozen=True)
class Given:
    """Facts that the user gives; None where not.

    Raises:
        UserError: one is not what it must be.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    heads: int | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.settled().items():
            if checked(name, value) is None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {quoted(value)} cannot be used; pass {meant(name)}")

    def settled(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def options(self) -> list[str]:
        """Their options, as the command line has them."""
        return [f"--{name.replace('_', '-')}" for name in self.settled()]


NOTHING_GIVEN = Given()


@dataclass(frozen=True)
class Origins:
    """Where each fact came from.

    Attributes:
        by_fact: `assumed`, or what said it, by the fact's name.
        line: the same in words, for stderr.
    """

    by_fact: dict[str, str] = field(default_factory=dict)
    line: str = ""

    def fields(self) -> dict[str, Any]:
        """As sidecars and metadata keep it."""
        of = {name: origin for name, origin in self.by_fact.items() if name in _PREPROCESSING}
        network = {f"{name}_from": self.by_fact.get(name, ASSUMED) for name in _OF_NETWORK}
        return {"preprocessing_from": of, **network}

    def metadata(self) -> dict[str, str]:
        """The same for `save_checkpoint`; nothing where there was no load."""
        return {k: json.dumps(v) for k, v in self.fields().items()} if self.by_fact else {}


def seen_alike(config: ArchConfig, origins: Origins, other: Preprocessing) -> ArchConfig:
    """The architecture with another network's preprocessing, where its own is only assumed."""
    assumed = [name for name in _PREPROCESSING if origins.by_fact.get(name, ASSUMED) == ASSUMED]
    rules = {name: getattr(other, name) for name in assumed}
    return replace(config, preprocessing=replace(config.preprocessing, **rules))


# --- our own files --------------------------------------------------------------------------------


def own_source(
    metadata: Mapping[str, str], config: ArchConfig
) -> tuple[FactSource, dict[str, str]]:
    """What our own file's metadata says, and where it had that from.

    Older files say nothing: they were made with their arch's own row.

    Raises:
        ValueError: a field is not what it must be.
    """
    stored = {k: parse_json(metadata[k]) for k in _FIELDS if k in metadata}
    known = recorded(config, stored)
    source = FactSource(_OURS)
    source.says = {**vars(known.preprocessing), "pooling": "mean" if known.averages else "class",
                   **{name: getattr(known, name) for name in _OF_NETWORK if name != "pooling"}
                   }  # fmt: skip
    origins = stored.get("preprocessing_from", {}) if "preprocessing" in stored else {}
    if not isinstance(origins, dict) or not all(isinstance(o, str) for o in origins.values()):
        raise ValueError("preprocessing_from")
    of = dict.fromkeys(_FACTS, f"its arch {config.name}")
    of |= {name: origin for name, origin in origins.items() if name in _PREPROCESSING}
    for name in _OF_NETWORK:
        origin = stored.get(f"{name}_from", of[name])
        if not isinstance(origin, str):
            raise ValueError(f"{name}_from")
        of[name] = origin
    return source, of


_FIELDS = ("preprocessing", "heads", "eps", "preprocessing_from",
           *(f"{name}_from" for name in _OF_NETWORK))  # fmt: skip


def fields_of(config: ArchConfig) -> dict[str, Any]:
    """The facts of a network, as sidecars and metadata keep them."""
    return {
        "preprocessing": config.preprocessing.fields(), "heads": config.heads, "eps": config.eps,
    }  # fmt: skip


def recorded(config: ArchConfig, fields: Mapping[str, Any]) -> ArchConfig:
    """The architecture with the facts that a sidecar or our own metadata records.

    Raises:
        ValueError: a field is not what it must be; it names the field.
    """
    rules = config.preprocessing
    if "preprocessing" in fields:
        stored = fields["preprocessing"]
        needed = set(_PREPROCESSING) - {"crop_mode"}
        if not isinstance(stored, Mapping) or not needed <= stored.keys() <= set(_PREPROCESSING):
            raise ValueError("preprocessing")
        known = {name: checked(name, value) for name, value in stored.items()}
        if None in known.values():
            raise ValueError("preprocessing")
        rules = Preprocessing(**known)
    heads, eps = fields.get("heads", config.heads), fields.get("eps", config.eps)
    if checked("heads", heads) is None or config.dim % heads:
        raise ValueError("heads")
    if checked("eps", eps) is None:
        raise ValueError("eps")
    last = fields.get("last_block", "all")
    if last not in ("all", config.saving().last_block):
        raise ValueError("last_block")
    return replace(config, preprocessing=rules, heads=heads, eps=float(eps), last_block=last)


def as_recorded(config: ArchConfig, like: ArchConfig) -> ArchConfig:
    """The architecture with all the facts of an earlier load of the same weights."""
    config = recorded(config, fields_of(like))
    head = like.head if like.head in _POOLINGS.get(config.head, ()) else config.head
    how = like.positions_resize
    return replace(config, activation=like.activation, positions_resize=how, head=head,
                   last_block=like.last_block)  # fmt: skip


# What a head becomes by what is said of the pooling: there are no other layers for it.
_POOLINGS: dict[str, tuple[HeadName, ...]] = {
    "class": ("class", "mean"), "mean_norm": ("mean_norm", "class"),
}  # fmt: skip


# --- who wins -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What is known of a file before its facts are settled.

    Attributes:
        config: what its names and shapes say it is, at the file's own size.
        sized: the user asked for an image size, so that what is said of it does not matter.
        named: the user said which architecture it is, so that no name matters.
        beside: what the config files of the checkpoint say.
        family: whose ways are assumed where nothing else is known.
        resizes: its processor's pictures may be of another size than its positions.
    """

    config: ArchConfig
    sized: bool
    named: bool
    beside: tuple[FactSource, ...]
    family: str
    resizes: bool = False


def settle(
    loaded: Loaded, given: Given, own: tuple[FactSource, dict[str, str]] | None,
    within: list[FactSource],
) -> tuple[ArchConfig, Origins]:  # fmt: skip
    """The architecture with every fact settled, and where each came from.

    Raises:
        Refused: a source cannot be obeyed, disagrees with the weights or with another one, and no
            option settles it.
        UserError: a source is broken, or an option does not fit the weights.
    """
    config, options = loaded.config, given.settled()
    heads = options.get("heads")
    if heads is not None and config.dim % heads:
        fits = [h for h in range(1, config.dim + 1) if config.dim % h == 0]
        near = min(fits, key=lambda h: abs(h - heads))
        raise UserError(
            f"--heads {heads} does not divide the width {config.dim} of {config.name}; pass a "
            f"divisor, such as {near}"
        )
    sources = [*([own[0]] if own else []), *loaded.beside, *within]
    for source in sources:
        _check_source(source, loaded, options)
    chosen: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name in _FACTS:
        if name in options:
            chosen[name], origins[name] = options[name], f"{_OPTION} --{name.replace('_', '-')}"
            continue
        # An option for the crop settles how it is made, too.
        settled = name == "crop_mode" and "crop_pct" in options
        found = _first(name, sources, settled)
        if found is not None:
            value, source = found
            chosen[name] = value
            origins[name] = own[1][name] if own and source is own[0] else source.name
        else:
            origins[name] = ASSUMED
    rules = {name: chosen[name] for name in _PREPROCESSING if name in chosen}
    named = {name: chosen[name] for name in _OF_NETWORK if name in chosen and name != "pooling"}
    if "pooling" in chosen and own is None:
        named["head"] = _pooled(config, chosen["pooling"], origins["pooling"])
    config = replace(config, preprocessing=replace(config.preprocessing, **rules), **named)
    if config.preprocessing.crop_mode == "center":  # which goes without saying
        del origins["crop_mode"]
    ours = own is not None
    return config, Origins(origins, _line(config, origins, loaded, ours))


def _pooled(config: ArchConfig, pooling: str, origin: str) -> HeadName:
    """The head, once what it reads is settled.

    Raises:
        Refused: it cannot read that.
    """
    if pooling == "mean" and not (config.averages or config.head == "class"):
        raise Refused(
            f"averages its tokens, as {origin} says, and has no head for that average; this "
            "version computes such networks with a head of classes alone: pass one of these"
        )
    if pooling == "mean":
        return "mean" if config.head == "class" else config.head
    # A norm of each token, which is as well behind the choice of one.
    return "class" if config.head == "mean_norm" else config.head


def _check_source(source: FactSource, loaded: Loaded, options: Mapping[str, Any]) -> None:
    """Refuse what a source says that cannot be obeyed, or that is not true of the weights."""
    for name, what in source.cannot.items():
        option = {"crop_mode": "crop_pct"}.get(name, name)
        if option not in options:
            known = f"; pass --{option.replace('_', '-')}" if option in vars(NOTHING_GIVEN) else ""
            advice = known or "; this version does not compute such a network"
            advice = "" if "; " in what else advice
            raise Refused(f"cannot be loaded: {source.name} says {what}{advice}")
    config, settled = loaded.config, set()
    if loaded.sized or (loaded.resizes and source.pictures is not None):
        settled.add("image_size")
    if config.output == "embedding":
        settled.add("num_classes")
    for name, word, value in source.weights:
        if name == "projection" and config.head != "projection":
            continue
        attribute = {"width": "dim", "projection": "num_classes"}.get(name, name)
        holds = getattr(config, attribute)
        by_name = loaded.named and word.endswith(f": {name}")
        same = value == holds if type(value) is int else type(value) is float and isinstance(
            holds, float) and math.isclose(value, holds)  # fmt: skip
        if name in settled or by_name or same:
            continue
        raise Refused(
            f"holds {name.replace('_', ' ')} {holds} where {source.name} says {word} "
            f"{quoted(value)}: one of them is another network's; correct or remove what it says"
        )
    heads = source.says.get("heads")
    if heads is not None and config.dim % heads and "heads" not in options:
        raise Refused(
            f"has width {config.dim}, which the {heads} heads of {source.name} do not divide; pass "
            "--heads"
        )


def _equal(name: str, a: Any, b: Any) -> bool:
    if name in ("mean", "std"):
        return all(abs(x - y) <= 1e-3 for x, y in zip(a, b))
    if name == "crop_pct":
        return abs(a - b) <= 1e-3
    return math.isclose(a, b, rel_tol=1e-6) if name == "eps" else a == b


def _first(name: str, sources: list[FactSource], settled: bool) -> tuple[Any, FactSource] | None:
    """The first that says a fact, once those that say it agree; what is said outright comes
    before what a model's name stands for."""
    for place in ("says", "stands_for"):
        found = [(getattr(s, place)[name], s) for s in sources if name in getattr(s, place)]
        if not found:
            continue
        value, first = found[0]
        for other, source in found[1:]:
            # Our own file is the later one: what it was made from is not asked again.
            if not (settled or first.name == _OURS or _equal(name, value, other)):
                option = "--crop-pct" if name == "crop_mode" else f"--{name.replace('_', '-')}"
                raise Refused(
                    f"has two accounts of its {name}: {first.name} says {_shown(value)}, "
                    f"{source.name} says {_shown(other)}; pass {option}, or correct one"
                )
        return value, first
    return None


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.4g}" if len(set(value)) == 1 else " ".join(f"{v:.4g}" for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ambiguous(config: ArchConfig) -> bool:
    """Whether the activation needs a word: GELU goes without saying but in CLIPs, which have
    either."""
    return config.activation != "gelu" or config.norm_pre


def _line(config: ArchConfig, origins: Mapping[str, str], loaded: Loaded, ours: bool) -> str:
    """All facts by where they came from, in one line."""
    rules, groups = config.preprocessing, dict[str, list[str]]()
    words = {
        "mean": f"mean {_shown(rules.mean)}", "std": f"std {_shown(rules.std)}",
        "crop_pct": f"crop {rules.crop_pct:.4g}", "interpolation": rules.interpolation,
        "crop_mode": {"squash": "squashed"}.get(rules.crop_mode, ""),
        "heads": f"{config.heads} head{'s' * (config.heads > 1)}",
        "eps": f"eps {config.eps:g}" if config.eps != loaded.config.eps else "",
        "activation": config.activation if _ambiguous(config) else "",
        "pooling": "mean of the tokens" if config.head in ("mean", "mean_norm") else "",
    }  # fmt: skip
    for name, word in words.items():
        if word and name in origins:
            groups.setdefault(origins[name], []).append(word)
    parts = []
    for origin, group in groups.items():
        what = f"assumed ({loaded.family}'s)" if origin == ASSUMED else f"from {origin}"
        parts.append(f"{', '.join(group)} {what.replace(f'from {_OPTION} ', 'by ')}")
    return "; ".join(parts) + (", as its metadata says" if ours else "")
