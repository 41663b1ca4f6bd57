"""The rows of a network on their way, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from asvit_deploy.ops.torch_op import best_places


@dataclass(frozen=True)
class Packing:
    """Where the rows of a batch stand once nothing pads it: every picture's behind the one before.

    Attributes:
        rows: M of the batch as it is padded.
        length: int64 [B], rows of each picture; None: all M.
        place: int64 [B, M], the packed row at each place of the padded batch; where nothing is, its
            picture's first, so that no picture meets numbers of another. None: nothing pads it.
        slot: int64 [T], the place among B M of each packed row.
    """

    rows: int
    length: Tensor | None = None
    place: Tensor | None = None
    slot: Tensor | None = None

    @classmethod
    def of(cls, alive: Tensor) -> Packing:
        """Of rows [B, M] that are real, in front, or only pad."""
        length, column = alive.long().sum(1), torch.arange(alive.shape[1], device=alive.device)
        start = (length.cumsum(0) - length)[:, None]
        place = start + torch.where(column < length[:, None], column, 0)
        return cls(alive.shape[1], length, place, alive.flatten().nonzero().squeeze(1))

    def unpacked(self, packed: Tensor) -> Tensor:
        """T [T, ...] -> [B, M, ...]."""
        if self.place is None:
            return packed.unflatten(0, (-1, self.rows))
        return packed.index_select(0, self.place.flatten()).unflatten(0, (-1, self.rows))

    def packed(self, padded: Tensor) -> Tensor:
        """T [B, M, ...] -> [T, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.slot is None else flat.index_select(0, self.slot)


@dataclass(frozen=True)
class Rows:
    """The rows on their way through the network, P prefix rows first.

    Attributes:
        tokens: T [B, M, D], or [M, D] of one image, or [T, D] of several with a packing.
        alive: bool [B, M], False where a row only pads the batch; None: all are real.
        keep: training form, float32 [B, M]: 1 or 0, differentiable; a dropped row stays in place.
        size: float32 [B, M], how many input tokens a row stands for; None: one each.
        packing: where the tokens stand if they are packed; what else there is stays as it is.
    """

    tokens: Tensor
    alive: Tensor | None = None
    keep: Tensor | None = None
    size: Tensor | None = None
    packing: Packing | None = None

    def packed(self) -> Rows:
        """The same with the tokens of all pictures in one [T, D]."""
        tokens = self.batched
        packing = Packing(tokens.shape[1]) if self.alive is None else Packing.of(self.alive)
        return replace(self, tokens=packing.packed(tokens), packing=packing)

    def unpacked(self) -> Rows:
        """The opposite of `packed`; rows that pad hold their picture's first."""
        if self.packing is None:
            return self
        return replace(self, tokens=self.packing.unpacked(self.tokens), packing=None)

    @property
    def batched(self) -> Tensor:
        """T [B, M, D]."""
        return self.tokens.unsqueeze(0) if self.tokens.dim() == 2 else self.tokens

    @property
    def sizes(self) -> Tensor:
        """float32 [B, M]."""
        if self.size is not None:
            return self.size
        images, rows = self.batched.shape[:2]
        return filled(1.0, images, rows, self.tokens.device)

    def first(self, count: int) -> Rows:
        """The first rows alone."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, :count]

        tokens = self.unpacked().tokens[..., :count, :]
        first = Rows(tokens, cut(self.alive), cut(self.keep), cut(self.size))
        return first if self.packing is None else replace(first, alive=None).packed()

    def bias(self) -> Tensor | None:
        """log(size) float32 [B, 1, 1, M], which attention adds to its logits."""
        return None if self.size is None else self.size.log()[:, None, None, :]

    def leaving(self, stay: Tensor, prefix: int) -> Tensor:
        """float32 [B, M]: 1 where an image row that is there does not stay.

        Args:
            stay: float32 [B, M], 1 or 0.
        """
        image = (1 - stay[:, prefix:]) * self.living(prefix)
        return torch.cat([filled(0.0, image.shape[0], prefix, image.device), image], 1)

    def living(self, prefix: int) -> Tensor:
        """bool [B, M-P]: image rows that are real and not dropped."""
        if self.keep is not None:
            return self.keep[:, prefix:].detach() > 0.5
        if self.alive is not None:
            return self.alive[:, prefix:]
        rows = self.batched
        return filled(True, rows.shape[0], rows.shape[1] - prefix, rows.device)


@dataclass
class Trace:
    """What happened at each cut, in order.

    `index` follows the op's contract (rows of that cut's input, prefix included), `length` counts
    the rows behind it, appended ones too; `scores` are float32 [B, M-P], -inf where a row only pads
    the batch. `into` and `into_margin` are those of the decisions, of methods that have them.
    `before` are the tokens that came to each cut, in a graph alone: they mark where scoring begins;
    `weight` likewise the decisions', which are numbers of scoring too.
    """

    scores: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    length: list[Tensor] = field(default_factory=list)
    into: list[Tensor] = field(default_factory=list)
    into_margin: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)


def filled(value: float | bool, images: int, rows: int, device: torch.device) -> Tensor:
    """[B, M] of one number, float32 or bool. Expanded, since in a graph nothing else makes a shape
    up, see `runners.onnx_bounds`.
    """
    return torch.full((), value, device=device).expand(images, rows)


def chosen(scores: Tensor, count: int) -> Tensor:
    """bool [B, N], the `count` highest scores, the first of equals."""
    images, rows = scores.shape
    best = best_places(scores, count)
    # As numbers: not every runtime scatters truth values.
    nothing = filled(0.0, images, rows, scores.device)
    return nothing.scatter(1, best, filled(1.0, images, count, scores.device)) > 0.5


def moved(size: Tensor, into: Tensor, leaving: Tensor) -> Tensor:
    """Sizes after every leaving row's went to the row that takes it; float32 [B, M].

    Args:
        into: int64 [B, M].
        leaving: float32 [B, M], 1 where a row leaves.
    """
    places = torch.arange(size.shape[1], device=size.device)
    # A product with ones and zeros: TensorRT adds nothing up in a scatter. Sizes stay exact.
    taken = (size * leaving).unsqueeze(1) @ (into.unsqueeze(2) == places).to(size.dtype)
    return size + taken.squeeze(1)


def averaged(rows: Rows, into: Tensor, leaving: Tensor, weight: Tensor) -> Rows:
    """Rows of which each is the weighted mean of itself and of those that leave into it.

    Args:
        into: int64 [B, M].
        leaving: float32 [B, M], 1 where a row leaves.
        weight: float32 [B, M], above 0.
    """
    tokens, places = rows.batched, torch.arange(weight.shape[1], device=weight.device)
    goes = (into.unsqueeze(1) == places[:, None]) & leaving.unsqueeze(1).bool()  # (B, to, from)
    own = places[:, None] == places
    # A softmax, so that no weight is too small for any precision: it is float32's in all of them.
    share = torch.where(goes | own, weight.log().unsqueeze(1), -torch.inf).softmax(2)
    mixed = share.to(tokens.dtype) @ tokens
    return replace(rows, tokens=mixed if rows.tokens.dim() == 3 else mixed.squeeze(0))


def with_row(rows: Rows, token: Tensor, size: Tensor | None = None) -> Rows:
    """Rows with one more at the end, which stays.

    Args:
        token: T [B, D].
    """

    def longer(values: Tensor | None, fill: float | bool) -> Tensor | None:
        if values is None:
            return None
        return torch.cat([values, filled(fill, values.shape[0], 1, values.device)], 1)

    sizes = longer(rows.size, 1.0) if size is None else torch.cat([rows.sizes, size[:, None]], 1)
    tokens = torch.cat([rows.batched, token[:, None]], 1)
    return replace(rows, tokens=tokens if rows.tokens.dim() == 3 else tokens.squeeze(0),
                   alive=longer(rows.alive, True), keep=longer(rows.keep, 1.0),
                   size=sizes)  # fmt: skip
