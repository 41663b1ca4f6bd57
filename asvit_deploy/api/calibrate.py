"""`asvit_deploy.calibrate`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_files,
    checkpoint_path,
    given_facts,
    optional_path,
    require_at_least,
    require_numbers,
    require_one_of,
    require_whole,
    say_load,
)
from asvit_deploy.api.methods import AUTO, EXECUTED, RELEASE, THRESHOLD, method_for, require_trained
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, hide_bar, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.data.images import ImageSet
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.models.vit import ViT

LARGEST_SEED = 2**63 - 4  # the draws take the seed and the two after it; a generator's end at 2^63


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint whose tokens leave, on a budget.

    Attributes:
        output: the `.safetensors`; its sidecar lies beside it.
        config: the architecture.
        method: the reduction's name.
        thresholds: one for each cut; none where as many tokens of every picture stay.
        report: what it costs, keeps and gets right, beside chance and what else was tried; ready
            for JSON.
        machine: what it ran on.
    """

    output: Path
    config: ArchConfig
    method: str
    thresholds: tuple[float, ...]
    report: dict[str, Any]
    machine: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What `asvit-deploy calibrate --json` prints."""
        from asvit_deploy.sidecar import command_line

        return {"kind": "calibrate", "output": str(self.output), **self.report,
                "machine": self.machine, "command": command_line()}  # fmt: skip


def calibrate(
    ckpt: PathLike, *, images: PathLike | None = None, budget: float = 0.65,
    method: str | None = None, cuts: Sequence[int] | None = None, per_picture: bool = False,
    max_kept: int | None = None, budget_by: Literal["executed", "release"] = "executed",
    output: PathLike | None = None, image_size: int | None = None, arch: str | None = None,
    ema: bool = False, mean: Channels | None = None, std: Channels | None = None,
    crop_pct: float | None = None, interpolation: str | None = None, heads: int | None = None,
    activation: str | None = None,
    limit: int | None = None, seed: int = 0, skip_limit: int = 0, html: PathLike | None = None,
    force: bool = False,
    say: Say = silent,
) -> Calibrated:  # fmt: skip
    """Make a network's tokens leave on a MACs budget, without training.

    The options are those of `asvit-deploy calibrate`.

    Args:
        budget: MACs as a fraction of the dense ones, above 0 and below 1.
        method: a name of `reduction.methods.METHODS`, or "auto": the best of three by evidence. By
            default the checkpoint's own method, and "auto" for dense weights.
        cuts: blocks at which tokens leave, rising; by default the method's usual ones.
        per_picture: a threshold at each cut in place of a fixed number of tokens.
        max_kept: with `per_picture`, the most rows that any picture keeps behind the last cut.
        budget_by: whether the budget counts MACs as they are carried out, or as the AS-ViT release
            does, which works out all rows of the last block.
        html: also make a page of the report there, as `asvit_deploy.report` does.
        say: gets status lines; a progress bar goes with them on a terminal.

    Raises:
        UserError: bad input, too few pictures, a budget that they cannot meet within 1 %, a
            checkpoint of another method, or an output that cannot be written or is there without
            `force`.
    """
    require_at_least(1, limit=limit)
    require_whole(image_size=image_size)
    require_numbers({"budget": budget})
    require_at_least(0, skip_limit=skip_limit, seed=seed)
    if seed > LARGEST_SEED:
        raise UserError(f"seed={seed} cannot be used; pass a number up to {LARGEST_SEED}")
    require_one_of("budget_by", budget_by, (EXECUTED, RELEASE))
    require_at_least(1, max_kept=max_kept)
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    folder, target = optional_path(images), optional_path(output)
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.checkpoints.places import name_of
    from asvit_deploy.classes.network import named, of_checkpoint
    from asvit_deploy.data.images import open_images
    from asvit_deploy.evaluation.machine import machine
    from asvit_deploy.page.writing import claimed_page, write
    from asvit_deploy.sidecar import claimed

    place = checkpoint_path(ckpt, say)
    target = target or Path(f"{name_of(place)}.calibrated.safetensors")
    shown, sources = optional_path(html), checkpoint_files(place)
    with (
        claimed_page(shown, force, *sources, other=target),
        claimed(target, "checkpoint", force, *sources),
    ):
        checkpoint = load_checkpoint(place, image_size, arch, ema, known)
        method = method_for(checkpoint, method)
        require_trained(checkpoint, method)
        wanted = _Wanted(method, budget, None if cuts is None else tuple(cuts), per_picture,
                         max_kept, budget_by, seed)  # fmt: skip
        wanted.check()
        say_load(checkpoint, say)
        # What lies beside the checkpoint may not lie beside the output.
        checkpoint = named(checkpoint, of_checkpoint(checkpoint, None, say, assume=False))
        config = checkpoint.config
        limit = limit or (256 if folder else 64)
        pictures = open_images(folder, config, limit, skip_limit, say).readable()
        say(f"{place}: {config.name}, {config.image_size} px; {pictures.source}")
        model, found = _calibrated(checkpoint, pictures, wanted, say)
        report = _save(target, model, checkpoint, pictures, wanted, found, say)
        values = tuple(model.threshold_values())
        made = Calibrated(target, model.config, report["method"], values, report, machine())
        if shown is not None:
            write([made.as_dict()], shown, force)
    return made


@dataclass(frozen=True)
class _Wanted:
    """As the arguments of `calibrate`."""

    method: str
    budget: float
    cuts: tuple[int, ...] | None
    per_picture: bool
    max_kept: int | None
    budget_by: str
    seed: int

    def check(self) -> None:
        """Raises UserError for options that do not go together."""
        from asvit_deploy.per_picture import check
        from asvit_deploy.reduction.ltmp import LTMP
        from asvit_deploy.reduction.methods import METHODS

        if self.max_kept is not None and self.method == LTMP.name:
            raise UserError(
                f"--max-kept has no use with {LTMP.name}, which nothing bounds; drop it"
            )
        if self.max_kept is not None and (self.method == THRESHOLD or not self.per_picture):
            raise UserError(
                "--max-kept bounds what each picture keeps by --per-picture; pass that too, and "
                f"another method than {THRESHOLD}"
            )
        if self.per_picture and self.method != AUTO:
            check(METHODS[self.method])


def _calibrated(
    checkpoint: Checkpoint, pictures: ImageSet, wanted: _Wanted, say: Say
) -> tuple[ViT, dict[str, Any]]:
    """The network with its method, and the report."""
    from tqdm import tqdm

    from asvit_deploy import calibration, choice
    from asvit_deploy.checkpoints.load import build_model
    from asvit_deploy.reduction.methods import METHODS

    config = checkpoint.config
    if wanted.budget_by == RELEASE:
        config = config.released()
    if wanted.method == THRESHOLD and wanted.cuts is not None:
        config = config.with_stages(wanted.cuts)
    checkpoint = replace(checkpoint, config=config)
    model = build_model(checkpoint)  # what its own method learned may be taken over
    with tqdm(desc="calibrate", unit="pass", disable=hide_bar(say), leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update()

        if wanted.method == THRESHOLD:
            result = calibration.calibrate(model, pictures, wanted.budget, wanted.seed, progress)
            made = calibration.with_thresholds(checkpoint, result.thresholds)
            return made, {"method": THRESHOLD, **result.report}
        named = None if wanted.method == AUTO else METHODS[wanted.method]
        asked = choice.Wanted(named, wanted.budget, wanted.cuts,
                              wanted.per_picture, wanted.max_kept)  # fmt: skip
        chosen = choice.choose(model, pictures, asked, progress)
    return model.with_reduction(chosen.reduction), chosen.report


def _save(
    target: Path, model: ViT, checkpoint: Checkpoint, pictures: ImageSet, wanted: _Wanted,
    found: dict[str, Any], say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Write the checkpoint and return the report, which is kept in it too."""
    from asvit_deploy.checkpoints.beside import backbone_beside, beside_line
    from asvit_deploy.checkpoints.load import save_checkpoint
    from asvit_deploy.checkpoints.places import fingerprint
    from asvit_deploy.sidecar import provenance

    config = checkpoint.config
    report = {"arch": config.name, "image_size": config.image_size, **found}
    report |= {"budget_by": wanted.budget_by, "pictures": pictures.source, **pictures.account}
    report["source_sha256"] = fingerprint(checkpoint.path)
    metadata = {
        **checkpoint.metadata,
        **checkpoint.origins.metadata(),
        "budget": str(wanted.budget),
        "budget_by": wanted.budget_by,
        "calibration": json.dumps(report),
        "source_sha256": report["source_sha256"],
        "provenance": json.dumps(provenance(["torch"])),
    }
    backbone = backbone_beside(target, model, checkpoint)
    if backbone is not None:
        say(beside_line(target, backbone))
    save_checkpoint(target, model, metadata, backbone)
    return report
