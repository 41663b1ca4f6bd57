"""The face of a token reduction: what it is shown, what it decides, and what it may change.

A network is 2 x depth halves: every block attends, then feeds. A reduction acts at cuts between two
halves, before a block or inside it. Only the network's walk removes rows, the same way for every
method; a method scores them, and may hand on what leaving rows carry.

Training asks a method for little more (`training.trainer`): whether it `trains` at all; whether
rows are really gathered then (`compacts`: counts are fixed) or stay in place, hidden by `mask`;
what of it learns and how (`learning`); and what it adds to the loss (`own_loss`). A run starts from
`planned`. While it trains, the method is in training mode, the network in evaluation mode: where
`mask` draws at random, `self.training` says whether it should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from asvit_deploy.reduction.masking import masked_softmax
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.scoring import class_attention_row

Place = Literal["before", "inside"]
# What a method needs beside dense weights: a budget alone, pictures too, or to be trained.
Settled = Literal["budget", "pictures", "training"]
Own = TypeVar("Own", bound="Reduction")


@dataclass(frozen=True)
class Seen:
    """What the last attention leaves behind; masks and sizes of its rows live here only.

    Attributes:
        query, key, context: T [B, H, M, Dh], the context before the projection.
        rows: those that attended.
        masked: whether it was the training form.
    """

    query: Tensor
    key: Tensor
    context: Tensor
    rows: Rows
    masked: bool = False

    def class_row(self) -> Tensor:
        """The class token's row of the softmax, float32 [B, H, M] under autocast too."""
        bias = self.rows.bias()
        if not self.masked:
            return class_attention_row(self.query, self.key, self.rows.alive, bias)
        with torch.autocast(self.query.device.type, enabled=False):
            if self.rows.keep is None:
                return class_attention_row(self.query, self.key, None, bias)
            scale = self.key.shape[3] ** -0.5
            logits = (self.query[:, :, 0:1].float() * scale) @ self.key.float().transpose(2, 3)
            logits = logits if bias is None else logits + bias
            return masked_softmax(logits, self.rows.keep).squeeze(2)

    def column_mean(self) -> Tensor:
        """What each row receives of the attention, mean over heads and over the rows that are
        there; float32 [B, M] under autocast too.
        """
        with torch.autocast(self.query.device.type, enabled=False):
            scale, bias = self.key.shape[3] ** -0.5, self.rows.bias()
            logits = (self.query.float() * scale) @ self.key.float().transpose(2, 3)
            logits = logits if bias is None else logits + bias
            keep = self.rows.keep if self.masked else None
            there = self.rows.alive if keep is None else keep.detach() > 0.5
            if keep is not None:
                weights = masked_softmax(logits, keep)
            elif there is not None:
                weights = logits.masked_fill(~there[:, None, None, :], -torch.inf).softmax(3)
            else:
                weights = logits.softmax(3)
            each = weights.mean(1)  # (B, M, M)
            if there is None:
                return each.mean(1)
            asks = there.float()
            return (asks[:, None, :] @ each).squeeze(1) / asks.sum(1, keepdim=True)


@dataclass(frozen=True)
class Decision:
    """How rows are ranked at a cut.

    Attributes:
        score: float32 [B, M-P], one for each image row.
        boundary: float32 scalar: rows above it stay, and the best in any case; None where counts
            are fixed.
        into: int64 [B, M], the row that takes what a leaving row carries; None: it is lost.
        into_margin: float32 [B, M-P], how far the next best row was from that one, in the measure
            that chose it.
        nearness: float32 [B, M-P, M-P], of what leaves (rows) to what may take it (columns), -inf
            where it may not; `destined` chooses by it among those that stay.
        weight: float32 [B, M-P], of each image row in what leaving rows become part of.
        onward, onward_margin: like `into` and its margin, where the row that takes it goes in its
            turn if that one leaves too; of BAT the margin alone, by which it is attentive or not.
        evidence: what no threshold changes, of a method whose scores depend on thresholds.
    """

    score: Tensor
    boundary: Tensor | None = None
    into: Tensor | None = None
    into_margin: Tensor | None = None
    nearness: Tensor | None = None
    weight: Tensor | None = None
    onward: Tensor | None = None
    onward_margin: Tensor | None = None
    evidence: Any = None


@dataclass(frozen=True)
class Learning:
    """Parameters of a method that learn together.

    Attributes:
        parameters: the method's own.
        relative: they are above 0 and learn as logarithms, at this rate at the top of the run's
            schedule: a share of themselves a step, whatever their unit. None: they learn as the
            network's weights do.
        least: what they never fall below.
        decayed: whether weight decay is for them, of matrices alone.
    """

    parameters: tuple[nn.Parameter, ...]
    relative: float | None = None
    least: float | None = None
    decayed: bool = False


@dataclass(frozen=True)
class Passed:
    """What one training pass of this process's pictures left behind.

    Attributes:
        budget: f.
        macs: mean MACs over the dense network's, float32 scalar: the value over the pictures of all
            processes, the gradient of one's own.
        masks: which image rows stayed at each cut, float32 [B, M-P], 1 or 0, differentiable; none
            of a method that compacts.
        tokens: T [B, M, D], all rows behind the last norm.
        target: likewise, of the dense teacher [B, P+N, D]; None where nothing is distilled.
        mean: a number's mean over all processes, which must all ask.
    """

    budget: float
    macs: Tensor
    masks: list[Tensor]
    tokens: Tensor
    target: Tensor | None
    mean: Callable[[Tensor], Tensor] = lambda own: own


