"""The folder that a run fills: what lies in it, and whose it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.runtime_choice import choice_path
from asvit_deploy.claims import claimed
from asvit_deploy.disk import unwritten
from asvit_deploy.errors import UserError
from asvit_deploy.files import check_parent, check_writable

REPORT, PAGE, MEASURED = "tune.json", "report.html", "measured"


class Place:
    """Names in an output folder.

    Args:
        folder: of the run.
        name: of the network, as its checkpoint is called.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.report, self.page = folder / REPORT, folder / PAGE
        self.measured = folder / MEASURED
        self.checkpoint = folder / f"{name}.tuned.safetensors"
        self.model = folder / f"{name}.tuned.onnx"
        self.choice = choice_path(self.model)
        # Of a winner that is an engine, or several in a folder.
        self.engine = folder / f"{name}.tuned.engine"
        self.bundle = folder / f"{name}.tuned.bucketed"

    @property
    def exported(self) -> list[Path]:
        """What there is of a winner alone, as files."""
        own = [self.model, self.checkpoint, self.engine]
        return [*own, *map(sidecar.sidecar_path, own), self.choice]

    def check(self, force: bool, sources: tuple[Path, ...]) -> None:
        """Find out before the work whether the folder can be filled.

        Args:
            sources: the run's own inputs.

        Raises:
            UserError: it holds others' files and `force` is off, is a file, or cannot be written.
        """
        if not os.path.lexists(self.folder):
            check_parent(self.folder)
            return
        if not self.folder.exists():
            raise UserError(f"{self.folder} is a link to nothing; remove it, or name a folder with "
                            "--output")  # fmt: skip
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; name a folder with --output")
        ours = {path.name for path in (self.report, self.page, self.measured, self.bundle,
                                       *self.exported)}  # fmt: skip
        others = sorted(path.name for path in self.folder.iterdir()
                        if path.name not in ours and not path.name.startswith("."))  # fmt: skip
        if others and not force:
            raise UserError(
                f"{self.folder} holds {others[0]}, which is of no tune of this model; name another "
                "folder with --output, or pass --force to write beside it"
            )
        if os.path.lexists(self.measured) and not self.measured.is_dir():
            raise UserError(f"{self.measured} is no folder; remove it, or name another folder with "
                            "--output")  # fmt: skip
        for path in (self.report, self.page, *self.exported):
            check_writable(path, True, *sources)
        bundle.check_target(self.bundle, "bucketed", True)

    @contextlib.contextmanager
    def claimed(self, force: bool, sources: tuple[Path, ...]) -> Iterator[None]:
        """The folder, made where it is missing; no other run fills it meanwhile. What was made and
        nothing put into is gone again afterwards."""
        self.check(force, sources)
        ours = [self.measured] if self.folder.exists() else [self.measured, self.folder]
        try:
            self.folder.mkdir(exist_ok=True)
            self.measured.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritten(self.measured, error) from error
        try:
            with claimed(self.report):
                yield
        finally:
            for path in ours:
                with contextlib.suppress(OSError):
                    path.rmdir()

    def clear(self) -> None:
        """Remove what an earlier run exported here."""
        for path in self.exported:
            path.unlink(missing_ok=True)
        bundle.remove(self.bundle)

    def clear_engines(self, keep: Path | None = None) -> None:
        """Remove what an earlier run's winner had for engines, but for the one named."""
        if keep != self.engine:
            for path in (self.engine, sidecar.sidecar_path(self.engine)):
                path.unlink(missing_ok=True)
        if keep != self.bundle:
            bundle.remove(self.bundle)
