"""Vision transformers in plain PyTorch whose tokens leave on the way.

    images -> patch tokens -> [halves of blocks] -> cut -> [halves] -> cut -> ... -> logits

A block is two halves, `attend` and `feed`, and a cut lies between two halves. `segment` is the one
walk over them. How rows rank at a cut is a `Reduction`'s to say (`reduction.base`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.models.backbone import Backbone
from asvit_deploy.models.blocks import Block
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.reduction.base import Decision, Reduction, Seen
from asvit_deploy.reduction.removal import combined, mean_k_keep_mask, remove
from asvit_deploy.reduction.rows import Rows, Trace
from asvit_deploy.reduction.threshold import TEMPERATURE, Threshold

BatchRule = Literal["exact", "packed", "mean-k"]  # how the images of a batch go together
# What a token that was dropped loses in the training form: the others' attention, or its features.
Masking = Literal["attention", "activation"]
# (stage, scores float32 [B, N], alive float32 [B, N]) -> keep mask float32 [B, N]
Selector = Callable[[int, Tensor, Tensor], Tensor]
# (stage, scores float32 [B, N], alive bool [B, N]) -> bool [B, N]; inference form
Rule = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Walk:
    """One pass of a training form.

    Attributes:
        logits: [B, C], or embeddings.
        tokens: T [B, M, D] behind the last norm.
        masks: per cut float32 [B, M-P], 1 or 0, differentiable; none where rows were gathered.
        lengths: per cut float32 [B], rows in use behind it, prefix and added ones included;
            differentiable through the masks.
        alive: bool [B, M], the rows of `tokens` in use that were rows of the input or stand for
            some; None: all.
        place: int64 [B, M], each row's place in the input, -1 of added ones; None: its own.
    """

    logits: Tensor
    tokens: Tensor
    masks: list[Tensor]
    lengths: list[Tensor]
    alive: Tensor | None = None
    place: Tensor | None = None


class ViT(Backbone):
    """A ViT whose image tokens leave at the cuts of its reduction; dense without one."""

    thresholds: Any  # the reduction where it is `Threshold`, else empty
    metadata: dict[str, str]  # what its checkpoint kept besides: class names, where facts came from

    def __init__(self, config: ArchConfig, reduction: Reduction | None) -> None:
        super().__init__(config)
        self.metadata = {}
        self._set_reduction(reduction)

    def _set_reduction(self, reduction: Reduction | None) -> None:
        self._slot = None if reduction is None else reduction.slot
        if reduction is not None:
            self.add_module(reduction.slot, reduction)
        if not isinstance(reduction, Threshold):
            self.thresholds = ()

    def with_reduction(self, reduction: Reduction | None) -> ViT:
        """The same weights, shared and not copied, with another method or none."""
        twin = copy.copy(self)
        twin._modules = {name: part for name, part in self._modules.items() if name != self._slot}
        vars(twin).pop("thresholds", None)
        twin._set_reduction(reduction)
        return twin

    @property
    def reduction(self) -> Reduction | None:
        """The method that removes tokens, or None."""
        return None if self._slot is None else self._modules[self._slot]  # type: ignore[return-value]

    @property
    def adaptive(self) -> bool:
        """Whether tokens leave at all."""
        return self._slot is not None

    @property
    def _saves_last(self) -> bool:
        """Whether the last block works out the prefix alone: no cut inside it asks for more."""
        return self.config.last_block == "prefix" and self.cuts[-1:] != (2 * self.config.depth - 1,)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Halves in front of which tokens leave; empty when dense."""
        return () if self.reduction is None else self.reduction.cuts

    def threshold_values(self) -> list[float]:
        """The thresholds as plain numbers, in stage order; empty where the method has none."""
        found = () if self.reduction is None else self.reduction.boundaries()
        return [threshold.item() for threshold in found]

    def boundaries(self) -> list[float | None]:
        """What decides at each cut: a threshold, or None where the number of tokens is fixed."""
        return [*self.threshold_values()] or [None] * len(self.cuts)

    def segment(
        self, part: int, rows: Rows, masked: bool = False, packed: bool = False
    ) -> tuple[Rows, Seen | None]:
        """The halves between two cuts, and what the last attention saw; None behind the last cut.

        Args:
            part: 0 to the number of cuts.
            masked: training form, in which `rows.keep` counts.
            packed: inside, the rows of all images stand in one [T, D], see `rows.Packing`.
        """
        whole = 2 * self.config.depth
        first, end = (0, *self.cuts, whole)[part : part + 2]
        seen = None
        rows = rows.packed() if packed else rows
        for half in range(first, end):
            block: Block = self.blocks[half // 2]  # type: ignore[assignment]
            if half % 2:
                rows = block.feed(rows)
            elif half == whole - 2 and self._saves_last and not masked:
                rows = block.attend_first(rows, self.config.prefix)
            elif part < len(self.cuts) and half + 2 >= end:
                rows, look = block.attend(rows, masked)
                seen = look()
            else:  # what it saw is let go at once: the memory serves the next half
                rows = block.attend(rows, masked)[0]
        return rows.unpacked(), seen

    def scored(self, stage: int, rows: Rows, packed: bool = False) -> tuple[Rows, Decision]:
        """Inference form up to cut number `stage`, and how its rows rank; padding ranks last."""
        rows, seen = self.segment(stage, rows, packed=packed)
        assert self.reduction is not None
        assert seen is not None
        decision = self.reduction.decide(stage, rows, seen)
        if rows.alive is not None:
            hidden = ~rows.alive[:, self.config.prefix :]
            decision = replace(decision, score=decision.score.masked_fill(hidden, -torch.inf))
        return rows, decision

    def forward(
        self,
        images: Tensor,
        batch_rule: BatchRule = "exact",
        padded: bool | None = None,
        decisions: Sequence[Tensor] | None = None,
        rule: Rule | None = None,
        into: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Trace]:
        """Inference form: tokens are really removed.

        Args:
            images: float [B, 3, H, W], normalised.
            batch_rule: "exact" keeps for each image what it would keep alone (rows are padded to
                the batch's maximum and masked); "packed" does too and works out no padding:
                linear layers run on the rows of all images, [T, D]; "mean-k" is the paper's rule.
            padded: whether rows can pad the batch; by default, where B > 1.
            decisions: of one image, what stays in place of what the reduction says: per stage
                int64 [K], rows of that stage's input, the prefix first.
            rule: what stays in place of what the reduction says, from its scores.
            into: with `decisions`, where what leaves goes: per stage int64 [1, M].

        Returns:
            logits [B, C] and the trace of the stages.

        Raises:
            ValueError: an unknown batch rule, or decisions for several images.
        """
        if decisions is not None and images.shape[0] != 1:
            raise ValueError(f"decisions are of one image, not of {images.shape[0]}")
        if batch_rule not in get_args(BatchRule):
            raise ValueError(f"batch rule {batch_rule!r} is not one of {get_args(BatchRule)}")
        mean_k, packed = batch_rule == "mean-k", batch_rule == "packed"
        padded = (images.shape[0] > 1 if padded is None else padded) and not mean_k
        # One image goes through the blocks without its batch axis: its linear layers are then
        # plain matrix products with a bias, which runtimes fuse whatever the number of tokens.
        x = self.embed(images)
        single = not padded and not packed and images.shape[0] == 1
        rows, trace = Rows(x.squeeze(0) if single else x), Trace()
        for stage in range(len(self.cuts)):
            rows, decision = self.scored(stage, rows, packed)
            if torch.compiler.is_exporting():
                trace.before.append(rows.tokens)
                trace.weight += [] if decision.weight is None else [decision.weight]
            given, goes = (None if one is None else one[stage] for one in (decisions, into))
            keep = None
            if mean_k and decision.boundary is not None:
                keep = mean_k_keep_mask(decision.score, decision.boundary)
            elif rule is not None:
                keep = rule(stage, decision.score, rows.living(self.config.prefix))
            assert self.reduction is not None
            rows, done = remove(self.reduction, stage, rows, decision, padded, given, keep, goes)
            trace.scores.append(decision.score)
            trace.index.append(done.index)
            trace.length.append(done.length)
            if done.decision.into is not None and done.decision.into_margin is not None:
                trace.into.append(done.decision.into)
                trace.into_margin.append(done.decision.into_margin)
        rows, _ = self.segment(len(self.cuts), rows, packed=packed)
        return self.classify(rows), trace

    def forward_masked(
        self,
        images: Tensor,
        temperature: float = TEMPERATURE,
        selector: Selector | None = None,
        masking: Masking = "attention",
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Training form: every token stays in place, dropped ones are hidden from attention.

        Args:
            images: float [B, 3, H, W], normalised.
            temperature: T of Eq. 9.
            selector: another rule in place of the reduction's, for ablations.
            masking: "activation" multiplies dropped tokens by zero once and lets all attend to
                them (Table 3's comparison); the inference form is then another function.

        Returns:
            logits [B, C], final tokens [B, M, D] after the last norm, and per stage the keep mask
            float32 [B, M-P] (1 or 0; gradients reach thresholds and scores).
        """
        walk = self._walked_masked(images, temperature, selector, masking)
        return walk.logits, walk.tokens, walk.masks

    def forward_training(
        self, images: Tensor, temperature: float = TEMPERATURE, selector: Selector | None = None,
        masking: Masking = "attention",
    ) -> Walk:  # fmt: skip
        """Training form of the reduction's own kind: rows are masked, or gathered where every
        picture keeps as many; arguments as `forward_masked`."""
        if selector is None and self.reduction is not None and self.reduction.compacts:
            return self._walked_compacted(images)
        return self._walked_masked(images, temperature, selector, masking)

    def _walked_masked(
        self, images: Tensor, temperature: float, selector: Selector | None, masking: Masking
    ) -> Walk:
        rows, prefix = Rows(self.embed(images)), self.config.prefix
        masks: list[Tensor] = []
        lengths: list[Tensor] = []
        stay = rows.tokens.new_ones(rows.tokens.shape[:2], dtype=torch.float32)
        for stage in range(len(self.cuts)):
            rows, seen = self.segment(stage, rows, masked=True)
            assert self.reduction is not None
            assert seen is not None
            # Ranks and sizes are float32's, as everywhere, where products are a shorter type's.
            with torch.autocast(images.device.type, enabled=False):
                decision = self.reduction.decide(stage, rows, seen)
                alive = stay[:, prefix:]
                if selector is None:
                    mask = self.reduction.mask(stage, decision, alive, temperature)
                else:
                    mask = selector(stage, decision.score, alive)
                masks.append(mask)
                stay = F.pad(mask, (prefix, 0), value=1.0)
                leaves = rows.leaving(stay.detach(), prefix).amax(1, keepdim=True)
                rows, _ = combined(self.reduction, stage, rows, stay, decision)
                # What is added stands for what leaves, and for nothing where nothing does.
                added = rows.tokens.shape[1] - stay.shape[1]
                stay = torch.cat([stay, leaves.expand(-1, added)], 1)
                lengths.append(prefix + mask.sum(1) + added * leaves[:, 0])
            if masking == "activation":
                rows = replace(rows, tokens=rows.tokens * stay.unsqueeze(2).to(rows.tokens.dtype))
            else:
                rows = replace(rows, keep=stay)
        rows, _ = self.segment(len(self.cuts), rows, masked=True)
        in_use = stay.detach() > 0.5 if masks else None
        logits = self.classify(replace(rows, alive=in_use))
        return Walk(logits, self.norm(rows.tokens), masks, lengths, in_use)

    def _walked_compacted(self, images: Tensor) -> Walk:
        rows, lengths = Rows(self.embed(images)), list[Tensor]()
        place = torch.arange(rows.tokens.shape[1], device=images.device).expand(len(images), -1)
        for stage in range(len(self.cuts)):
            # With no row masked it is the form for training all the same, whose attention is the
            # faster one to differentiate.
            rows, seen = self.segment(stage, rows, masked=True)
            assert self.reduction is not None
            assert seen is not None
            with torch.autocast(images.device.type, enabled=False):
                decision = self.reduction.decide(stage, rows, seen)
                rows, done = remove(self.reduction, stage, rows, decision, padded=False)
            added = rows.tokens.shape[1] - done.index.shape[1]
            place = F.pad(place.gather(1, done.index), (0, added), value=-1)
            lengths.append(done.length.float())
        rows, _ = self.segment(len(self.cuts), rows, masked=True)
        return Walk(self.classify(rows), self.norm(rows.tokens), [], lengths, place >= 0, place)
