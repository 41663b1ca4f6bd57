"""What passes, for each precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A flip is explained within so many times the noise: 5.4 standard deviations of a normal error.
# Errors have longer tails than that: one of 200 photographs on the trained ViT-S of `LIMITS` had a
# flip at 14 times the noise in bfloat16. So a few images may have one within four times that.
EXPLAINED, STRAY = 8, 4
STRAYS = 0.01  # of the images, or one
LEAST = 1e-6  # noise that there always is: float32's own
FEW_STAGES = 3  # up to so many, images without any flip are counted


@dataclass(frozen=True)
class Limits:
    """What passes; every limit means the same for a few images as for many.

    Attributes:
        noise: largest |score error| / score at a stage: the median over an image's tokens, and of
            those the median over the images.
        margin: a flip is borderline within max(1e-6, margin * threshold); None: within `EXPLAINED`
            times the noise of its image or of its stage, whichever is larger, but at most `noise`;
            `noise` itself where a candidate does not put out its scores. A leaving token that goes
            elsewhere is borderline where the reference's next best was within `noise`.
        alike: least share of images without a flip; one image may always have some.
        decisions: least share of decisions that are the reference's.
        unexplained: where not None, the share of decisions that may flip though their noise does
            not explain it, in place of what images may: in int8 the few tokens whose activations
            are hundreds of times the others' are rounded far worse than the median token.
        logits: |logit error| of an image, the largest of its classes, as a share of its largest
            |logit|: the median over the images.
        cosine: largest 1 - cosine of an embedding with the reference's, on any image.
    """

    noise: float
    logits: float
    cosine: float
    margin: float | None = None
    alike: float = 0.0
    decisions: float = 0.0
    unexplained: float | None = None

    @property
    def worst(self) -> float:
        """The same for every single image, and for the norm of an embedding as a share of itself; a
        top-1 that changes is borderline where the reference's two logits lie within that."""
        return 4 * self.logits

    @property
    def angle(self) -> float:
        """In radians, by how much an embedding may turn; a nearest neighbour that changes is
        borderline where the reference's angles to the two lie within that."""
        return math.acos(1 - self.cosine)


# Noise and logit errors as measured with `exporting.half.rounded` on up to 200 pictures of the
# default checkpoint, a trained ViT-S and random DeiT-T, DeiT-S and LV-ViT-S with and without
# sharpened attention: noise at most 1.4e-3 (fp16) and 1.0e-2 (bf16), the median of logit errors
# 1.5e-3 and 1.2e-2, the largest 5.6e-3 and 3.8e-2. The limits of noise are eight roundings.
LIMITS = {
    "float32": Limits(noise=1e-4, logits=2.5e-5, cosine=1e-6, margin=1e-3, alike=0.99),
    "fp16": Limits(noise=8 * 2**-11, logits=1e-2, cosine=1e-3),
    "bf16": Limits(noise=8 * 2**-8, logits=3e-2, cosine=1e-3),
    # As `exporting.int8` and ONNX Runtime's quantiser make it: noise up to 8.1e-2, largest logit
    # error 5.5e-2, largest 1 - cosine of a CLIP 8.2e-3, of its decisions 8e-5 unexplained.
    "int8": Limits(noise=0.125, logits=8e-2, cosine=1e-2, decisions=0.98, unexplained=1e-3),
}
