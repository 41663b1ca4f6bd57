"""Thresholds for any method that ranks: pictures keep what they need, the mean meets a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy.budget import TOLERANCE, carried_out, fixed_counts, taught_at
from asvit_deploy.calibration import StageCost, mid_gap_threshold
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import budget_macs, fixed_lengths, part_macs, teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Decision, Reduction
from asvit_deploy.reduction.ltmp import LEAST, LTMP, Evidence
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.removal import remove
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.schedule import Schedule
from asvit_deploy.reduction.threshold import Threshold

_AIM = 0.001  # of the budget; within it, the widest gap between two scores is taken


def check(method: type[Reduction]) -> None:
    """Raise UserError where `--per-picture` says nothing of a method."""
    if not method.adapts:
        what = (
            "keeps its own number of every picture anyway"
            if method in (LTMP, Threshold)
            else "keeps as many tokens of every picture: it has no thresholds to fit"
        )
        raise UserError(f"{method.name} {what}; drop --per-picture")


def fit(
    model: ViT, method: type[Reduction], images: Sequence[np.ndarray], budget: float,
    blocks: Sequence[int] | None = None, max_kept: int | None = None,
    progress: Callable[[], object] = lambda: None, most: Sequence[int] | None = None,
) -> Ranked:  # fmt: skip
    """Thresholds with which the mean MACs of these images meet a budget.

    At each cut the images keep on average what fixed counts of one ratio would keep there, by
    MACs; what a cut misses, the next makes up for.

    Args:
        model: in eval mode; what its own reduction learned beside thresholds is taken over.
        images: float32 [3, H, W] each, normalised.
        budget: f, as `budget.fixed_counts` has it.
        max_kept: rows, prefix included, that any picture keeps behind the last cut at most; the
            cuts before are bounded by one ratio.
        progress: called once for each image.
        most: image rows that any picture keeps at each cut at most, in place of `max_kept`.

    Raises:
        UserError: a budget or a bound out of reach, a method that has no thresholds, cuts that it
            was not trained at, or a budget that these images cannot meet within 1 %.
    """
    config = model.config
    check(method)
    assert issubclass(method, Ranked)
    plan = fixed_counts(config, method, budget, taught_at(model, method, blocks))
    if most is not None:
        max_kept = most[-1] + config.prefix + method.appends
    elif max_kept is not None:
        most = bounds(config, plan, max_kept)
    if most and plan.kept and most[-1] <= plan.kept[-1]:
        raise UserError(
            f"--max-kept {max_kept} is no more than the {plan.kept[-1] + config.prefix} rows that "
            "this budget keeps on average behind the last cut; pass more, or a smaller budget"
        )
    made = method.planned(config.dim, config.prefix, plan.blocks, None, most).taught_by(
        model.reduction
    )
    made = made.to(model.pos_embed.device)
    network = model.with_reduction(made)
    halves = list(pairwise((*made.cuts, 2 * config.depth)))
    targets = [part_macs(config, n, *part) for n, part in zip(fixed_lengths(config, plan), halves)]
    missed = 0.0
    with torch.inference_mode():
        place = network.pos_embed.device
        pictures = (torch.from_numpy(image)[None].to(place) for image in images)
        rows = [Rows(network.embed(picture)[0]) for picture in pictures]
        for stage, part in enumerate(halves):
            ranked = [network.scored(stage, one) for one in rows]
            scores = [decision.score.cpu().numpy()[0] for _, decision in ranked]
            cost = StageCost(config, part, scores, made.appends)
            aim = _AIM * budget_macs(config, budget)
            theta = _threshold(scores, cost, targets[stage] + missed, aim)
            made.boundaries()[stage].fill_(theta)
            missed += targets[stage] - cost(theta)
            rows = [remove(made, stage, one, decision, padded=False)[0] for one, decision in ranked]
            if stage == 0:
                for _ in images:
                    progress()
    ratio = (carried_out(config, plan) - missed) / teacher_macs(config)
    if abs(ratio / budget - 1) > TOLERANCE:
        bound = "" if max_kept is None else f"--max-kept {max_kept} and "
        raise UserError(
            f"budget {budget:g} cannot be met within 1 % with {bound}these images (nearest "
            f"{ratio:.4f}); give other images{', pass more' * bool(bound)} or another budget"
        )
    return made


def fit_pairs(
    model: ViT, images: Sequence[np.ndarray], budget: float,
    blocks: Sequence[int] | None = None, progress: Callable[[], object] = lambda: None,
) -> LTMP:  # fmt: skip
    """As `fit`, of LTMP: at each cut as many pairs lie under the one threshold as tokens under the
    other, which for want of training is as good as any other share.

    Raises:
        UserError: as `fit`.
    """
    config = model.config
    plan = fixed_counts(config, Schedule, budget, blocks, LTMP.name)  # which cuts as LTMP does
    place = model.pos_embed.device
    made = LTMP(plan.blocks, config.prefix).to(place)
    network = model.with_reduction(made)
    halves = list(pairwise((*made.cuts, 2 * config.depth)))
    targets = [part_macs(config, n, *part) for n, part in zip(fixed_lengths(config, plan), halves)]
    missed = 0.0
    with torch.inference_mode():
        pictures = (torch.from_numpy(image)[None].to(place) for image in images)
        rows = [Rows(network.embed(picture)[0]) for picture in pictures]
        for stage, part in enumerate(halves):
            cut = _PairCut(config, part)
            for one in rows:
                before, seen = network.segment(stage, one)
                assert seen is not None
                cut.add(before, made.evidence(before, seen))
            merge, prune = cut.thresholds(made, targets[stage] + missed)
            made.merge[stage].fill_(merge)
            made.prune[stage].fill_(prune)
            missed += targets[stage] - cut.cost(made, merge, prune)
            decided = cut.decided(made, made.merge[stage], made.prune[stage])
            rows = [
                remove(made, stage, before, decision, padded=False)[0]
                for (before, _), decision in zip(cut.seen, decided)
            ]
            if stage == 0:
                for _ in images:
                    progress()
    ratio = (carried_out(config, plan) - missed) / teacher_macs(config)
    if abs(ratio / budget - 1) > TOLERANCE:
        raise UserError(
            f"budget {budget:g} cannot be met within 1 % with these images (nearest {ratio:.4f}); "
            "give other images or another budget"
        )
    return made


class _PairCut:
    """What pictures bring to a cut of LTMP."""

    def __init__(self, config: ArchConfig, part: tuple[int, int]) -> None:
        self.config, self.part = config, part
        self.seen: list[tuple[Rows, Evidence]] = []

    def add(self, rows: Rows, evidence: Evidence) -> None:
        self.seen.append((rows, evidence))

    def decided(self, made: LTMP, merge: Tensor, prune: Tensor) -> list[Decision]:
        return [made.judged(evidence, merge, prune) for _, evidence in self.seen]

    def cost(self, made: LTMP, merge: float, prune: float) -> float:
        """Mean MACs up to the next cut."""
        found = self.decided(made, torch.tensor(merge), torch.tensor(prune))
        kept = [max(1, int((one.score > prune).sum())) for one in found]
        rows = np.array(kept, np.float64) + self.config.prefix
        return float(part_macs(self.config, rows, *self.part).mean())

    def thresholds(self, made: LTMP, target: float) -> tuple[float, float]:
        """The pair, between what occurred, whose cost is nearest to the target."""
        gaps = _pooled(evidence.apart()[evidence.found.paired] for _, evidence in self.seen)
        received = _pooled(evidence.received.flatten() for _, evidence in self.seen)

        def at(share: float) -> tuple[float, float]:
            return _between(gaps, share), _between(received, share / 2)

        low, high = 0.0, 1.0
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(made, *at(middle)) > target else (low, middle)
        return min((at(low), at(high)), key=lambda one: abs(self.cost(made, *one) - target))


def _pooled(values: Iterable[Tensor]) -> NDArray[np.float32]:
    return np.unique(torch.cat(list(values)).cpu().numpy())


def _between(values: NDArray[np.float32], share: float) -> float:
    """A number that has that share of the rising values under it, in the middle of a gap."""
    if not len(values):
        return LEAST
    under = round(share * len(values))
    low = values[under - 1] if under else values[0] / 2
    high = values[under] if under < len(values) else values[-1] * 2
    return max(float(np.float32((float(low) + float(high)) / 2)), LEAST)


def _threshold(
    scores: Sequence[NDArray[np.float32]], cost: StageCost, target: float, aim: float
) -> float:
    """As `mid_gap_threshold`; all that may leave does, or nothing, where that is nearer."""
    finite = np.unique(np.concatenate(scores))
    finite = finite[np.isfinite(finite) & (finite > 0)]
    if not len(finite):  # none may leave
        return 1.0
    found = [float(np.float32(finite[0] / 2)), float(np.float32(finite[-1] * 2))]
    if len(finite) > 1:
        within = mid_gap_threshold(scores, cost, target, aim)
        if abs(cost(within) - target) <= aim:
            return within
        found.insert(0, within)
    return min(found, key=lambda theta: abs(cost(theta) - target))


def bounds(config: ArchConfig, method: Ranked, max_kept: int) -> list[int]:
    """The most image rows behind each cut, of one ratio, so that the last keeps `max_kept` rows.

    Raises:
        UserError: that is not above the prefix, or less than the method keeps at least.
    """
    cuts = len(method.cuts)
    last, tokens = max_kept - config.prefix - method.appends, config.image_tokens
    if last < 1:
        raise UserError(
            f"--max-kept {max_kept} leaves no image token beside the {config.prefix} "
            f"row{'s' * (config.prefix > 1)} that always stay; pass more"
        )
    ratio, before, found = min(1.0, last / tokens) ** (1 / cuts), tokens, []
    for stage in range(cuts):
        before = max(round(tokens * ratio ** (stage + 1)), method.least(before))
        found.append(before)
    if found[-1] > last:
        least = found[-1] + config.prefix + method.appends
        raise UserError(
            f"--max-kept {max_kept} is out of reach of {method.name}, which keeps {least} rows "
            f"behind its last of {cuts} cut{'s' * (cuts != 1)} at least; pass so many or more, or "
            "other cuts"
        )
    return found
