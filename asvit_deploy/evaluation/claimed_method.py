"""Which method an artefact is said to be of, against what its checkpoint makes of that method.

`check` takes an artefact's method from its sidecar. Where the method is named, the sidecar is not
believed: its cuts, counts and bounds must be those that the method has on the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asvit_deploy.artefacts.artefact import Artefact
from asvit_deploy.artefacts.reference import source_checkpoint
from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints.load import Checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.per_picture import bounds
from asvit_deploy.reduction.methods import METHODS, RANKED, restored
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.threshold import Threshold


@dataclass(frozen=True)
class Claim:
    """What artefacts are said to be; None: whatever they say themselves.

    Attributes:
        method: a name of `reduction.methods.METHODS`.
        cuts: the blocks at which tokens leave.
        max_kept: the most rows, prefix included, that any picture keeps behind the last cut.

    Raises:
        UserError: there is no such method.
    """

    method: str | None = None
    cuts: Sequence[int] | None = None
    max_kept: int | None = None

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise UserError(
                f"method={self.method!r} cannot be checked; pass one of {', '.join(METHODS)}"
            )

    @property
    def options(self) -> list[str]:
        """The options that say something."""
        given = {"--method": self.method, "--cuts": self.cuts, "--max-kept": self.max_kept}
        return [option for option, value in given.items() if value is not None]

    def require(self, artefact: Artefact) -> None:
        """Raise UserError for an artefact that is something else, in one line that says what."""
        if not self.options:
            return
        path, fields = artefact.path, artefact.fields
        own = _method_of(fields)
        if own is None:
            raise UserError(
                f"{path} is dense, of no method; drop {self.options[0]}, or export it with --method"
            )
        if self.method not in (None, own):
            raise UserError(
                f"{path} is of the method {own} and not of {self.method}; pass --method {own}, or "
                f"a file that was exported with --method {self.method}"
            )
        blocks = fields["reduction"]["blocks"] if "reduction" in fields else fields["stages"]
        if self.cuts is not None and list(self.cuts) != blocks:
            raise UserError(
                f"{path} cuts at the blocks {_listed(blocks)} and not at {_listed(self.cuts)}; "
                "pass its own, or export it with these"
            )
        _require_derived(artefact, own, self.max_kept)


def _method_of(fields: dict[str, Any]) -> str | None:
    if not fields["adaptive"]:
        return None
    return fields["reduction"]["name"] if "reduction" in fields else Threshold.name


def _listed(numbers: Sequence[Any]) -> str:
    return ",".join(map(str, numbers))


def _require_derived(artefact: Artefact, own: str, max_kept: int | None) -> None:
    """Raise UserError where the checkpoint makes another reduction than the sidecar has."""
    path, fields = artefact.path, artefact.fields
    checkpoint = source_checkpoint(path, artefact.checkpoint_fields)
    theirs = fields.get("reduction", {"name": own})
    base = _reduction_of(checkpoint, own, fields)
    if base["name"] != own:
        raise UserError(
            f"{path} says that it is of the method {own}, and {checkpoint.path}, from which it was "
            f"made, is of {base['name']}; export it again"
        )
    made = restored(base, checkpoint.config.prefix) if "kept" in base else None
    if max_kept is not None:
        if not isinstance(made, Ranked) or made.kept is not None:
            raise UserError(
                f"{path} is of {own}, whose counts here --max-kept does not bound; drop it"
            )
        _require_bound(artefact, made, theirs, max_kept)
    for key in ("blocks", "kept", "merged"):
        if key in base and base[key] != theirs[key]:
            raise UserError(
                f"the sidecar of {path} says {key} {theirs[key]!r} where {own} has {base[key]!r} "
                f"on {checkpoint.path}; export it again"
            )


def _reduction_of(checkpoint: Checkpoint, own: str, fields: dict[str, Any]) -> dict[str, Any]:
    """As `Reduction.fields`: the checkpoint's own method, or what dense weights get on a budget;
    of AS-ViT's thresholds the name alone."""
    if checkpoint.adaptive:
        return checkpoint.reduction or {"name": Threshold.name}
    budget = fields.get("budget")
    if own not in RANKED or budget is None:  # its thresholds or its budget stand nowhere else
        return {"name": "none"}
    config = checkpoint.config
    if fields.get("budget_by") == "release":
        config = config.released()
    return fixed_counts(config, RANKED[own], budget, fields["reduction"]["blocks"]).fields()


def _require_bound(artefact: Artefact, made: Ranked, theirs: dict[str, Any], max_kept: int) -> None:
    config, own = artefact.config, theirs.get("most")
    if own == bounds(config, made, max_kept):
        return
    if own is None:
        raise UserError(
            f"{artefact.path} bounds no picture; drop --max-kept, or export it with that"
        )
    rows = own[-1] + config.prefix + made.appends
    raise UserError(
        f"{artefact.path} keeps {rows} rows of any picture at most and not {max_kept}; pass "
        f"--max-kept {rows}, or export it with {max_kept}"
    )
