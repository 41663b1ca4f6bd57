"""One place that says something of a network which its weights do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from asvit_deploy.checkpoints.reading import quoted
from asvit_deploy.models.config import Activation, CropMode, Interpolation, Resize

# Activations by the names that timm and transformers give them.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_erf": "gelu",
    "gelu_tanh": "gelu_tanh", "gelutanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu",
}  # fmt: skip
_ALLOWED = {
    "mean": "three numbers, for pixels from 0 to 1",
    "std": "three numbers above 0, for pixels from 0 to 1",
    "crop_pct": "a number from 0.1 to 1",
    "interpolation": f"one of {', '.join(get_args(Interpolation))}",
    "crop_mode": f"one of {', '.join(get_args(CropMode))}",
    "heads": "a whole number of at least 1",
    "eps": "a number above 0, up to 0.001",
    "activation": f"one of {', '.join(get_args(Activation))}",
    "pooling": "class or mean",
    "positions_resize": f"one of {', '.join(get_args(Resize))}",
}
_WORDS: dict[str, tuple[str, ...]] = {
    "interpolation": get_args(Interpolation), "crop_mode": get_args(CropMode),
    "activation": get_args(Activation), "pooling": ("class", "mean"),
    "positions_resize": get_args(Resize),
}  # fmt: skip


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e30 else None  # false for NaN


def _triple(value: Any) -> tuple[float, ...] | None:
    if hasattr(value, "tolist"):  # a tensor among a run's options
        try:
            value = value.tolist()
        except RuntimeError:  # a tensor without values, as on the meta device
            return None
    numbers = [_number(v) for v in value] if isinstance(value, (list, tuple)) else [_number(value)]
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    if len(numbers) != 3 or any(n is None or abs(n) > 10 for n in numbers):
        return None
    return tuple(n for n in numbers if n is not None)


def checked(name: str, value: Any) -> Any:
    """A fact in our own type, or None where it cannot be one."""
    if name == "mean":
        return _triple(value)
    if name == "std":
        numbers = _triple(value)
        return numbers if numbers and min(numbers) >= 1e-4 else None
    if name == "heads":
        return value if type(value) is int and value >= 1 else None
    if name in ("crop_pct", "eps"):
        single = isinstance(value, (list, tuple)) and len(value) == 1  # as nargs="+" keeps one
        value = value[0] if single else value
        number = _number(value)
        low, high = (0.1, 1.0) if name == "crop_pct" else (math.ulp(0.0), 1e-3)
        return number if number is not None and low <= number <= high else None
    text = value.lower() if isinstance(value, str) else None
    return text if text in _WORDS[name] else None


def meant(name: str) -> str:
    """What a fact must be, for messages."""
    return _ALLOWED[name]


def _alike(a: Any, b: Any) -> bool:
    """Equal numbers; of lists of lists the comparison may have no end."""
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b


@dataclass
class FactSource:
    """What one place says, in our own words.

    Attributes:
        name: what messages call it.
        says: facts by name: mean, std, crop_pct, interpolation, crop_mode, heads, eps, activation,
            pooling, positions_resize.
        stands_for: those that only the model's name implies; anything said outright is stronger.
        weights: what it says the weights have, each by name (width, depth, hidden, mlp_ratio,
            patch_size, image_size, registers, num_classes, projection), its own word for that, and
            value.
        cannot: by fact, or by the source's own word, what this tool cannot do or read, perhaps
            with what to do instead behind a semicolon; one of a fact is of no account where an
            option settles the fact.
        notes: what else a user should be told, a line each.
        pictures: the side in pixels that a processor brings pictures to.
        calls: its word for the network's name, and that name.
    """

    name: str
    says: dict[str, Any] = field(default_factory=dict)
    stands_for: dict[str, Any] = field(default_factory=dict)
    weights: list[tuple[str, str, Any]] = field(default_factory=list)
    cannot: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pictures: int | None = None
    calls: tuple[str, str] | None = None

    def say(self, name: str, value: Any, word: str | None = None) -> None:
        """Note a fact; None and the empty text say nothing."""
        if value is None or (isinstance(value, str) and value in ("", "random")):
            return
        known = checked(name, value)
        if known is None:
            self.cannot[name] = f"{word or name} {quoted(value)}, which is not {meant(name)}"
        else:
            self.says[name] = known

    def network(self, name: str, value: Any, word: str) -> None:
        """Note what the weights should be."""
        if isinstance(value, (list, tuple)) and len(value) == 2 and _alike(*value):
            value = value[0]
        if value is not None:
            self.weights.append((name, word, value))

    def size(self, word: str, value: Any) -> None:
        """Note the input's size in any spelling: one side, two, or channels and two."""
        if isinstance(value, Mapping):
            value = (value.get("height"), value.get("width"))
        if isinstance(value, (list, tuple)):
            sides = value[1:] if len(value) == 3 else value
            if len(sides) == 2 and all(type(side) is int for side in sides):
                self._square(word, value, *sides)
            value = (
                sides[0] if len(sides) in (1, 2) and _alike(sides[0], sides[-1]) else list(value)
            )
        self.network("image_size", value, word)

    def _square(self, word: str, value: Any, height: int, width: int) -> None:
        if height != width:
            self.cannot["image_size"] = (
                f"{word} {quoted(value)}, so pictures {height} px high and {width} px wide; only "
                "square ones are computed: pass a network of square pictures"
            )

    def activation(self, value: Any) -> None:
        """Note the activation, by any of its names."""
        if value is None:
            return
        name = value.rsplit(".", 1)[-1].lower() if isinstance(value, str) else ""
        if name in _ACTIVATIONS:
            self.says["activation"] = _ACTIVATIONS[name]
        else:
            self.cannot["activation"] = f"the activation {quoted(value)}, which is not computed"

    def pooling(self, value: Any) -> None:
        """Note what the head reads: the class token, or the mean of the image tokens."""
        known = isinstance(value, (str, bool))
        if known and value in ("avg", "mean", True):
            self.says["pooling"] = "mean"
        elif known and value in ("token", "cls", "fast", False):
            self.says["pooling"] = "class"
        elif known and value == "":
            self.cannot["global_pool"] = (
                "global_pool '', so an output for each patch; pass a network that reads its class "
                "token (global_pool 'token')"
            )
        else:
            self.cannot["global_pool"] = f"global_pool {quoted(value)}, which is not computed"

    def named(self, name: str, stands_for: Mapping[str, Any] | None, tag: Any = None) -> None:
        """Note what a model's name stands for; one that is no ViT at all is another network."""
        from asvit_deploy.checkpoints.names import timm_name, trained_with_quick_gelu

        self.calls = "the architecture", name
        name, _, own_tag = name.partition(".")
        if isinstance(tag, str) and not own_tag:
            stands_for, own_tag = timm_name(f"{name}.{tag}"), tag
        if stands_for is None:
            if not name.startswith(("vit_", "deit_", "as_", "lvvit", "flexivit")):
                self.cannot["architecture"] = f"the architecture {quoted(name)}, no ViT or DeiT"
            return
        if trained_with_quick_gelu(name, own_tag):
            self.notes.append(
                f"{self.name} says {name}, which timm computes with GELU; its weights "
                f"({own_tag}) were trained with QuickGELU, which --activation quick_gelu computes"
            )
        for key, value in stands_for.items():
            if key in ("width", "patch_size", "registers"):
                self.weights.append((key, f"{name}: {key}", value))
            else:
                self.stands_for[key] = value
