"""The folder of drawings: a row for each picture, a gallery of some, and what they show as JSON.

`kept.json` carries a digest of its fields, as sidecars do, and names every file of the folder: a
folder with any other file in it is nobody's to replace.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from asvit_deploy import sidecar
from asvit_deploy.artefacts.artefact import Artefact
from asvit_deploy.bounded import MOST_TEXT
from asvit_deploy.claims import claimed
from asvit_deploy.data.images import pixels_of
from asvit_deploy.drawing import figure
from asvit_deploy.drawing.choosing import PANELS, kinds_of, shown
from asvit_deploy.drawing.tokens import fates, panel, scaled
from asvit_deploy.errors import UserError
from asvit_deploy.files import atomic_folder, check_parent
from asvit_deploy.runners.base import Prediction

KIND = "visualize"
KEPT, GALLERY = "kept.json", "gallery.png"
_STEM = 60  # characters of a picture's name in that of its drawing
_HEAD = 1 << 20  # bytes of `kept.json` that are not on single pictures, at most


@dataclass(frozen=True)
class Answer:
    """What a network says of one picture: its best class, or its one output.

    Attributes:
        label: of either; "" where an output has no name.
        index: of the class.
        probability: of the class, 0 to 1.
        score: the one output.
    """

    label: str
    index: int | None = None
    probability: float | None = None
    score: float | None = None

    def __str__(self) -> str:
        if self.score is not None:
            return f"score {self.score:.6g}  {self.label}".rstrip()
        return self.label if self.probability is None else f"{self.label}  {self.probability:.1%}"


@dataclass(frozen=True)
class Drawn:
    """One picture's drawing, and what it shows.

    Attributes:
        image: the picture, as it is called in its folder.
        file: the drawing's name.
        kept: per cut, the image tokens that stay, by their numbers among all of them.
        into: per cut, (token, token that takes it) of those that leave there and go to another;
            None where the method lets what leaves be lost.
        added: per cut, rows in use that are no image tokens and no prefix, such as fused ones.
        answer: what the network says; None of an embedding.
    """

    image: str
    file: str
    kept: tuple[tuple[int, ...], ...]
    into: tuple[tuple[tuple[int, int], ...], ...] | None
    added: tuple[int, ...]
    answer: Answer | None

    @property
    def mean_kept(self) -> float:
        """Image tokens that stay, on average over the cuts."""
        return sum(map(len, self.kept)) / len(self.kept)


def require_cuts(artefact: Artefact) -> None:
    """Raises UserError where no token ever leaves."""
    if not artefact.adaptive:
        raise UserError(
            f"{artefact.path} is dense: every token stays, so there is nothing to draw; name a "
            "model from which tokens leave"
        )


def check_target(path: Path, force: bool) -> None:
    """Find out before the work whether a folder of drawings could be put at `path`.

    Raises:
        UserError: it holds anything that is no drawing of ours, or drawings and `force` is off; it
            is a file, or cannot be written.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path} names no folder of its own; give the folder of drawings a name")
    check_parent(path)
    if not path.is_dir():
        if path.exists() or path.is_symlink():
            raise UserError(f"cannot write {path}: it is no folder; name another")
        return
    try:
        there = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another folder") from None
    if others := sorted(there - _own(path)):
        raise UserError(
            f"{path} holds {others[0]!r}, which is no drawing of this tool; name another folder"
        )
    if there and not force:
        raise UserError(f"{path} exists already; pass --force to replace it")


def _own(folder: Path) -> set[str]:
    """The files that a folder's own `kept.json` names, itself among them."""
    with contextlib.suppress(UserError, OSError):
        fields = sidecar.read_signed(folder / KEPT, "list of drawings", folder.name, "kind")
        files = fields.get("files")
        if fields["kind"] == KIND and isinstance(files, list):
            return {KEPT, *(name for name in files if isinstance(name, str))}
    return set()


