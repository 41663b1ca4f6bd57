"""What an architecture is: its traits, and how a picture becomes its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from asvit_deploy.errors import UserError

STEM_WIDTH = 64  # channels inside LV-ViT's convolutional stem
MAX_IMAGE_SIZE = 4096  # pixels: 65,536 tokens of 16-pixel patches, far over what attention carries
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
HeadName = Literal[
    "class", "projection", "class_and_tokens", "class_and_mean", "two_classes", "mean", "mean_norm",
    "none",
]  # fmt: skip
Output = Literal["logits", "embedding"]  # what a network returns; its name in graphs too
Resize = Literal["bicubic", "bicubic_antialias", "bicubic_offset"]
Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
CropMode = Literal["center", "squash"]
LastBlock = Literal["all", "prefix"]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input: resize the shorter side, centre crop, normalise.

    The shorter side becomes `int(image_size / crop_pct)` pixels before the centre crop; with
    "squash" both sides do, whatever that makes of the picture's proportions.
    """

    crop_pct: float = 224 / 256
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_mode: CropMode = "center"

    def fields(self) -> dict[str, Any]:
        """As sidecars have it: the usual crop goes without saying, as in older ones."""
        fields = asdict(self)
        if self.crop_mode == "center":
            del fields["crop_mode"]
        return fields


@dataclass(frozen=True)
class ArchConfig:
    """One architecture, as traits.

    Attributes:
        mlp_ratio: hidden width of the MLP over `dim`.
        stages: 0-based blocks at which tokens leave.
        eps: of every LayerNorm.
        residual: factor of both branches of a block.
        layer_scale: whether each branch has a learned factor per channel.
        norm_pre: whether a LayerNorm comes before the first block.
        prefix: P, rows before the image tokens that never leave: the class token, then others
            (registers, a distillation token).
        positions: which rows have a position of their own: all, or the image tokens alone.
        positions_resize: how the family resizes its position embeddings to another grid; with an
            offset as DINOv2's release does, by the quotient of a grid that is a tenth larger.
        head: what becomes of the last tokens, see `models.heads`.
        counts_elementwise: whether MACs hold norms, activations and softmax too, as the LV-ViT half
            of the AS-ViT release counts.
        last_block: the rows that the last block works out; the prefix alone gives the same output
            where the head reads no others, and costs less.
    """

    name: str
    dim: int
    heads: int
    depth: int
    mlp_ratio: float
    stages: tuple[int, ...]
    image_size: int = 224
    patch_size: int = 16
    stem: Literal["patch", "conv"] = "patch"
    num_classes: int = 1000
    preprocessing: Preprocessing = Preprocessing()
    eps: float = 1e-6
    qkv_bias: bool = True
    patch_bias: bool = True
    residual: float = 1.0
    layer_scale: bool = False
    norm_pre: bool = False
    activation: Activation = "gelu"
    prefix: int = 1
    positions: Literal["all", "image"] = "all"
    positions_resize: Resize = "bicubic"
    head: HeadName = "class"
    counts_elementwise: bool = False
    last_block: LastBlock = "all"

    @property
    def grid(self) -> int:
        """Image tokens along one side."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """N: image tokens without the class token."""
        return self.grid**2

    @property
    def registers(self) -> int:
        """Prefix rows beside the class token."""
        return self.prefix - 1

    @property
    def rows(self) -> int:
        """M: prefix and image tokens."""
        return self.prefix + self.image_tokens

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return round(self.dim * self.mlp_ratio)

    @property
    def output(self) -> Output:
        """What the network returns, `num_classes` wide."""
        return "embedding" if self.head in ("none", "projection") else "logits"

    @property
    def averages(self) -> bool:
        """Whether the head takes the mean of the image tokens."""
        return self.head in ("class_and_mean", "mean", "mean_norm")

    def saving(self) -> ArchConfig:
        """The same network without work that its output does not depend on."""
        reads_prefix = not self.averages and self.head != "class_and_tokens"
        return replace(self, last_block="prefix" if reads_prefix else "all")

    def released(self) -> ArchConfig:
        """The same network with all the work that the AS-ViT release carries out and counts."""
        return replace(self, last_block="all")

    def at(self, image_size: int | None = None, num_classes: int | None = None) -> ArchConfig:
        """The same architecture for another image size or head.

        Raises:
            UserError: the patch size does not divide `image_size`, or it is over 4096.
        """
        size = self.image_size if image_size is None else image_size
        if size > MAX_IMAGE_SIZE:
            raise UserError(
                f"image size {size} is too large for {self.name}; at most {MAX_IMAGE_SIZE} pixels"
            )
        if size <= 0 or size % self.patch_size:
            below = max(size // self.patch_size, 1) * self.patch_size
            raise UserError(
                f"image size {size} is not a multiple of the {self.patch_size}-pixel patch of "
                f"{self.name}; try {below} or {below + self.patch_size}"
            )
        return replace(
            self,
            image_size=size,
            num_classes=self.num_classes if num_classes is None else num_classes,
        )

    def with_stages(self, stages: Sequence[int]) -> ArchConfig:
        """The same architecture, pruned before other blocks.

        Raises:
            UserError: they are not rising block numbers of 1 to depth - 1.
        """
        whole = all(type(stage) is int for stage in stages)
        edges = [0, *stages, self.depth]
        if not stages or not whole or not all(a < b for a, b in pairwise(edges)):
            raise UserError(
                f"stages {','.join(map(str, stages))} do not fit {self.name}; pass rising block "
                f"numbers between 1 and {self.depth - 1}, such as "
                f"{','.join(map(str, self.stages))}"
            )
        return replace(self, stages=tuple(stages))


OUTPUTS: tuple[Output, ...] = get_args(Output)
TRAITS = ("stem", "qkv_bias", "patch_bias", "residual", "layer_scale", "norm_pre", "activation",
          "prefix", "positions", "positions_resize", "head")  # fmt: skip