class Reduction(nn.Module):
    """A method. Its parameters stand in a network's state under `slot`.

    Attributes:
        name: as commands and files call it.
        slot: the first part of its parameters' names.
        place: where in a block it cuts.
        appends: rows that `combine` adds at each cut where something leaves.
        carries_sizes: whether rows say how many input tokens they stand for, so that a mean over
            tokens is one over those of the input.
        trains: whether it has a training form.
        temperature: T of Eq. 9 (`mask`) unless a run says otherwise.
        settled: what dense weights need to get it.
        adapts: whether thresholds can decide in place of counts.
        compares: whether a score depends on other rows, not counting attention.
    """

    name: ClassVar[str]
    slot: ClassVar[str] = "method"
    place: ClassVar[Place]
    appends: ClassVar[int] = 0
    carries_sizes: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    temperature: ClassVar[float] = 1e4
    settled: ClassVar[Settled] = "budget"
    adapts: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def __init__(self, blocks: Sequence[int], prefix: int = 1) -> None:
        super().__init__()
        self.blocks, self.prefix = tuple(blocks), prefix

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        """Where it cuts by default: at the architecture's stages."""
        return stages

    @property
    def cuts(self) -> tuple[int, ...]:
        """Halves in front of which rows leave."""
        inside = self.place == "inside"
        return tuple(2 * block + inside for block in self.blocks)

    def decide(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        """Rank the rows at cut number `stage`; traced by torch.export."""
        raise NotImplementedError

    def decided_again(self, stage: int, decision: Decision) -> Decision:
        """What `decide` would say of the same rows by the thresholds as they are now."""
        return replace(decision, boundary=self.boundaries()[stage])

    def mask(self, stage: int, decision: Decision, alive: Tensor, temperature: float) -> Tensor:
        """Training form: which image rows stay, float32 [B, M-P], 0 or 1.

        Args:
            alive: float32 [B, M-P], differentiable; a dropped row never returns.
            temperature: how steep the relaxation is through which a boundary learns.
        """
        raise NotImplementedError

    def destined(self, rows: Rows, stay: Tensor, decision: Decision) -> Decision:
        """The decision with its `into`, where that depends on what stays; by default as it is.

        Args:
            stay: as `combine`.
        """
        return decision

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        """Hand on what leaving rows carry; may append rows, which stay. By default nothing.

        Args:
            rows: all of them, the leaving ones too.
            stay: float32 [B, M], 1 or 0; prefix rows stay, rows that are not alive do not.
        """
        return rows

    @classmethod
    def hands_on(cls) -> bool:
        """Whether `combine` does anything."""
        return cls.combine is not Reduction.combine

    def boundaries(self) -> list[Tensor]:
        """What a score must be above at each cut, its parameters; none where counts are fixed."""
        return []

    def counts(self, stage: int, tokens: int) -> int | None:
        """How many image rows stay of so many, the same for each image; None: each its own."""
        return None

    def added(self, tokens: int, kept: int) -> int:
        """Rows that a cut adds where so many of so many image rows stay."""
        return self.appends if kept < tokens else 0

    def macs(self, stage: int, rows: Any) -> Any:
        """Multiply-accumulates of its own at a cut with so many rows (M), which are not counted
        with the network's.
        """
        return 0

    @property
    def compacts(self) -> bool:
        """Whether rows are gathered in training, as at inference, and not masked: where every
        picture keeps as many. No gradient then reaches what ranks."""
        return False

    @property
    def steers(self) -> bool:
        """Whether `own_loss` pulls towards the budget, in place of Eq. 10."""
        return False

    def before_pass(self, seed: int, first: int) -> None:
        """Training form: hear which pictures come, by their number in the run, before they do.

        What is drawn for a picture may follow from these numbers alone: it is then the same in a
        run that goes on from a state, and however processes share a batch.

        Args:
            first: number of the first; each of the others has the next.
        """

    def learning(self) -> list[Learning]:
        """What of it learns; nothing by default."""
        return []

    def own_loss(self, passed: Passed) -> dict[str, Tensor]:
        """Terms that it adds to the loss, by name and weighted: float32 scalars. Frozen weights
        and a run without labels have them too."""
        return {}

    @classmethod
    def planned(
        cls, dim: int, prefix: int, blocks: Sequence[int], kept: Sequence[int] | None
    ) -> Reduction:
        """The method for a network of that width and prefix, with what it learns as it begins.

        Args:
            kept: image rows that stay at each cut; None: pictures keep what they need.
        """
        return cls(blocks, prefix)

    def taught_by(self: Own, other: Reduction | None) -> Own:
        """Itself, once it has what another of the same method learned beside its boundaries."""
        if type(other) is type(self):
            own = {id(boundary) for boundary in other.boundaries()}
            learned = {name: value.detach() for name, value in other.named_parameters()
                       if id(value) not in own}  # fmt: skip
            self.load_state_dict(learned, strict=False)
        return self

    def fits(self, dim: int) -> bool:
        """Whether it can stand in a network of that width."""
        return True

    def fields(self) -> dict[str, Any]:
        """What restores it beside its parameters, JSON-ready."""
        return {"name": self.name, "blocks": list(self.blocks)}

    @classmethod
    def restore(cls, fields: dict[str, Any], prefix: int) -> Reduction:
        """The opposite of `fields`; parameters are loaded after.

        Raises:
            ValueError: the fields are not of this method.
        """
        return cls(fields["blocks"], prefix)