class Album:
    """Drawings of one artefact as they are made, in a folder that is not in its place yet.

    Args:
        path: where the folder will lie.
        folder: where they are written meanwhile.
        artefact: what they are of.
        panels: cuts that a row shows at most, the first and the last among them.
    """

    def __init__(
        self, path: Path, folder: Path, artefact: Artefact, panels: int = PANELS
    ) -> None:  # fmt: skip
        self.path, self.artefact, self.drawn = path, artefact, list[Drawn]()
        self._folder, self._panels = folder, panels
        self._bytes = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """The block of each cut, counted from 0."""
        cuts = self.artefact.cuts
        return self.artefact.config.stages if cuts is None else tuple(cut // 2 for cut in cuts)

    def add(
        self, image: str, pixels: NDArray[np.float32], prediction: Prediction,
        answer: Answer | None, place: int = 0,
    ) -> Drawn:  # fmt: skip
        """Draw a picture.

        Args:
            image: what it is called.
            pixels: the network's input, float32 [3, H, W].
            prediction: of a batch.
            place: of the picture in that batch.

        Raises:
            UserError: which tokens stayed is not recorded, or all the pictures' are too many to be
                written down.
        """
        if prediction.kept is None:
            raise UserError(
                f"{self.artefact.path} says how many tokens stay and not which; export with "
                "--stage-outputs and build it again, or name its ONNX file"
            )
        kept = [stage[place] for stage in prediction.kept]
        into = None if prediction.into is None else [stage[place] for stage in prediction.into]
        tokens = self.artefact.config.image_tokens
        alive = [int(length[place]) - prediction.prefix for length in prediction.lengths]
        found = Drawn(
            image, f"{len(self.drawn) + 1:04}-{_plain(image)}.png",
            tuple(tuple(stage[stage < tokens].tolist()) for stage in kept),
            None if into is None else _handed_on(kept, into),
            tuple(rows - int((stage < tokens).sum()) for rows, stage in zip(alive, kept)), answer,
        )  # fmt: skip
        self._bytes += len(json.dumps(asdict(found)))
        if self._bytes > MOST_TEXT - _HEAD:
            raise UserError(
                f"what stays of {len(self.drawn)} pictures takes as much as {KEPT} may hold; look "
                "at fewer with --limit"
            )
        self._draw(found, pixels_of(pixels, self.artefact.config), kept, into)
        self.drawn.append(found)
        return found

    def _draw(
        self, found: Drawn, crop: NDArray[np.uint8], kept: Sequence[NDArray[np.int64]],
        into: Sequence[NDArray[np.int64]] | None,
    ) -> None:  # fmt: skip
        config, cuts = self.artefact.config, len(kept)
        picture = scaled(crop, config.grid)
        panels = [figure.Panel(picture, "input", f"{config.image_tokens} tokens")]
        fate = fates(kept, into, config.image_tokens)
        for cut in shown(cuts, self._panels):
            fused = f", {found.added[cut]} added" if found.added[cut] else ""
            panels.append(figure.Panel(
                panel(picture, fate[cut]), f"cut {cut + 1} of {cuts}, block {self.blocks[cut]}",
                f"{len(found.kept[cut])} of {config.image_tokens} stay{fused}",
            ))  # fmt: skip
        note = f"{len(panels) - 1} of {cuts} cuts" if len(panels) <= cuts else ""
        answer = "" if found.answer is None else str(found.answer)
        drawing = figure.row(found.image, answer, note, panels)
        drawing.save(self._folder / found.file, compress_level=4)

    def finish(
        self, runner: dict[str, str], source: str, account: dict[str, Any],
        machine: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Draw the gallery and write `kept.json`.

        Args:
            runner: as `Runner.describe`.
            source: where the pictures come from.
            account: how many were skipped and why, for JSON.
            machine: what it ran on, likewise.

        Raises:
            UserError: as `sidecar.signed`.
        """
        self._gallery()
        artefact = self.artefact
        config, fields = artefact.config, artefact.fields
        said = {
            "kind": KIND, "model": artefact.path.name, "sha256": fields.get("sha256"),
            "reduction": fields.get("reduction"), "thresholds": fields.get("thresholds"),
            "precision": fields.get("precision"), "runner": runner,
            "image_size": config.image_size, "patch_size": config.patch_size, "grid": config.grid,
            "image_tokens": config.image_tokens, "prefix": config.prefix,
            "blocks": list(self.blocks), "panels": shown(len(self.blocks), self._panels),
            "images": source, **account, "gallery": GALLERY,
            "files": [GALLERY, *(one.file for one in self.drawn)],
            "pictures": [asdict(one) for one in self.drawn], "machine": machine,
            **sidecar.provenance(("numpy", "pillow")),
        }  # fmt: skip
        (self._folder / KEPT).write_text(sidecar.signed(said, indent=None))

    def _gallery(self) -> None:
        kinds = kinds_of([sum(map(len, one.kept)) for one in self.drawn])
        rows, tokens = [], self.artefact.config.image_tokens
        for kind, places in kinds:
            for one in (self.drawn[place] for place in places):
                with Image.open(self._folder / one.file) as drawing:
                    mean = f"{one.mean_kept:.1f} of {tokens}" if kind else ""
                    rows.append((kind, mean, drawing.convert("RGB")))
        count = len(self.drawn)
        note = f"{len(rows)} of {count} picture{'s' * (count != 1)}"
        if kinds[0][0]:
            note += "; easy ones keep the fewest tokens, on average over the cuts"
        elif count > 1:
            note += "; every picture keeps the same number of tokens"
        page = figure.gallery(f"What stays in {self.artefact.path.name}", note, rows)
        page.save(self._folder / GALLERY, compress_level=4)


def _plain(name: str) -> str:
    """The stem of a file's name in ASCII letters, digits and a few signs."""
    stem = Path(name).stem[:_STEM]
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in stem)


def _handed_on(
    kept: Sequence[NDArray[np.int64]], into: Sequence[NDArray[np.int64]]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """As `Drawn.into`."""
    found = []
    for staying, goes in zip(kept, into):
        own = np.arange(len(goes))
        leaves = np.flatnonzero((goes >= 0) & (goes != own) & ~np.isin(own, staying))
        found.append(tuple(zip(leaves.tolist(), goes[leaves].tolist())))
    return tuple(found)


@contextlib.contextmanager
def album(path: Path, artefact: Artefact, force: bool, panels: int = PANELS) -> Iterator[Album]:
    """An album whose folder takes its place at `path` only if the block succeeds.

    Raises:
        UserError: as `check_target` and `require_cuts`, or another run is making the folder.
    """
    require_cuts(artefact)
    with (
        claimed(path, check=lambda: check_target(path, force)),
        atomic_folder(path) as folder,
    ):
        yield Album(path, folder, artefact, panels)
