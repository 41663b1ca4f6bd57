"""Methods that hold without training: the same tokens and logits on the GPU as on the CPU."""

from __future__ import annotations

import copy
from importlib import util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asvit_deploy.budget import fixed_counts
from asvit_deploy.models.vit import ViT
from asvit_deploy.parity import compare
from asvit_deploy.precision import of_name
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.runners.base import Remembered
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runners.torch_stages import TorchStages
from gpu_parts import networks
from gpu_parts.agreement import Batches, counted
from gpu_parts.kit import FailPart, Kit, Report, SkipPart, torch_for

BUDGET = 0.65
PER_PICTURE: tuple[type[Ranked], ...] = (SizePassing, ToMe)


class InItsType(TorchRunner):
    """The reference in the network's own type, images too."""

    @torch.inference_mode()
    def infer(self, images: NDArray[np.float32]) -> Any:
        place = self.model.pos_embed
        output, trace = self.model(torch.from_numpy(images).to(place.device, place.dtype))
        return output.float(), trace


def _weights(kit: Kit) -> tuple[ViT, list[NDArray[np.float32]]]:
    """The default checkpoint's network, dense, and pictures, a multiple of eight.

    Raises:
        SkipPart: its file cannot be read here.
    """
    torch_for(kit)
    if util.find_spec("safetensors") is None:
        raise SkipPart("safetensors is not installed")
    from asvit_deploy.checkpoints.load import build_model, load_checkpoint

    model = build_model(load_checkpoint(kit.file("checkpoint")), dense=True)
    pixels = np.load(kit.file("model_pictures"), allow_pickle=False)
    count = 8 if kit.rehearse else len(pixels) // 8 * 8
    return model, list(networks.normalised(pixels[:count], model.config))


def _names(pictures: list[NDArray[np.float32]]) -> list[str]:
    return [f"picture {i}" for i in range(len(pictures))]


def methods_agreement(kit: Kit) -> Report:
    """The default checkpoint's weights under every method: tokens and logits as on the CPU.

    Fixed counts and thresholds per picture, alone and in batches of eight, in both precisions.
    """
    model, pictures = _weights(kit)
    from asvit_deploy import per_picture

    made: dict[str, Ranked] = {name: fixed_counts(model.config, method, BUDGET)
                               for name, method in RANKED.items()}  # fmt: skip
    made |= {f"{method.name}, per picture": per_picture.fit(model, method, pictures, BUDGET)
             for method in PER_PICTURE}  # fmt: skip
    # What parity refuses in half precision is a figure: a method's scores may be too near equal.
    refused: list[str] = []
    result: Report = {"runs": [], "refused_in_half": refused}
    failures: list[str] = []
    for name, reduction in made.items():
        network = model.with_reduction(reduction)
        reference = Remembered(TorchRunner(network))
        for dtype, batch in (("float32", 1), ("float32", 8), ("float16", 1), ("float16", 8)):
            there = copy.deepcopy(network).to(kit.device, getattr(torch, dtype))
            assert there.reduction is not None
            there.reduction.float()  # scores meet their thresholds in float32
            parity = compare(reference, InItsType(there), pictures,
                             _names(pictures), network.boundaries(), of_name(dtype).option,
                             batch)  # fmt: skip
            result["runs"].append({"method": name, "dtype": dtype, "batch": batch,
                                   **counted(parity.as_dict())})  # fmt: skip
            kit.save(result)
            said = [f"{name}, {dtype}, B = {batch}: {words}" for words in parity.failures]
            (failures if dtype == "float32" else refused).extend(said)
    if failures:
        raise FailPart("; ".join(failures), result)
    return result


def methods_bucketed(kit: Kit) -> Report:
    """Per-picture methods whose rows carry sizes: stages in buckets, one CUDA graph each."""
    model, pictures = _weights(kit)
    from asvit_deploy import per_picture

    rows = model.config.rows
    buckets = (*range(32, rows, 32), rows)
    result: Report = {"runs": []}
    failures: list[str] = []
    for method in PER_PICTURE:
        network = model.with_reduction(per_picture.fit(model, method, pictures, BUDGET))
        reference = Remembered(TorchRunner(network))
        for dtype, batch in (("float32", 1), ("float32", 8), ("float16", 1)):
            stages = TorchStages(network, buckets, batch=batch, device=kit.device,
                                 dtype=getattr(torch, dtype))  # fmt: skip
            runner = Batches(stages, len(network.cuts), buckets)
            parity = compare(reference, runner, pictures, _names(pictures), network.boundaries(),  # type: ignore[arg-type]
                             of_name(dtype).option, batch)  # fmt: skip
            row = {"method": method.name, "dtype": dtype, "batch": batch, "graphs": stages.graphs}
            result["runs"].append({**row, **counted(parity.as_dict())})
            kit.save(result)
            if dtype == "float32":
                failures += [f"{method.name}, B = {batch}: {words}" for words in parity.failures]
    if failures:
        raise FailPart("; ".join(failures), result)
    return result
