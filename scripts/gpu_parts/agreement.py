"""The bucketed runner against the float32 reference, in both precisions, alone and in batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.precision import of_name
from gpu_parts import networks
from gpu_parts.kit import FailPart, Kit, Report, torch_for

_RUNS = (("float32", 1), ("float16", 1), ("float32", 8), ("float16", 8))


class Batches:
    """A stage backend of batch B as a runner that records what every image keeps."""

    def __init__(self, backend: Any, stages: int, buckets: tuple[int, ...]) -> None:
        self.backend, self.stages, self.buckets = backend, stages, buckets

    def infer(self, images: NDArray[np.float32]) -> Any:
        return self(images).output

    def __call__(self, images: NDArray[np.float32]) -> Any:
        """images float32 [B, 3, H, W], B the backend's."""
        from asvit_deploy.runners.base import decode
        from asvit_deploy.runners.bucketed import smallest

        host, lengths, index, scores, into = self.backend.host, [], [], [], []
        output = self.backend.start(images)
        rows = output[0].shape[1]
        for stage in range(self.stages):
            scores.append(host(output[1]))
            into += [] if output.into is None else [host(output.into)]
            kept = self.backend.compact(stage, output, rows)
            rows = kept.rows
            lengths.append(host(kept.length))
            index.append(host(kept.index))
            output = self.backend.run(stage + 1, smallest(self.buckets, rows), kept)
        return decode(host(output[0]), lengths, index, scores, into=into)

    def describe(self) -> dict[str, str]:
        return self.backend.describe()


def agreement(kit: Kit) -> Report:
    """Every picture; what flips, and by how much logits differ."""
    torch = torch_for(kit)
    from asvit_deploy.parity import compare
    from asvit_deploy.runners.base import Remembered
    from asvit_deploy.runners.pytorch import TorchRunner
    from asvit_deploy.runners.torch_stages import TorchStages

    result: Report = {"runs": []}
    failures = []
    for name in networks.names(kit):
        network = networks.load(kit, name)
        count = len(network.pictures) // 8 * 8
        pictures = list(network.pictures[:count])
        labels = [f"picture {i}" for i in range(count)]
        reference = Remembered(TorchRunner(network.model))
        step = 16 if network.rows < 200 else 64
        buckets = (*range(step, network.rows, step), network.rows)
        for dtype, batch in _RUNS:
            stages = TorchStages(network.model, buckets, batch=batch, device=kit.device,
                                 dtype=getattr(torch, dtype))  # fmt: skip
            runner = Batches(stages, len(network.config.stages), buckets)
            precision = of_name(dtype).option
            parity = compare(reference, runner, pictures, labels,  # type: ignore[arg-type]
                             network.model.threshold_values(), precision, batch)  # fmt: skip
            row = {"network": name, **counted(parity.as_dict()), "precision": dtype, "batch": batch}
            result["runs"].append(row)
            kit.save(result)
            failures += [f"{name}, {dtype}, B = {batch}: {words}" for words in parity.failures]
    if failures:
        raise FailPart("; ".join(failures), result)
    return result


def counted(said: Report) -> Report:
    """What parity says, with the number and the first of its flips in place of all of them:
    hundreds of near ties would bury the figures.
    """
    rest = dict(said)
    lists: Report = {key: rest.pop(key) for key in ("flips", "top1_changes", "turns")
                     if isinstance(rest.get(key), list)}  # fmt: skip
    counts = {key: len(items) for key, items in lists.items()}
    return rest | counts | {f"first_{key}": items[:5] for key, items in lists.items()}
