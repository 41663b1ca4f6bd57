"""The PyTorch reference, eager."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy.models.stem import exact_convolutions
from asvit_deploy.models.vit import BatchRule, Trace, ViT
from asvit_deploy.processor import require_threads, torch_threads, usable_cores
from asvit_deploy.runners.base import (
    Prediction,
    RunnerBase,
    decode,
    into_rows,
    require_images,
    rows_of,
)


def _decoded(output: Tensor, trace: Trace, prefix: int, appended: int) -> Prediction:
    def arrays(tensors: list[Tensor]) -> list[NDArray]:
        return [tensor.cpu().numpy() for tensor in tensors]

    return decode(
        output.cpu().numpy(), arrays(trace.length), arrays(trace.index), arrays(trace.scores),
        prefix=prefix, appended=appended, into=arrays(trace.into),
        into_margin=arrays(trace.into_margin),
    )  # fmt: skip


class TorchRunner(RunnerBase):
    """An `ViT` in eval mode, in true float32; tokens are really removed.

    Args:
        threads: on the CPU, while it runs; 0 takes every core, None those that PyTorch has.

    Raises:
        UserError: there are fewer cores than `threads`.
    """

    def __init__(
        self, model: ViT, batch_rule: BatchRule = "exact", threads: int | None = None
    ) -> None:  # fmt: skip
        exact_convolutions()
        self._threads = None if threads is None else require_threads(threads) or usable_cores()
        self.model = model.eval()
        self.batch_rule = batch_rule

    @torch.inference_mode()
    def infer(self, images: NDArray[np.float32]) -> tuple[Tensor, Trace]:
        device = self.model.pos_embed.device
        with torch_threads(self._threads):
            return self.model(torch.from_numpy(images).to(device), batch_rule=self.batch_rule)

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        """images float32 [B, 3, H, W] -> everything, scores included."""
        require_images(images)
        output, trace = self.infer(images)
        return _decoded(output, trace, *self._rows)

    @property
    def _rows(self) -> tuple[int, int]:
        """P, and the rows that each stage adds."""
        reduction = self.model.reduction
        return self.model.config.prefix, 0 if reduction is None else reduction.appends

    @torch.inference_mode()
    def replay(
        self, images: NDArray[np.float32], kept: Sequence[NDArray[np.int64]],
        into: Sequence[NDArray[np.int64]] | None = None,
    ) -> Prediction:  # fmt: skip
        """As `Reference.replay`."""
        device, tokens = self.model.pos_embed.device, self.model.config.image_tokens
        rows = [torch.from_numpy(stage).to(device) for stage in rows_of(kept, tokens, *self._rows)]
        goes = None
        if into is not None:
            found = into_rows(into, kept, tokens, *self._rows)
            goes = [torch.from_numpy(stage)[None].to(device) for stage in found]
        with torch_threads(self._threads):
            given = torch.from_numpy(images).to(device)
            output, trace = self.model(given, decisions=rows, into=goes)
        return _decoded(output, trace, *self._rows)

    def describe(self) -> dict[str, str]:
        parameter = self.model.pos_embed
        return {
            "backend": f"torch {torch.__version__}",
            "provider": "eager",
            "precision": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
        }
