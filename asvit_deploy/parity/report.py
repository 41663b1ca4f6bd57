"""What a comparison found: every flip, every change of top-1 or neighbour, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from asvit_deploy.models.config import Output


@dataclass(frozen=True)
class Flip:
    """One token that only one side keeps, of those that both had before the stage.

    Attributes:
        margin: distance of the reference's score from what decides: the threshold, or the other
            of the two best scores where none passes.
        allowed: the largest margin that rounding explains.
        turned: it leaves on both sides, into another token: score and threshold are 1, and the
            margin is how far the reference's next best one was.
    """

    image: str
    stage: int
    token: int
    score: float
    threshold: float
    margin: float
    allowed: float
    turned: bool = False

    @property
    def borderline(self) -> bool:
        return self.margin <= self.allowed


@dataclass(frozen=True)
class Top1:
    """An image whose best class changed, given the same tokens; `margin` is a share of its logits.

    Attributes:
        reference, candidate: the classes.
        margin: the reference's best logit minus its logit of `candidate`.
    """

    image: str
    reference: int
    candidate: int
    margin: float
    borderline: bool


@dataclass(frozen=True)
class Neighbour:
    """An image whose nearest other image changed, given the same tokens.

    Attributes:
        reference, candidate: the other images.
        margin: by how much the reference's cosine with the first is higher than with the second.
    """

    image: str
    reference: str
    candidate: str
    margin: float
    borderline: bool


@dataclass
class Parity:
    """The verdict over a set of images; `failures` is empty when it passes.

    Attributes:
        equal_sets: images that keep the same tokens.
        explained: images on which every flip is borderline.
        output: of the network, "logits" or "embedding".
        top1_equal: images whose top-1 is that of the reference's own run.
        replayed: images on which the reference took the candidate's decisions.
        judged: images whose outputs were compared; without knowing which tokens a candidate keeps,
            those where it keeps as many.
        decisions, decisions_equal: tokens at all stages.
        logit_error, typical_logit_error: the largest and the median, as `Limits.logits`.
        neighbours_equal: images whose nearest other is that of the reference's own run; 0 where
            there are fewer than three images, which have no choice.
        cosine_error, typical_cosine_error: the largest and the median, as `Limits.cosine`.
        norm_error: the largest difference of an embedding's norm, as a share of the reference's.
        directionless: images of whose embedding either side's is zero or not finite.
        noise: per stage, as `Limits.noise`; empty where the candidate does not put out its scores.
        mean_kept, candidate_kept: image tokens after each stage.
        flips, turns, top1_changes, neighbour_changes: each one, borderline or not.
    """

    precision: str = "float32"
    images: int = 0
    output: Output = "logits"
    equal_sets: int = 0
    explained: int = 0
    top1_equal: int = 0
    replayed: int = 0
    judged: int = 0
    decisions: int = 0
    decisions_equal: int = 0
    logit_error: float = 0.0
    typical_logit_error: float = 0.0
    neighbours_equal: int = 0
    cosine_error: float = 0.0
    typical_cosine_error: float = 0.0
    norm_error: float = 0.0
    directionless: list[str] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    mean_kept: list[float] = field(default_factory=list)
    candidate_kept: list[float] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    turns: list[Flip] = field(default_factory=list)
    top1_changes: list[Top1] = field(default_factory=list)
    neighbour_changes: list[Neighbour] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what belongs to another output is left out."""
        flips, turns = (
            [{**asdict(flip), "borderline": flip.borderline} for flip in some]
            for some in (self.flips, self.turns)
        )
        other = _OF_EMBEDDINGS if self.output == "logits" else _OF_LOGITS
        said = {key: value for key, value in asdict(self).items() if key not in other}
        return {**said, "flips": flips, "turns": turns, "passed": self.passed}


_OF_LOGITS = ("top1_equal", "logit_error", "typical_logit_error", "top1_changes")
_OF_EMBEDDINGS = ("output", "neighbours_equal", "cosine_error", "typical_cosine_error",
                  "norm_error", "directionless", "neighbour_changes")  # fmt: skip
