"""Cases tried in processes of their own, so that one that hangs or crashes is counted too."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.damage import Files
from fuzz.kinds import Kind, files_of, fresh, put_files

PATIENCE = 20.0  # seconds; what takes longer hangs
# `right`: it loads, and where its format promises that damage shows it means the same as the good
# file. `changed`: it loads, was promised and means something else; of a kind that promises nothing
# it is not known, and None. `unclear`: refused, but not in one printable line that names the file.
GOOD = ("right", "refused")
BAD = ("traceback", "hung", "crashed", "changed", "unclear")
_MOST_KEPT = 20  # failing inputs of a kind


@dataclass
class Failure:
    """A case that came to no good end."""

    number: int
    outcome: str
    way: str
    said: str


@dataclass
class Tally:
    """What came of the cases of a kind."""

    kind: str
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    good: Files = field(default_factory=dict)
    promised: bool = True  # whether any way of spoiling has to show; else nothing counts as changed

    def row(self) -> dict[str, Any]:
        tried = sum(self.counts.values())
        counts: dict[str, int | None] = {name: self.counts[name] for name in (*GOOD, *BAD)}
        if not self.promised:
            counts["changed"] = None
        return {"kind": self.kind, "tried": tried, **counts}


def case(kind: Kind, good: Files, seed: int, number: int) -> tuple[str, Files]:
    """How a case's files were spoiled, and the files: the same for the same numbers."""
    attempt = 0
    while True:
        rng = random.Random(zlib.crc32(f"{kind.name}/{seed}/{number}/{attempt}".encode()))
        try:
            return kind.spoil(rng, dict(good))
        except RecursionError:  # of the maker of cases itself: another one in its place
            attempt += 1


def outcome(kind: Kind, folder: Path, way: str, meant: Any) -> tuple[str, str]:
    """What came of using a folder of files, and what was said."""
    from asvit_deploy.errors import UserError

    try:
        found = kind.use(folder)
    except UserError as error:
        line = str(error)
        # It names a file of the case, unless that has lost its name on the way.
        clear = line.isprintable() and len(line) <= 1000 and str(folder) in line
        return ("refused" if clear else "unclear"), line
    except Exception:
        return "traceback", traceback.format_exc(limit=-4)
    if way.split(" ")[0] in kind.promised and found != meant:
        return "changed", "it loads and is not what was saved"
    return "right", ""


def _work(kind: Kind, good: Files, folder: Path, seed: int, numbers: Any, to: Any) -> None:
    """A worker: cases until there are no more."""
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    put_files(fresh(folder), good)
    meant = kind.use(folder)
    for number in numbers:
        to.send(("start", number))
        way, files = case(kind, good, seed, number)
        put_files(fresh(folder), files)
        to.send(("end", number, way, *outcome(kind, folder, way, meant)))
    to.send(("done",))
    os._exit(0)


def good_files(kind: Kind, folder: Path) -> Files:
    """A good folder of the kind, made in a process of its own: what that starts stays there."""
    process = multiprocessing.get_context("fork").Process(target=kind.good, args=(fresh(folder),))
    process.start()
    process.join(120)
    if process.exitcode != 0:
        raise RuntimeError(f"no good {kind.name} could be made here (exit {process.exitcode})")
    return files_of(folder)


def tried(
    kind: Kind, place: Path, seed: int, first: int, count: int | None = None,
    until: float | None = None,
) -> Tally:  # fmt: skip
    """Try cases of a kind, from number `first` on.

    Args:
        place: a folder for the worker's files.
        count: so many; or, None, as many as there is time for.
        until: by `time.monotonic`.
    """
    tally, start = Tally(kind.name, seed, promised=bool(kind.promised)), time.monotonic()
    good = tally.good = good_files(kind, place / "good")
    if until is not None:  # the time is for cases
        until += time.monotonic() - start
    at, end = first, first + (count if count is not None else 10**9)
    while at < end and (until is None or time.monotonic() < until):
        at = _batch(kind, good, place / "case", seed, range(at, min(end, at + 500)), tally, until)
    tally.seconds = time.monotonic() - start
    return tally


