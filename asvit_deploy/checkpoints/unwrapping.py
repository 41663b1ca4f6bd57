"""Objects to a state dict: which of a file's tensors are the network, whatever wraps them.

Levels of dictionaries and prefixes of names mean the same: `{"state_dict": {"model.head.bias"}}`
is `state_dict.model.head.bias`, and the network is everything under `state_dict.model.`. Of
several networks the rule is: the weights that were trained before a moving average of them
(`ema=True` asks for that one), and before a teacher or a momentum encoder. Where that leaves two
that differ, none is taken.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asvit_deploy.checkpoints.bounds import LONGEST_NAME, MOST_NAMES, MOST_NETWORKS
from asvit_deploy.checkpoints.formats import FORMATS
from asvit_deploy.checkpoints.formats.base import Format
from asvit_deploy.checkpoints.reading import listed, quoted
from asvit_deploy.checkpoints.refused import Refused

# Under these names lies a moving average of the weights; that of another network follows it.
_AVERAGES = frozenset((
    "model_ema", "ema_model", "ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict",
    "ema_model_state_dict", "ema_weights", "ema_params", "averaged_model", "average_model",
    "swa_model", "swa_state_dict", "swa", "shadow",
))  # fmt: skip
_FOLLOWERS = frozenset((
    "teacher", "teacher_model", "momentum_encoder", "momentum_backbone", "target_encoder",
    "target_network",
))  # fmt: skip
# Wrappers that say nothing; others are named in a line.
_PLAIN = frozenset((
    "module", "model", "backbone", "state_dict", "model_state_dict", "net", "network",
))  # fmt: skip
# These stand wherever a part of a network was compiled, sharded or checkpointed.
_ANYWHERE = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# In the place of the head: what a self-supervised method trains and throws away.
_PROJECTOR = re.compile(r"head\.(?:\d+|mlp|layers|last_layer)\.")
_DEEPEST = 8  # levels; a file that has more is none of ours


@dataclass(frozen=True)
class Selected:
    """A network's tensors by its own names, and a line for everything that was decided or left."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    average: bool = False  # there is a moving average, taken or not


