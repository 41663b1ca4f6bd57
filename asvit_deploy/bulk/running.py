"""A bulk run: the parts of this process, and the file once all parts are done."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from asvit_deploy.answers import Prediction, embedded, predicted
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.bulk.joining import EMBEDDINGS, LINES, join_embeddings, join_lines
from asvit_deploy.bulk.pictures import CutPictures, Part
from asvit_deploy.bulk.store import Share, Store
from asvit_deploy.claims import claimed
from asvit_deploy.data.decode import PictureError
from asvit_deploy.data.images import preprocess
from asvit_deploy.data.skips import Skips
from asvit_deploy.errors import Interrupted, UserError, shortened
from asvit_deploy.files import atomic, check_writable
from asvit_deploy.processor import processes_here, usable_cores
from asvit_deploy.runners.base import Runner
from asvit_deploy.status import Say, first_process, hide_bar, silent

_PACKED = 16  # pictures at a time: what groups of like length gain is there by then
_READERS = 8  # threads that decode, at most
_WAIT = 600  # seconds for another process that joins the parts
# What torchrun tells all that it starts at once, and nobody else. (It counts restarts by node.)
_LAUNCH = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Written:
    """What a bulk run wrote.

    Attributes:
        output: the file.
        pictures: those seen, skipped ones among them.
        skipped: those that could not be read, and why.
        passed_over: what lies beside the pictures, by ending or kind.
        parts: how many there were, and how many of them an earlier run had done already.
    """

    output: Path
    pictures: int
    skipped: int
    skipped_by_reason: dict[str, int]
    passed_over: dict[str, int]
    parts: int
    taken_up: int

    def as_dict(self) -> dict[str, Any]:
        """What `asvit-deploy predict --data --json` prints."""
        return {**vars(self), "output": str(self.output)}


def share() -> Share:
    """This process among those of the run, as `torchrun` says it.

    Raises:
        UserError: it says that there are several, and not which this one is, or how many are here.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    known = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
    if not known or (world != "1" and "RANK" not in os.environ):
        raise UserError(
            f"WORLD_SIZE is {world} and RANK {os.environ.get('RANK', 'not set')}, which tells no "
            "process from the others; start them with torchrun, or unset both"
        )
    processes_here()
    launch = " ".join(os.environ.get(name, "") for name in _LAUNCH)
    return Share(int(rank), int(world), launch if _LAUNCH[0] in os.environ else "")


