"""What a network says of a picture, as people and programs read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.errors import UserError

if TYPE_CHECKING:
    from asvit_deploy.drawing.album import Answer
    from asvit_deploy.runners import base

_BEST = 5


@dataclass(frozen=True)
class Guess:
    """A class: its number among the outputs, its name, and its probability from 0 to 1."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Near:
    """The nearest of the other pictures: the file, and the cosine of the two embeddings."""

    image: str
    cosine: float


@dataclass(frozen=True)
class Prediction:
    """What a network says of one picture.

    Attributes:
        image: the file.
        image_tokens: how many tokens the picture is cut into.
        top: the five best classes, the best first; empty where there is one output or an embedding.
        score: that one output.
        label: its name, where it has one.
        embedding: what a network without classes says, float32 [C].
        nearest: by that; None where no other picture was read, or its norm is 0.
        kept: the image tokens that each stage kept, by their number among all of them.
        skipped: why the picture could not be read; everything else is empty then.
        drawn: the picture of which tokens stay, where these were to be saved.
    """

    image: str
    image_tokens: int
    top: tuple[Guess, ...] = ()
    score: float | None = None
    label: str | None = None
    embedding: tuple[float, ...] | None = None
    nearest: Near | None = None
    kept: tuple[tuple[int, ...], ...] = ()
    skipped: str | None = None
    drawn: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `asvit-deploy predict --json` prints."""
        if self.skipped is not None:
            return {"image": self.image, "skipped": self.skipped}
        drawn = {} if self.drawn is None else {"drawn": self.drawn}
        if self.embedding is not None:
            return {
                "image": self.image, "embedding": list(self.embedding), "norm": self.norm,
                "nearest": asdict(self.nearest) if self.nearest else None,
                "kept": [list(stage) for stage in self.kept], **drawn,
            }  # fmt: skip
        alone = {} if self.score is None else {"score": self.score, "label": self.label}
        top, kept = [asdict(guess) for guess in self.top], [list(stage) for stage in self.kept]
        return {"image": self.image, "top": top, **alone, "kept": kept, **drawn}

    @property
    def norm(self) -> float | None:
        """Of the embedding, Euclidean."""
        return None if self.embedding is None else math.hypot(*self.embedding)

    @property
    def answer(self) -> Answer | None:
        """The best class, or the one output, as drawings have it."""
        from asvit_deploy.drawing.album import Answer

        if self.score is not None:
            return Answer(self.label or "", score=self.score)
        best = self.top[0] if self.top else None
        return Answer(best.label, best.index, best.probability) if best else None


def embedded(
    prediction: base.Prediction, model: Path, name: str, tokens: int, row: int = 0
) -> Prediction:
    """What a network without classes says of one picture of a batch.

    Raises:
        UserError: its numbers are not finite.
    """
    import numpy as np

    kept = tuple(tuple(stage[row].tolist()) for stage in prediction.kept or [])
    vector = prediction.output[row]
    if not np.isfinite(vector).all():
        raise UserError(
            f"{model} gives numbers that are not finite for {name}; export weights that did not "
            "diverge"
        )
    # As short as float32 reads back, and not as long as float64 writes it.
    numbers = tuple(float(str(value)) for value in vector)
    return Prediction(name, tokens, embedding=numbers, kept=kept)


def predicted(
    prediction: base.Prediction, name: str, tokens: int, labels: Sequence[str] | None, row: int = 0
) -> Prediction:
    """What a network with classes, or one output, says of one picture of a batch."""
    import numpy as np

    kept = tuple(tuple(stage[row].tolist()) for stage in prediction.kept or [])
    logits = prediction.output[row].astype(np.float64)
    if len(logits) == 1:  # softmax would call it certain, whatever it is
        label = labels[0] if labels else None
        return Prediction(name, tokens, score=float(logits[0]), label=label, kept=kept)
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    labels = labels or [f"class {i}" for i in range(len(logits))]
    best = np.argsort(-probability)[:_BEST]
    top = tuple(Guess(int(i), labels[i], float(probability[i])) for i in best)
    return Prediction(name, tokens, top, kept=kept)