@dataclass
class _Flat:
    """All tensors by their full name, and what else lies on the levels that hold them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    levels: dict[str, str] = field(default_factory=dict)  # full name -> level that holds it


def options_in(content: Any) -> dict[str, dict[str, Any]]:
    """What a file says of how it was trained, by the key that says it."""
    found: dict[str, dict[str, Any]] = {}
    if not isinstance(content, dict):
        return found
    for key in ("args", "hyper_parameters", "hparams", "config", "opt"):
        options = content.get(key)
        options = vars(options) if isinstance(options, argparse.Namespace) else options
        if not isinstance(options, Mapping):
            continue
        flat = {name: value for name, value in options.items() if isinstance(name, str)}
        for inner in ("args", "hparams", "config", "model", "data"):
            nested = options.get(inner)
            nested = vars(nested) if isinstance(nested, argparse.Namespace) else nested
            if isinstance(nested, Mapping):
                flat = {**{n: v for n, v in nested.items() if isinstance(n, str)}, **flat}
        found[key] = flat
    return found


def select(content: Any, ema: bool) -> Selected:
    """The network among what a training script saved.

    Args:
        ema: take the moving average of the weights.

    Raises:
        Refused: there is no network, no average, or nothing says which of
            several is meant.
    """
    if not isinstance(content, dict):
        raise Refused(
            f"holds a {type(content).__name__}, not a state dict; save the model's state_dict()"
        )
    flat = _flattened(content)
    roots = _roots(flat)
    if len(roots) > MOST_NETWORKS:
        raise Refused(f"holds {len(roots)} networks; save the state_dict() of one of them")
    if not roots:
        return Selected(_without_network(content))
    averages, followers = _averages(content, flat, roots), _named(roots, _FOLLOWERS)
    live = [root for root in roots if root not in averages and root not in followers]
    if ema and not averages:
        raise Refused("holds no moving average of its weights; drop --ema")
    pool = averages if ema else live or averages or followers
    pool = [root for root in pool if root not in followers] or pool
    for root in pool:
        _check_tensors(root, roots, flat)
    chosen = _only(pool, roots, flat)
    own = _own(chosen, roots, flat)
    state = {key.removeprefix(chosen): value for key, value in own.items()}
    notes = _taken(chosen, roots, averages, ema)
    if "head.weight" not in state:
        projector = [key for key in state if _PROJECTOR.match(key)]
        state = {key: value for key, value in state.items() if key not in projector}
    else:
        projector = []
    beside = _beside(chosen, roots, flat) + (["head.* (a projector)"] if projector else [])
    if beside:
        notes.append(f"left out, no part of the network: {listed(beside)}")
    return Selected(state, tuple(notes), tuple(beside), bool(averages))


def _flattened(content: dict) -> _Flat:
    flat = _Flat()

    def walk(level: Mapping, prefix: str, depth: int) -> None:
        for key, value in level.items():
            text = key if isinstance(key, str) else quoted(key)
            if len(prefix) + len(text) > LONGEST_NAME:
                raise Refused(
                    f"has a name of {len(prefix) + len(text):,} characters ({quoted(text)}); "
                    "save the model's state_dict()"
                )
            name = _ANYWHERE.sub("", f"{prefix}{text}")
            if isinstance(key, str) and key.startswith("optim"):
                continue  # names of weights again, with what an optimiser keeps of each
            if isinstance(value, Tensor) and isinstance(key, str):
                if name in flat.tensors:
                    raise Refused(f"has {name} twice, on two levels; save the model's state_dict()")
                flat.tensors[name] = value
                flat.levels[name] = prefix
            elif isinstance(value, dict) and isinstance(key, str) and depth < _DEEPEST:
                walk(value, _ANYWHERE.sub("", f"{prefix}{key}."), depth + 1)
            else:
                flat.others.append(name)
                flat.levels.setdefault(name, prefix)
            if len(flat.levels) > MOST_NAMES:
                raise Refused(
                    "holds too many objects for a checkpoint; save the model's state_dict()"
                )

    walk(content, "", 0)
    return flat


def _roots(flat: _Flat) -> list[str]:
    """Prefixes under which a network lies: blocks, and something before them."""
    found: dict[str, None] = {}
    for form in FORMATS:
        blocks, others = ({m[1]: None for key in flat.tensors if (m := pattern.fullmatch(key))}
                          for pattern in _anchors(form))  # fmt: skip
        found.update({root: None for root in blocks if root in others})
    return list(found)


@functools.cache
def _anchors(form: type[Format]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Names in the blocks and before them, the shortest prefix apart."""
    blocks, others = (
        re.compile(rf"((?:.*?\.)??)(?:{own})", re.S) for own in (form.blocks, form.others)
    )
    return blocks, others


def _without_network(content: dict) -> dict[str, Tensor]:
    """The most likely state dict of a file that holds no network of ours."""
    kept = [content[k] for k in ("model", "state_dict") if isinstance(content.get(k), dict)]
    state = kept[0] if kept else content
    odd = [
        k if isinstance(k, str) else quoted(k)
        for k, v in state.items()
        if not (isinstance(k, str) and isinstance(v, Tensor))
    ]
    if odd or not state:
        why = f"{listed(odd)} are no weights" if odd else "there are no weights in it"
        raise Refused(f"is no state dict: {why}; save the model's state_dict()")
    return state


def _parts(root: str) -> list[str]:
    return root.split(".")[:-1]


def _named(roots: list[str], names: frozenset[str]) -> list[str]:
    return [root for root in roots if names & set(_parts(root))]


def _averages(content: dict, flat: _Flat, roots: list[str]) -> list[str]:
    """Prefixes of moving averages: by name, by a counter beside them, or by who wrote the file."""
    found = set(_named(roots, _AVERAGES))
    names = {*flat.tensors, *flat.others}
    found.update(root for root in roots if names & _counters(root))
    if any(root.startswith("current_model_state.") for root in roots):  # Lightning's averaging
        found.update(root for root in roots if root.startswith("state_dict."))
    by_dino = [options for options in options_in(content).values() if "momentum_teacher" in options]
    if by_dino or "dino_loss" in content or "ibot_loss" in content:
        found.update(root for root in roots if "teacher" in _parts(root))
    found.update(root for root in roots if "momentum_encoder" in _parts(root))
    return [root for root in roots if root in found]