class Bulk:
    """An ONNX artefact over all pictures of a place.

    Args:
        data: as `CutPictures`.
        output: in .jsonl, or .npz.
        labels: names of the classes, or None.
        batch: pictures at a time; None stands for what the file was exported for.

    Raises:
        UserError: the output has another ending, or is not for this network; the file takes one
            picture at a time.
    """

    def __init__(
        self, artefact: OnnxArtefact, data: Path, output: Path, labels: Sequence[str] | None,
        batch: int | None, skip_limit: int,
    ) -> None:  # fmt: skip
        self._artefact, self._data, self._output = artefact, data, output
        self._labels, self._limit = labels, skip_limit
        self._embeds = artefact.config.output == "embedding"
        if output.suffix not in (LINES, EMBEDDINGS):
            raise UserError(
                f"{output} ends in neither {LINES} nor {EMBEDDINGS}; name one that does"
            )
        if output.suffix == EMBEDDINGS and not self._embeds:
            raise UserError(
                f"{artefact.path} gives classes, and {output} would hold embeddings; name an "
                f"output in {LINES}"
            )
        if batch not in (None, 1) and not artefact.dynamic_batch:
            raise UserError(
                f"{artefact.path} takes one picture at a time; export it with --batch packed, or "
                "leave --batch out"
            )
        packed = artefact.fields["batch"] == "packed"
        self._batch = (_PACKED if packed else 1) if batch is None else batch

    def run(
        self, opener: Callable[[], Runner], running: Mapping[str, Any], force: bool, say: Say
    ) -> Written | None:
        """Do the parts of this process that are not done, and join all where none is missing.

        Args:
            opener: makes the runner, where any part is left to do.
            running: what it runs in, by the names of `bulk.store`.
            force: begin anew, and replace the output.

        Returns:
            None where another process has not come yet or is at its parts, which joins them then.

        Raises:
            UserError: see `Store`; more pictures than may be skipped cannot be read, or none can;
                the output exists and `force` is off.
            Interrupted: it was stopped; what is done is kept.
        """
        which = share()
        say = say if first_process() else silent
        pictures = CutPictures(self._data)
        own = pictures.parts[which.rank :: which.world]
        if not own:
            return None
        for line in pictures.notes:
            say(line)
        self._require_output(force, pictures)
        about = {**self._identity(pictures.parts), **running}
        store = Store(self._output, about, which, own, force)
        left = [part for part, account in zip(own, store.accounts) if account is None]
        if taken_up := len(own) - len(left):
            say(f"{taken_up} of {len(own)} parts were done before, in {store.folder}")
        skips = Skips(self._limit, say)
        skips.merge({n: why for a in store.accounts if a for n, why in a.skipped.items()})
        try:
            self._work(store, left, pictures, skips, opener, say)
            if not store.come(min(which.world, len(pictures.parts))):
                return None
            return self._join(store, pictures, taken_up, force)
        except KeyboardInterrupt:
            raise Interrupted(
                f"Stopped; what is done is in {store.folder}, and the same command goes on there."
            ) from None

    def _require_output(self, force: bool, pictures: CutPictures) -> None:
        """Before the work; where all parts are done already, `_join` looks closer."""
        folder = self._output.with_name(f"{self._output.name}.parts")
        try:
            there = folder.is_dir() and len(list(folder.glob("*.part"))) == len(pictures.parts)
        except OSError as error:  # a name too long
            raise UserError(
                f"cannot write {shortened(folder)}: {error.strerror}; name another output"
            ) from None
        check_writable(self._output, force or there, self._artefact.path)

    def _identity(self, parts: Sequence[Part]) -> dict[str, Any]:
        cut = "\0".join(part.identity for part in parts)
        names = "\0".join(self._labels or ())
        return {
            "model": self._artefact.fields["sha256"],
            "classes": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
            "batch": self._batch,
            "parts": hashlib.sha256(cut.encode(errors="surrogateescape")).hexdigest(),
        }

    def _work(
        self, store: Store, parts: Sequence[Part], pictures: CutPictures, skips: Skips,
        opener: Callable[[], Runner], say: Say,
    ) -> None:  # fmt: skip
        if not parts:
            return
        runner = opener()
        total = sum(len(part.pictures) for part in parts)
        bar = tqdm(total=total, desc="predict", unit="picture", disable=hide_bar(say), leave=False)
        threads = ThreadPoolExecutor(max(1, min(usable_cores() // processes_here(), _READERS)))
        try:
            for part in parts:
                store.write(part, self._records(part, pictures, skips, runner, threads, bar))
        finally:
            bar.close()
            threads.shutdown(cancel_futures=True)

    def _records(
        self, part: Part, pictures: CutPictures, skips: Skips, runner: Runner,
        threads: ThreadPoolExecutor, bar: tqdm,
    ) -> Iterator[tuple[str, str | None, dict[str, Any]]]:  # fmt: skip
        """As `Store.write` takes them."""

        def read(number: int) -> NDArray | PictureError:
            try:
                return preprocess(pictures.load(number), self._artefact.config)
            except PictureError as error:
                return error

        numbers = list(part.pictures)
        batches = [numbers[i : i + self._batch] for i in range(0, len(numbers), self._batch)]
        # As many batches ahead as keep every thread busy.
        ahead = 1 + -(-_READERS // self._batch)
        reading = [[threads.submit(read, n) for n in batch] for batch in batches[:ahead]]
        for place, batch in enumerate(batches):
            found = [one.result() for one in reading.pop(0)]
            if place + ahead < len(batches):
                reading.append([threads.submit(read, n) for n in batches[place + ahead]])
            images = [image for image in found if not isinstance(image, PictureError)]
            said = runner(np.stack(images)) if images else None
            row = 0
            for number, image in zip(batch, found):
                name = pictures.name(number)
                own = f"{name}, picture {number}"  # members of a shard may share a name
                if isinstance(image, PictureError):
                    skips.add(own, image)
                    yield own, image.reason, {"image": name, "skipped": image.reason}
                    continue
                yield own, None, self._record(said, name, row)
                row += 1
            bar.update(len(batch))

    def _record(self, said: Any, name: str, row: int) -> dict[str, Any]:
        path, tokens = self._artefact.path, self._artefact.fields["image_tokens"]
        found: Prediction
        if self._embeds:
            found = embedded(said, path, name, tokens, row)
        else:
            if not np.isfinite(said.output[row]).all():
                raise UserError(
                    f"{path} gives numbers that are not finite for {name}; export weights that "
                    "did not diverge"
                )
            found = predicted(said, name, tokens, self._labels, row)
        record = found.as_dict()
        record.pop("nearest", None)  # among millions that is a search of its own
        return record

    def _join(
        self, store: Store, pictures: CutPictures, taken_up: int, force: bool
    ) -> Written | None:
        with claimed(self._output, wait=_WAIT):
            if not store.folder.is_dir():
                return None  # another process was as far at the same time
            accounts = [store.account(part) for part in pictures.parts]
            done = [account for account in accounts if account is not None]
            if len(done) < len(accounts):
                return None
            skips = Skips(self._limit)
            skips.merge({name: why for one in done for name, why in one.skipped.items()})
            count = sum(account.pictures for account in done)
            if len(skips) == count:
                raise UserError(f"none of the {count} pictures can be read ({skips.summary()})")
            self._write(store, pictures.parts, count - len(skips), force)
            store.remove()
        reasons = dict(Counter(skips.reasons.values()).most_common())
        return Written(
            self._output, count, len(skips), reasons, pictures.passed_over, len(done), taken_up
        )

    def _write(self, store: Store, parts: Sequence[Part], read: int, force: bool) -> None:
        """Put the output in its place; one that holds the same already is of this run, which was
        stopped before its parts were removed."""
        with atomic(self._output) as temporary:
            if self._output.suffix == LINES:
                join_lines(temporary, store, parts)
            else:
                width, model = self._artefact.config.num_classes, self._artefact.fields["sha256"]
                join_embeddings(temporary, store, parts, read, width, model)
            same = self._output.is_file() and filecmp.cmp(temporary, self._output, shallow=False)
            check_writable(self._output, force or same)
