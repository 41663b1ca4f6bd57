"""Thresholds without training: meet a MACs budget on given images, agree with the dense network.

How much each stage removes is not fixed beforehand: several splits of the reduction are carried
out, each on budget, and the one whose outputs agree best with the dense network wins. Work is
shared: the blocks before the first stage run once per image, and a split runs stage by stage, so
that it needs one pass over the rest of the network and no search.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy import similarity
from asvit_deploy.budget import check_budget
from asvit_deploy.checkpoints.load import Checkpoint, build_model
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import (
    budget_macs,
    dense_macs,
    model_macs,
    part_macs,
    stem_macs,
    teacher_macs,
)
from asvit_deploy.models.vit import ViT
from asvit_deploy.ops.torch_op import keep_mask
from asvit_deploy.reduction.removal import compact_masked
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.threshold import Threshold

MIN_IMAGES = 8
# Images that choose the split; its thresholds are then fitted on all of them.
CHOOSING = 64
RANDOM_DRAWS = 3
_ACCEPTED = 0.01  # of the budget
_AIM = 0.001  # of the budget; within it, the widest gap between two scores is taken

# Tokens [M, D] and scores float32 [1, M-P] of one image in front of a stage.
State = tuple[Tensor, Tensor]
# (stage, scores of every image) -> which image tokens each keeps, bool [1, M-P].
Rule = Callable[[int, list[Tensor]], list[Tensor]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationResult:
    """Thresholds in stage order, and the figures they reached (JSON-ready)."""

    thresholds: tuple[float, ...]
    report: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One rule carried out on n images: rows left per image and stage, prefix included, int64
    [n, stages], and the network's output float32 [n, C]."""

    lengths: NDArray[np.int64]
    output: Tensor


@dataclass(frozen=True)
class Candidate:
    """One split of the reduction, brought onto the budget."""

    split: tuple[float, ...]
    thresholds: tuple[float, ...]
    outcome: Outcome