def _batch(
    kind: Kind, good: Files, folder: Path, seed: int, numbers: range, tally: Tally,
    until: float | None,
) -> int:  # fmt: skip
    """One worker's cases; where it ended, or had to be ended."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(kind, good, folder, seed, numbers, there))
    process.start()
    there.close()
    at, started = numbers.start, False
    try:
        while until is None or time.monotonic() < until:
            # The first case waits for imports, too.
            if not here.poll(PATIENCE if started else 6 * PATIENCE):
                _count(tally, at, "hung", "", f"more than {PATIENCE:.0f} s")
                return at + 1
            try:
                message = here.recv()
            except EOFError:
                process.join(5)
                if not started:
                    raise RuntimeError(f"the good {kind.name} cannot be used") from None
                _count(tally, at, "crashed", "", f"exit {process.exitcode}")
                return at + 1
            if message[0] == "done":
                return numbers.stop
            if message[0] == "start":
                at, started = message[1], True
                continue
            _, number, way, found, said = message
            _count(tally, number, found, way, said)
            at = number + 1
        return at
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.kill()
        process.join()


def _count(tally: Tally, number: int, found: str, way: str, said: str) -> None:
    tally.counts[found] += 1
    if found in BAD:
        tally.failures.append(Failure(number, found, way, said))


# --- failing inputs -----------------------------------------------------------------------------


def keep(kind: Kind, place: Path, target: Path, tally: Tally) -> None:
    """Put failing inputs into a folder, each as small as it still fails, with what was said."""
    for failure in tally.failures[:_MOST_KEPT]:
        way, files = case(kind, tally.good, tally.seed, failure.number)
        # Each try of one that hangs takes its time again, and what changed is small by itself.
        if failure.outcome not in ("hung", "changed"):
            files = _smaller(kind, place / "small", way, files, failure.outcome)
        folder = fresh(target / f"{kind.name.replace(' ', '_')}-{tally.seed}-{failure.number}")
        put_files(folder, files)
        (folder / "SAID.json").write_text(json.dumps(
            {"kind": kind.name, "seed": tally.seed, "number": failure.number, "way": way,
             "outcome": failure.outcome, "said": failure.said[-4000:]}, indent=2,
        ))  # fmt: skip


def _smaller(kind: Kind, place: Path, way: str, files: Files, wanted: str) -> Files:
    """Fewer files, and shorter ones, of which the same comes; within 20 seconds."""
    end = time.monotonic() + 20

    def same(candidate: Files) -> bool:
        return time.monotonic() < end and _alone(kind, place, way, candidate) == wanted

    for name in sorted(files):
        rest = {key: data for key, data in files.items() if key != name}
        if rest and same(rest):
            files = rest
    for name in sorted(files):
        for candidate in _shorter(files[name]):
            if len(candidate) < len(files[name]) and same({**files, name: candidate}):
                files = {**files, name: candidate}
    return files


def _shorter(data: bytes) -> Iterator[bytes]:
    """The start of a file, then it without pieces of its middle."""
    for part in (8, 4, 2, 1.3):
        yield data[: int(len(data) / part)]
    size = len(data) // 2
    while size >= 64:
        for start in range(0, len(data), size):
            yield data[:start] + data[start + size :]
        size //= 4


def _alone(kind: Kind, place: Path, way: str, files: Files) -> str:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        put_files(fresh(place), files)
        there.send(outcome(kind, place, way, object())[0])

    process = context.Process(target=work)
    process.start()
    there.close()
    found = "hung"
    if here.poll(PATIENCE):
        try:
            found = here.recv()
        except EOFError:
            found = "crashed"
    process.kill()
    process.join()
    return found


Say = Callable[[str], None]
