"""Artefacts against what they must agree with: outputs, top-1 or neighbours, kept tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from asvit_deploy import files, sidecar
from asvit_deploy.artefacts.artefact import Artefact, Ways
from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
from asvit_deploy.artefacts.opening import artefacts_here, kind_of, open_artefact, paths_of
from asvit_deploy.artefacts.runtime_choice import run_as_chosen
from asvit_deploy.claims import claimed
from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.arguments import bar, path_of, require_least
from asvit_deploy.evaluation.claimed_method import Claim
from asvit_deploy.evaluation.machine import machine
from asvit_deploy.page import writing as page
from asvit_deploy.parity import CHOICE, Parity, compare
from asvit_deploy.runners.base import Reference
from asvit_deploy.runners.trt_plan import Allowed, named_plugin
from asvit_deploy.runtimes import (
    AUTO,
    CHECKED,
    TORCH,
    chosen,
    require_auto,
    require_library_used,
    require_used,
)
from asvit_deploy.status import silent

_BATCH = 8  # what a dynamic-batch model is also run with


@dataclass(frozen=True)
class Comparison:
    """One artefact, run in one way and batch size, against its reference.

    Attributes:
        model: its path.
        run: the way and the batch size.
        images: where the pictures come from.
        account: how many were skipped and passed over, by reason and ending.
        reference: as `Runner.describe`.
        parity: the verdict, and all that led to it.
        machine: what it ran on.
        sha256: of the file, or None of a bundle and of what another tool made.
    """

    model: str
    run: str
    images: str
    account: dict[str, Any]
    reference: dict[str, str]
    parity: Parity
    machine: dict[str, Any] = field(default_factory=machine)
    sha256: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it agrees."""
        return self.parity.passed

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the account's entries stand beside the others, and what was called."""
        return {"kind": "check", "model": self.model, "sha256": self.sha256, "run": self.run,
                "images": self.images, **self.account, "reference": self.reference,
                "parity": self.parity.as_dict(), "machine": self.machine,
                "command": sidecar.command_line()}  # fmt: skip


def check(
    models: str | Path | Sequence[str | Path] = (),
    *,
    images: str | Path | None = None,
    limit: int = 200,
    skip_limit: int = 0,
    reference: str | Path | None = None,
    method: str | None = None,
    cuts: Sequence[int] | None = None,
    max_kept: int | None = None,
    library: str | Path | None = None,
    plugin: str | Path | None = None,
    allow_engine_code: bool = False,
    runtime: str | Sequence[str] | None = None,
    choice: str | Path | None = None,
    output: str | Path | None = None,
    html: str | Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = silent,
) -> list[Comparison]:
    """Compare artefacts with PyTorch, in every way that they can run here.

    Args:
        models: ONNX files, engines and bundles; none stands for the ONNX artefacts of the current
            folder.
        images: folder of pictures, or None for the photographs of scikit-image.
        limit: use at most so many pictures.
        skip_limit: so many of them may be unreadable.
        reference: an ONNX artefact to compare with in place of PyTorch; then a model may be a file
            that another tool made from it.
        method: of which the artefacts must be; their reference is then what this method makes of
            their checkpoint, and a sidecar that says otherwise is refused. By default, what each
            sidecar says.
        cuts: the blocks at which their tokens must leave.
        max_kept: the bound that they must have on the rows of any picture.
        library: the op's library for ONNX Runtime, or None for the one that `build-plugins` made.
        plugin: the op's TensorRT library, likewise.
        allow_engine_code: run code that an engine brings along.
        runtime: only in these, of `runtimes.NAMES`, by default in `runtimes.CHECKED`; a text names
            several with commas. "auto" is the one that `bench(save_choice=...)` found fastest.
        choice: what runtime "auto" reads, by default `MODEL.choice.json`.
        output: also write the comparisons there as JSON.
        html: also make a page of them there, as `asvit_deploy.report` does.
        force: replace a file that is there.
        say: gets status lines; a progress bar is shown only where this is given.

    Returns:
        one for each artefact, way and batch size; they are good where all have `passed`.

    Raises:
        UserError: an artefact cannot be opened or run, is of another method, cuts or bound than
            those named, a runtime named is missing or runs none of them, the pictures cannot be
            read, or `output` or `html` cannot be written.
    """
    require_least(1, limit=limit)
    require_least(0, skip_limit=skip_limit)
    if max_kept is not None:
        require_least(1, max_kept=max_kept)
    runtimes, chosen_by = chosen(runtime, auto=True), path_of(choice)
    require_auto(chosen_by, runtimes)
    require_library_used(library, runtimes)
    if TORCH in runtimes and reference is None:
        raise _with_itself()
    claim = Claim(method, cuts, max_kept)
    if reference is not None and claim.options:
        raise UserError(
            f"{claim.options[0]} makes the reference from the checkpoint, and --reference names "
            "another; drop one of them"
        )
    allowed = Allowed(named_plugin(path_of(plugin)), allow_engine_code)
    found = find_op_library(path_of(library), say)
    paths = paths_of(models) or artefacts_here("onnx")
    require_used(runtimes, [kind_of(path) or "onnx" for path in paths])

    said = set[str]()

    def once(line: str) -> None:  # all but the first are opened twice
        if line not in said:
            say(line)
        said.add(line)

    def opened(path: Path) -> tuple[Artefact, Reference, Ways]:
        """Everything that checking `path` needs: what cannot be loaded is refused here."""
        artefact = _artefact(path, found, allowed, path_of(reference), claim, once)
        if runtimes != (AUTO,):
            ways = artefact.ways(runtimes=runtimes or CHECKED)
        else:
            assert isinstance(artefact, OnnxArtefact)  # `require_used` refused engines
            ways = run_as_chosen(artefact, chosen_by, once)
            if TORCH in ways.runtimes.values() and reference is None:
                raise _with_itself()
        judge = artefact.judge()
        for way in ways:
            ways[way]
        return artefact, judge, ways

    comparisons: list[Comparison] = []
    target, shown = path_of(output), path_of(html)
    with _written(target, shown, force, [*paths, *filter(None, [path_of(reference)])]):
        # A bad one is refused before the first has run for minutes; each is let go again, so that
        # never more than one is in memory.
        for path in paths[1:]:
            opened(path)
        for path in paths:
            comparisons += _compared(*opened(path), path_of(images), limit, skip_limit, say)
        if target is not None:
            files.write_text(target, as_json(comparisons) + "\n")
        if shown is not None:
            page.write([one.as_dict() for one in comparisons], shown, force)
    return comparisons