def calibrate(
    model: ViT,
    images: Sequence[np.ndarray],
    budget: float,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> CalibrationResult:
    """Find thresholds with which the mean MACs of these images are `budget` times the teacher's.

    Args:
        model: in eval mode, weights of any origin; thresholds that it has are not looked at.
        images: float32 [3, H, W] each, normalised; at least `MIN_IMAGES`.
        budget: f, a fraction of the dense MACs as the release counts them.
        seed: of the random selection that the report compares with.
        progress: called with how many passes of an image are done, of how many.

    Returns:
        Each threshold lies between two neighbouring scores that occurred, in their middle.

    Raises:
        UserError: too few images, or a budget that these images cannot meet within 1 %.
    """
    config = model.config
    _require(config, images, budget)
    splits = candidate_splits(len(config.stages))
    count = len(images)
    chosen = [i * count // min(count, CHOOSING) for i in range(min(count, CHOOSING))]
    work = _Work(model, progress)
    refit = 1 if count > len(chosen) else 0
    work.total = (2 + refit + RANDOM_DRAWS) * count + len(splits) * len(chosen)
    with torch.inference_mode():
        states = work.prefix(images)
        dense = work.finish(states, lambda stage, scores: [s > -torch.inf for s in scores])
        subset, subset_dense = [states[i] for i in chosen], dense.output[chosen]
        tried = [work.candidate(subset, split, budget) for split in splits]
        figures = [_figures(config, one, subset_dense) for one in tried]
        best = _best(tried, figures, budget)
        if refit:
            best = work.candidate(states, best.split, budget)
        _check_met(config, best, budget)
        chance = [work.at_random(states, best.outcome, seed + i) for i in range(RANDOM_DRAWS)]
    agreements = [agreement_of(config, dense.output, draw.output) for draw in chance]
    report = {
        "budget": budget,
        "images": count,
        **_figures(config, best, dense.output),
        "random": {key: float(np.mean([a[key] for a in agreements])) for key in agreements[0]},
        "random_draws": RANDOM_DRAWS,
        "seed": seed,
        "choosing_images": len(chosen),
        "candidates": figures,
    }
    return CalibrationResult(best.thresholds, report)


def on_budget(
    model: ViT, images: Sequence[np.ndarray], budget: float, split: tuple[float, ...]
) -> Candidate:
    """Thresholds of one split, as `candidate_splits` has them, without a search for the best.

    Raises:
        UserError: as `calibrate`.
    """
    _require(model.config, images, budget)
    work = _Work(model, lambda done, total: None)
    with torch.inference_mode():
        found = work.candidate(work.prefix(images), split, budget)
    _check_met(model.config, found, budget)
    return found


def _require(config: ArchConfig, images: Sequence[np.ndarray], budget: float) -> None:
    """Raise UserError for a budget out of reach, or too few images."""
    check_budget(config, budget)
    if len(images) < MIN_IMAGES:
        raise UserError(
            f"{len(images)} images are too few to calibrate on; give at least {MIN_IMAGES}"
        )


def with_thresholds(checkpoint: Checkpoint, thresholds: Sequence[float]) -> ViT:
    """The network of a checkpoint, adaptive or dense, with these thresholds."""
    own = {f"thresholds.{i}": torch.tensor(value) for i, value in enumerate(thresholds)}
    state = {k: v for k, v in checkpoint.state.items() if not k.startswith("thresholds.")}
    return build_model(replace(checkpoint, state={**state, **own}, adaptive=True, reduction=None))


def agreement(dense: Tensor, other: Tensor) -> dict[str, float]:
    """How far logits [P, C] agree with the dense network's.

    Returns:
        top1: share of equal classes; top5: mean overlap of the five best (all, where there are
        fewer), 1 at best; kl: mean KL(dense || other) in nats. Of one logit, which is a score and
        no class, instead score_error: mean |difference|.
    """
    if dense.shape[1] == 1:
        return {"score_error": (other.double() - dense.double()).abs().mean().item()}
    five = min(5, dense.shape[1])
    ours, theirs = other.topk(five, 1).indices, dense.topk(five, 1).indices
    log_p, log_q = dense.double().log_softmax(1), other.double().log_softmax(1)
    return {
        "top1": (other.argmax(1) == dense.argmax(1)).double().mean().item(),
        "top5": (ours[:, :, None] == theirs[:, None]).any(2).double().mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
    }


def agreement_of(config: ArchConfig, dense: Tensor, other: Tensor) -> dict[str, float]:
    """As `agreement`; of embeddings as `similarity.agreement`, which may refuse them."""
    if config.output == "embedding":
        return similarity.agreement(dense.numpy(), other.numpy(), config.name)
    return agreement(dense, other)


def closeness(agreed: dict[str, float]) -> tuple[float, float]:
    """What to compare two agreements by; the higher, the closer."""
    if "cosine" in agreed:
        return agreed["cosine"], agreed["neighbour"]
    if "score_error" in agreed:
        return 0.0, -agreed["score_error"]
    return agreed["top1"], -agreed["kl"]


def candidate_splits(stages: int) -> list[tuple[float, ...]]:
    """Ways to share the reduction out, from late-heavy to early-heavy; every stage has some.

    A split w makes stage s keep the fraction exp(-c w_s) of what reaches it; c meets the budget.
    Equal parts are the same ratio at every stage.
    """
    parts = stages + 3
    cuts = itertools.combinations(range(1, parts), stages - 1)
    edges = ((0, *cut, parts) for cut in cuts)
    return [tuple((b - a) / parts for a, b in itertools.pairwise(edge)) for edge in edges]


def planned_lengths(
    config: ArchConfig, split: Sequence[float], budget: float
) -> NDArray[np.float64]:
    """Rows after each stage, prefix included, if all images were alike: float64 [stages]."""
    share = np.cumsum(split)

    def lengths(c: float) -> NDArray[np.float64]:
        return config.prefix + np.maximum(config.image_tokens * np.exp(-c * share), 1)

    target, low, high = budget_macs(config, budget), 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        over = model_macs(config, list(lengths(middle))) > target
        low, high = (middle, high) if over else (low, middle)
    return lengths(high)


class _Work:
    """Passes of images through parts of one network, counted for the progress bar."""

    def __init__(self, model: ViT, progress: Progress) -> None:
        config = model.config
        self.model = model.with_reduction(Threshold(config.stages, config.prefix))
        self.config, self.progress = config, progress
        self.edges = [0, *self.model.cuts, 2 * config.depth]
        self.done = self.total = 0

    def _tick(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def prefix(self, images: Sequence[np.ndarray]) -> list[State]:
        """Everything before the first stage.

        One image without its batch axis, as in the network's own forward: the bits are the same.
        """
        states = []
        for image in images:
            place = self.model.pos_embed.device
            x = self.model.embed(torch.from_numpy(image)[None].to(place))[0]
            states.append(self._scored(0, x))
            self._tick()
        return states

    def _scored(self, stage: int, x: Tensor) -> State:
        rows, decision = self.model.scored(stage, Rows(x))
        return rows.tokens, decision.score

    def finish(self, states: Sequence[State], rule: Rule) -> Outcome:
        """The rest of the network, removing what a rule does not keep."""
        tokens, scores = [x for x, _ in states], [s for _, s in states]
        stages, lengths, outputs = len(self.config.stages), [], []
        for stage in range(stages):
            keeps = rule(stage, scores)
            lengths.append([self.config.prefix + int(keep.sum()) for keep in keeps])
            scores = []
            for p, keep in enumerate(keeps):
                compact, _, _ = compact_masked(tokens[p][None], keep)
                if stage < stages - 1:
                    tokens[p], score = self._scored(stage + 1, compact[0])
                    scores.append(score)
                else:
                    rows, _ = self.model.segment(stages, Rows(compact[0]))
                    outputs.append(self.model.classify(rows))
                    self._tick()
        return Outcome(np.array(lengths, np.int64).T, torch.cat(outputs))

    def candidate(
        self, states: Sequence[State], split: tuple[float, ...], budget: float
    ) -> Candidate:
        """Thresholds of one split: each stage in turn is put onto its part of the budget."""
        config = self.config
        first, *halves = itertools.pairwise(self.edges)
        planned = planned_lengths(config, split, budget)
        parts = [part_macs(config, n, *part) for n, part in zip(planned, halves)]
        left = budget_macs(config, budget) - stem_macs(config)
        left -= part_macs(config, config.rows, *first)
        found: list[float] = []

        def rule(stage: int, scores: list[Tensor]) -> list[Tensor]:
            nonlocal left
            last = stage == len(parts) - 1
            # The last stage makes up for what the ones before missed.
            target = left if last else parts[stage]
            pooled = [s.cpu().numpy()[0] for s in scores]
            cost = StageCost(config, halves[stage], pooled)
            theta = mid_gap_threshold(pooled, cost, target, _AIM * budget_macs(config, budget))
            left -= cost(theta)
            found.append(theta)
            return [keep_mask(s, theta) for s in scores]

        outcome = self.finish(states, rule)
        return Candidate(split, tuple(found), outcome)

    def at_random(self, states: Sequence[State], like: Outcome, seed: int) -> Outcome:
        """Chance picks the tokens, as many for each image and stage as in `like`."""
        generator = torch.Generator().manual_seed(seed)

        def rule(stage: int, scores: list[Tensor]) -> list[Tensor]:
            keeps = []
            for count, score in zip(like.lengths[:, stage], scores):
                keep = torch.zeros_like(score, dtype=torch.bool)
                order = torch.randperm(score.shape[1], generator=generator)
                keep[0, order[: count - self.config.prefix]] = True
                keeps.append(keep)
            return keeps

        return self.finish(states, rule)


class StageCost:
    """Mean MACs of the halves from one cut up to the next, by the first one's threshold.

    Args:
        halves: the two cuts.
        scores: float32 [N_p] of each image.
        appends: rows that are added behind the cut where something leaves.
    """

    def __init__(
        self, config: ArchConfig, halves: tuple[int, int], scores: Sequence[NDArray],
        appends: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.halves, self.appends = config, halves, appends
        self.ordered = [np.sort(one) for one in scores]

    def __call__(self, theta: float) -> float:
        kept = [len(s) - np.searchsorted(s, np.float32(theta), "right") for s in self.ordered]
        tokens = np.maximum(np.array(kept, np.float64), 1)  # the best always stays
        leaves = tokens < [len(s) for s in self.ordered]
        rows = self.config.prefix + tokens + self.appends * leaves
        return float(part_macs(self.config, rows, *self.halves).mean())


def mid_gap_threshold(
    scores: Sequence[NDArray[np.float32]],
    cost: Callable[[float], float],
    target: float,
    tolerance: float,
) -> float:
    """The middle of a gap between neighbouring scores: the widest whose cost is near the target.

    A gap that is wide for its scores' size keeps another runtime's rounding from moving a token
    across.

    Args:
        scores: float32 [N_p] of each image.
        cost: falls, or stays, as the threshold rises.

    Returns:
        A number that float32 holds; where no gap is near enough, that of the nearest cost.

    Raises:
        UserError: all scores are the same.
    """
    pooled = np.unique(np.concatenate(scores))
    pooled = pooled[np.isfinite(pooled)]
    middle = ((pooled[:-1].astype(np.float64) + pooled[1:]) / 2).astype(np.float32)
    between = (pooled[:-1] < middle) & (middle < pooled[1:])
    middle, width = middle[between], np.diff(pooled)[between]
    if not len(middle):
        raise UserError("the images' token scores are all the same, so no threshold parts them")
    places = range(len(middle))

    def rising(i: int) -> float:
        return -cost(float(middle[i]))

    first = bisect_left(places, -(target + tolerance), key=rising)
    end = bisect_right(places, -(target - tolerance), key=rising)
    if first < end:
        return float(middle[first + int(np.argmax(width[first:end] / middle[first:end]))])
    near = [i for i in (first - 1, first) if i in places]
    return float(middle[min(near, key=lambda i: abs(cost(float(middle[i])) - target))])


def _macs_ratio(config: ArchConfig, lengths: NDArray) -> float:
    """Mean MACs over the teacher's."""
    macs = model_macs(config, list(lengths.T.astype(np.float64)))
    return float(np.mean(macs)) / teacher_macs(config)


def _figures(config: ArchConfig, candidate: Candidate, dense: Tensor) -> dict[str, Any]:
    """What a candidate costs, keeps and gets right."""
    kept = candidate.outcome.lengths - config.prefix
    ratio = _macs_ratio(config, candidate.outcome.lengths)
    return {
        "split": [round(part, 4) for part in candidate.split],
        "thresholds": list(candidate.thresholds),
        "macs_ratio": ratio,
        "macs_ratio_to_dense": ratio * teacher_macs(config) / dense_macs(config),
        "kept_tokens": [
            {"mean": float(k.mean()), "min": int(k.min()), "max": int(k.max())} for k in kept.T
        ],
        "agreement": agreement_of(config, dense, candidate.outcome.output),
    }


def _best(
    tried: Sequence[Candidate],
    figures: Sequence[dict[str, Any]],
    budget: float,
) -> Candidate:
    """The closest to the dense network (`closeness`) among the candidates on budget."""

    def rank(i: int) -> tuple[bool, float, float]:
        on_budget = abs(figures[i]["macs_ratio"] / budget - 1) <= _ACCEPTED
        return on_budget, *closeness(figures[i]["agreement"])

    return tried[max(range(len(tried)), key=rank)]


def _check_met(config: ArchConfig, best: Candidate, budget: float) -> None:
    ratio = _macs_ratio(config, best.outcome.lengths)
    if abs(ratio / budget - 1) > _ACCEPTED:
        raise UserError(
            f"budget {budget:g} cannot be met within 1 % on these images (nearest {ratio:.4f}); "
            "give other images or another budget"
        )