def _counters(root: str) -> set[str]:
    """Where torch's AveragedModel would count: beside the module that it holds."""
    found = set()
    while root.endswith("module."):
        root = root.removesuffix("module.")
        found.add(f"{root}n_averaged")
    return found


def _own(root: str, roots: list[str], flat: _Flat) -> dict[str, Tensor]:
    """The tensors under a prefix, less those of networks that lie deeper."""
    deeper = tuple(other for other in roots if other != root and other.startswith(root))
    return {
        key: value
        for key, value in flat.tensors.items()
        if key.startswith(root) and not (deeper and key.startswith(deeper))
    }


def _check_tensors(root: str, roots: list[str], flat: _Flat) -> None:
    """Refuse what is no plain block of numbers, before anything is computed from it."""
    own = _own(root, roots, flat)
    levels = {flat.levels[key] for key in own}
    odd = [k for k in flat.others if k.startswith(root) and flat.levels[k] in levels]
    if odd:
        raise Refused(
            f"is no state dict: {listed(odd)} are no weights; save the model's state_dict()"
        )
    for key, value in own.items():
        if reason := _not_plain(value):
            name = key.removeprefix(root)
            raise Refused(f"has {name} as {reason}; save the weights as plain, contiguous tensors")


def _not_plain(value: Tensor) -> str | None:
    """What is odd about a tensor that is no block of numbers of its own, or None."""
    if value.is_nested:
        return "nested tensor"
    if value.is_meta:
        return "meta tensor, which has no values"
    if value.layout != torch.strided:
        return f"{value.layout} tensor"
    if value.is_quantized:
        return f"quantized {value.dtype} tensor"
    # A few bytes on disk can claim any size this way.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"view that repeats its values (shape {list(value.shape)})"
    return None


def _only(pool: list[str], roots: list[str], flat: _Flat) -> str:
    """The one network of the pool; several may be there if they are the same."""
    first = _own(pool[0], roots, flat)
    for other in pool[1:]:
        theirs = _own(other, roots, flat)
        names = {key.removeprefix(pool[0]) for key in first}
        same = names == {key.removeprefix(other) for key in theirs} and all(
            first[pool[0] + name].equal(theirs[other + name]) for name in names
        )
        if not same:
            raise Refused(
                f"holds {len(pool)} networks ({listed(map(_label, pool))}), and nothing "
                "says which is meant; save the state_dict() of that one alone"
            )
    return pool[0]


def _label(root: str) -> str:
    return root.rstrip(".") or "the top level"


def _taken(chosen: str, roots: list[str], averages: list[str], ema: bool) -> list[str]:
    """Which network it is, where that does not go without saying."""
    others = [root for root in roots if root != chosen]
    if ema:
        return [f"the moving average is taken ({_label(chosen)})"]
    if chosen in averages:
        return [f"its only weights are a moving average ({_label(chosen)}), which is taken"]
    notes = []
    rest = [root for root in others if root not in averages]
    if rest or set(_parts(chosen)) - _PLAIN:
        passed = f", not {listed(map(_label, rest))}" if rest else ""
        notes.append(f"the network {_label(chosen)} is taken{passed}")
    if there := [root for root in others if root in averages]:
        notes.append(
            f"a moving average lies beside the weights ({listed(map(_label, there))}); "
            "--ema takes it"
        )
    return notes


def _beside(chosen: str, roots: list[str], flat: _Flat) -> list[str]:
    """Names of what is no network of its own and lies outside the one that was chosen."""
    groups: dict[str, None] = {}
    for key in flat.tensors:
        if any(key.startswith(root) for root in roots if root or root == chosen):
            continue
        if key.endswith("n_averaged"):
            continue
        groups[_group(key, chosen)] = None
    return list(groups)


def _group(key: str, chosen: str) -> str:
    """`criterion.*` for a tensor that parts from the network's prefix at `criterion`."""
    mine, theirs, shared = _parts(chosen), key.split("."), 0
    while shared < min(len(mine), len(theirs) - 1) and mine[shared] == theirs[shared]:
        shared += 1
    name = theirs[shared]
    return name if shared == len(theirs) - 1 else f"{name}.*"
