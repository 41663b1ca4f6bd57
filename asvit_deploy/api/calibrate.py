"""`asvit_deploy.calibrate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_files,
    checkpoint_path,
    given_facts,
    optional_path,
    require_at_least,
    require_numbers,
    require_whole,
    say_load,
)
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, hide_bar, silent

if TYPE_CHECKING:
    from asvit_deploy.calibration import CalibrationResult
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.data.images import ImageSet
    from asvit_deploy.models.config import ArchConfig

LARGEST_SEED = 2**63 - 4  # the draws take the seed and the two after it; a generator's end at 2^63


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint with thresholds that meet a budget.

    Attributes:
        output: the `.safetensors`; its sidecar lies beside it.
        config: the architecture.
        thresholds: one for each stage.
        report: what they cost, keep and get right, beside chance, and the splits that were tried;
            ready for JSON.
    """

    output: Path
    config: ArchConfig
    thresholds: tuple[float, ...]
    report: dict[str, Any]


def calibrate(
    ckpt: PathLike, *, images: PathLike | None = None, budget: float = 0.65,
    output: PathLike | None = None, image_size: int | None = None, arch: str | None = None,
    ema: bool = False, mean: Channels | None = None, std: Channels | None = None,
    crop_pct: float | None = None, interpolation: str | None = None, heads: int | None = None,
    activation: str | None = None,
    limit: int | None = None, seed: int = 0, skip_limit: int = 0, force: bool = False,
    say: Say = silent,
) -> Calibrated:  # fmt: skip
    """Find thresholds that meet a MACs budget on pictures, without training.

    The options are those of `asvit-deploy calibrate`.

    Args:
        budget: MACs as a fraction of the dense ones, above 0 and below 1.
        say: gets status lines; a progress bar goes with them on a terminal.

    Raises:
        UserError: bad input, too few pictures, a budget that they cannot meet within 1 %, or an
            output that cannot be written or is there without `force`.
    """
    require_at_least(1, limit=limit)
    require_whole(image_size=image_size)
    require_numbers({"budget": budget})
    require_at_least(0, skip_limit=skip_limit, seed=seed)
    if seed > LARGEST_SEED:
        raise UserError(f"seed={seed} cannot be used; pass a number up to {LARGEST_SEED}")
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    folder, target = optional_path(images), optional_path(output)
    from asvit_deploy.checkpoints.load import load_checkpoint, require_one_token
    from asvit_deploy.checkpoints.places import name_of
    from asvit_deploy.classes.network import named, of_checkpoint
    from asvit_deploy.data.images import open_images
    from asvit_deploy.sidecar import claimed

    place = checkpoint_path(ckpt, say)
    target = target or Path(f"{name_of(place)}.calibrated.safetensors")
    with claimed(target, "checkpoint", force, *checkpoint_files(place)):
        checkpoint = load_checkpoint(place, image_size, arch, ema, known)
        require_one_token(checkpoint)
        say_load(checkpoint, say)
        # What lies beside the checkpoint may not lie beside the output.
        checkpoint = named(checkpoint, of_checkpoint(checkpoint, None, say, assume=False))
        config = checkpoint.config
        limit = limit or (256 if folder else 64)
        pictures = open_images(folder, config, limit, skip_limit, say).readable()
        say(f"{place}: {config.name}, {config.image_size} px; {pictures.source}")
        result = _calibrated(checkpoint, pictures, budget, seed, say)
        report = _save(target, checkpoint, pictures, budget, result)
    return Calibrated(target, config, result.thresholds, report)


def _calibrated(
    checkpoint: Checkpoint, pictures: ImageSet, budget: float, seed: int, say: Say
) -> CalibrationResult:
    from tqdm import tqdm

    from asvit_deploy.calibration import calibrate as find_thresholds
    from asvit_deploy.checkpoints.load import build_model

    with tqdm(desc="calibrate", unit="pass", disable=hide_bar(say), leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update()

        model = build_model(checkpoint, dense=True)
        return find_thresholds(model, pictures, budget, seed, progress)


def _save(
    target: Path, checkpoint: Checkpoint, pictures: ImageSet, budget: float,
    result: CalibrationResult,
) -> dict[str, Any]:  # fmt: skip
    """Write the checkpoint and return the report, which is kept in it too."""
    from asvit_deploy.calibration import with_thresholds
    from asvit_deploy.checkpoints.load import save_checkpoint
    from asvit_deploy.checkpoints.places import fingerprint
    from asvit_deploy.sidecar import provenance

    config = checkpoint.config
    report = {"arch": config.name, "image_size": config.image_size, **result.report}
    report |= {"pictures": pictures.source, **pictures.account}
    report["source_sha256"] = fingerprint(checkpoint.path)
    metadata = {
        **checkpoint.metadata,
        **checkpoint.origins.metadata(),
        "budget": str(budget),
        "calibration": json.dumps(report),
        "source_sha256": report["source_sha256"],
        "provenance": json.dumps(provenance(["torch"])),
    }
    save_checkpoint(target, with_thresholds(checkpoint, result.thresholds), metadata)
    return report
