"""`scripts/fuzz`: thousands of spoiled files of every kind, in processes of their own.

`changed` counts files that load and mean something else although their format promises that damage
shows. Kinds that promise nothing of that (a picture's pixel, an edited recipe) have null there,
"not promised" in the table: of their files that load, `right` says that and no more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.kinds import KINDS
from fuzz.outcomes import BAD, GOOD, Tally, keep, tried

ROOT = Path(__file__).resolve().parents[2]


def parsed(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all kinds together")
    parser.add_argument("--cases", type=int, help="so many of each kind, whatever time they take")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of a kind")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("-o", "--output", type=Path,
                        default=ROOT / "benchmarks" / "reliability.json")  # fmt: skip
    parser.add_argument("--failing", type=Path, default=ROOT / "build" / "fuzz",
                        help="where failing inputs are put")  # fmt: skip
    return parser.parse_args(given)


def warm() -> None:
    """Import once what every worker would."""
    for name in ("torch", "onnx", "PIL.Image", "asvit_deploy.artefacts.opening",
                 "asvit_deploy.training.state", "asvit_deploy.training.trainer",
                 "asvit_deploy.exporting.export", "asvit_deploy.data.shards"):  # fmt: skip
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def main(given: list[str] | None = None) -> int:
    """Exit code 1 where any case came to a bad end."""
    chosen = parsed(given)
    names = chosen.kind or list(KINDS)
    warm()
    each = chosen.minutes * 60 * chosen.jobs / len(names)
    with tempfile.TemporaryDirectory(prefix="asvit-fuzz-") as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")

        def one(name: str) -> Tally:
            kind, folder = KINDS[name], Path(place) / name.replace(" ", "_")
            until = None if chosen.cases else time.monotonic() + each
            tally = tried(kind, folder, chosen.seed, chosen.first, chosen.cases, until)
            print(line_of(tally), file=sys.stderr, flush=True)
            keep(kind, folder, chosen.failing, tally)
            return tally

        tallies = _side_by_side(one, names, chosen.jobs)
    report = report_of(tallies, chosen.seed, chosen.first)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(chosen.output.read_text()) if chosen.output.is_file() else {}
    chosen.output.write_text(json.dumps({**before, "fuzz": report}, indent=2) + "\n")
    print(table(report))
    return int(any(report["all"][name] for name in BAD))


def _side_by_side(one: Callable[[str], Tally], names: list[str], jobs: int) -> list[Tally]:
    """Kinds in processes, not threads: a fork takes no other thread's locks along."""
    context = multiprocessing.get_context("fork")
    waiting, running, found = list(names), {}, dict[str, Tally]()

    def work(name: str, to: Any) -> None:
        to.send(one(name))

    while waiting or running:
        while waiting and len(running) < jobs:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name := waiting.pop(0), there))
            process.start()
            there.close()
            running[here] = name, process
        for end in multiprocessing.connection.wait(list(running)):
            name, process = running.pop(end)
            found[name] = end.recv()  # type: ignore[union-attr]
            process.join()
    return [found[name] for name in names]


def line_of(tally: Tally) -> str:
    row = tally.row()
    counts = ", ".join(f"{row[name]} {name}" for name in (*GOOD, *BAD) if row[name])
    return f"{tally.kind}: {row['tried']} tried in {tally.seconds:.0f} s ({counts})"


def report_of(tallies: list[Tally], seed: int, first: int) -> dict[str, Any]:
    from importlib import metadata

    rows = [tally.row() for tally in tallies]
    # `changed` of all is of the kinds that promise it.
    total = {key: sum(row[key] or 0 for row in rows) for key in ("tried", *GOOD, *BAD)}
    versions = {name: metadata.version(name) for name in ("torch", "onnx", "onnxruntime", "Pillow")}
    return {
        "seed": seed, "first": first, "kinds": rows, "all": total,
        "seconds": round(sum(tally.seconds for tally in tallies)),
        "python": platform.python_version(), "libraries": versions,
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    heads = ["kind", "tried", *GOOD, *BAD]
    every = [*report["kinds"], {"kind": "all", **report["all"]}]
    cells = ([row[head] for head in heads] for row in every)
    rows = [heads, *(["not promised" if x is None else str(x) for x in row] for row in cells)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width)
                  for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