def as_json(comparisons: Sequence[Comparison]) -> str:
    """What `output` gets."""
    return json.dumps([comparison.as_dict() for comparison in comparisons], indent=2)


@contextlib.contextmanager
def _written(
    target: Path | None, shown: Path | None, force: bool, models: Sequence[Path]
) -> Iterator[None]:
    """No other run makes the JSON or the page meanwhile, and neither is one of the models."""
    found = [path for path in models if path.is_file()]
    sources = [*found, *map(sidecar.sidecar_path, found)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(page.claimed_page(shown, force, *sources, other=target))
        if target is not None:
            check = partial(files.check_writable, target, force, *sources)
            stack.enter_context(claimed(target, force, check))
        yield


def _with_itself() -> UserError:
    return UserError(
        "artefacts are compared with PyTorch, so runtime torch would be compared with itself; "
        "name another runtime, or an ONNX artefact as the reference"
    )


def _artefact(
    path: Path, library: Path | None, allowed: Allowed, original: Path | None, claim: Claim,
    say: Callable[[str], None],
) -> Artefact:  # fmt: skip
    """The artefact, once it is what it is claimed to be and may run here."""
    artefact = open_artefact(path, library, allowed, original)
    claim.require(artefact)
    artefact.require_runnable()
    for note in artefact.notes:
        say(note)
    return artefact


def _compared(
    artefact: Artefact, judge: Reference, ways: Ways, images: Path | None, limit: int,
    skip_limit: int, say: Callable[[str], None],
) -> list[Comparison]:  # fmt: skip
    pictures = open_images(images, artefact.config, limit, skip_limit, say)
    loaded, names = pictures.loaded()
    say(f"{artefact.path}: {len(loaded)} images ({pictures.source})")
    if artefact.config.output == "embedding" and len(loaded) < CHOICE:
        say(f"{artefact.path}: nearest neighbours take {CHOICE} images to be judged")
    batches = (1, _BATCH) if artefact.dynamic_batch else (1,)
    runs = [(way, batch) for way in ways for batch in batches]
    comparisons = []
    with bar(say, desc="check", total=len(runs)) as progress:
        for way, batch in runs:
            parity = compare(
                judge, ways[way], loaded, names, artefact.boundaries,
                ways.parity.get(way, artefact.parity), batch, artefact.config.output,
            )  # fmt: skip
            found = Comparison(
                str(artefact.path), f"{way}, batch {batch}", pictures.source, pictures.account,
                judge.describe(), parity, sha256=artefact.fields.get("sha256"),
            )  # fmt: skip
            comparisons.append(found)
            progress.update()
    return comparisons
