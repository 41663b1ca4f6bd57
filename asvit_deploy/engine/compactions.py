"""At which cuts of an engine rows really leave, where a mask between costs less than a compaction.

A compaction whose count depends on the picture has a price of its own: the host waits for the count
before it can give out more work. Rows that are only hidden go on costing until the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asvit_deploy.data.images import open_images
from asvit_deploy.engine.comparison import reference_of
from asvit_deploy.engine.source import Source
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import part_macs

# What a compaction costs on a GPU, in multiply-accumulates of the time that it takes. On an H200 in
# float16 with one picture (benchmarks/gpu): 14 µs until the count is on the host (bucketed DeiT-S
# beside top-k of equal rows) and 3.5 µs in the kernel, while 10^9 multiply-accumulates more or less
# in a stage take 11 to 26 µs. Larger batches and smaller cards were not measured.
COMPACTION_MACS = 1e9
PICTURES = 16  # whose rows are counted
Wanted = tuple[int, ...] | Literal["all"] | None  # blocks; None: chosen here


def parse_blocks(text: str) -> Wanted:
    """`3,6,9` as numbers, or `all`; None for `auto`.

    Raises:
        UserError: it is none of these.
    """
    text = text.strip()
    if text in ("auto", "all"):
        return "all" if text == "all" else None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--compact-at {text!r} is no list of blocks; write --compact-at 3,6,9, or auto, or all"
        ) from None


def physical_stages(
    source: Source, wanted: Wanted, images: Path | None, skip_limit: int,
    say: Callable[[str], None],
) -> list[int] | None:  # fmt: skip
    """The stages of a dynamic engine at which rows really leave; None: all of them.

    By default all, unless a method cuts more often than AS-ViT's stages do.

    Args:
        wanted: the blocks that the user names.
        images, skip_limit: as `compare_graph`; their rows are counted.
        say: gets a line on the choice.

    Raises:
        UserError: blocks at which no rows leave.
    """
    blocks = cut_blocks(source)
    if wanted == "all" or (wanted is None and not blocks):
        return None
    if wanted is not None:
        return _named(source, blocks, wanted)
    assert source.artefact is not None
    artefact, name = source.artefact, str(source.path)
    if len(blocks) <= len(artefact.config.stages):
        return None
    if (batch := artefact.fields["batch"]) != "dynamic":
        say(f"{name} (--batch {batch}): rows leave at each of {len(blocks)} cuts; of a file of "
            "--batch dynamic they could leave at a few and be hidden between")  # fmt: skip
        return None
    pictures = open_images(images, artefact.config, PICTURES, skip_limit)
    reference, _ = reference_of(source)
    lengths = [reference(pictures[i][None]).lengths for i in range(len(pictures))]
    rows = [float(np.mean([int(stage[0]) for stage in stages])) for stages in zip(*lengths)]
    assert artefact.cuts is not None
    stages = worthwhile(artefact.config, artefact.cuts, rows)
    if len(stages) == len(blocks):
        return None
    say(f"{name}: rows leave for good in {_listed([blocks[s] for s in stages])} of "
        f"{len(blocks)} with cuts and are hidden between, where a compaction costs more than it "
        "saves; --compact-at says otherwise")  # fmt: skip
    return stages


def cut_blocks(source: Source) -> list[int]:
    """The blocks at which thresholds take rows out; none of other files."""
    fields: dict[str, Any] = source.fields
    if not source.adaptive or fields.get("mode") == "static":
        return []
    return list(fields["reduction"]["blocks"] if "reduction" in fields else fields["stages"])


def _named(source: Source, blocks: list[int], wanted: tuple[int, ...]) -> list[int]:
    if not blocks:
        raise UserError(
            f"--compact-at is of files whose rows leave picture by picture, and {source.path} is "
            "none; leave it out"
        )
    for block in wanted:
        if block not in blocks:
            raise UserError(
                f"--compact-at {block}: {source.path} cuts in {_listed(blocks)}; name some of these"
            )
    return sorted({blocks.index(block) for block in wanted})


def _listed(blocks: Sequence[int]) -> str:
    return f"block{'s' * (len(blocks) != 1)} {','.join(map(str, blocks))}"


def worthwhile(
    config: ArchConfig, cuts: Sequence[int], rows: Sequence[float], price: float = COMPACTION_MACS
) -> list[int]:
    """The stages at which a compaction pays, rising, at least one.

    Of all choices the one with the least multiply-accumulates, with `price` for each compaction:
    what a stage hides is carried on to the next compaction.

    Args:
        cuts: halves in front of which rows leave.
        rows: behind each cut on average, prefix included.
        price: multiply-accumulates.
    """
    parts = list(pairwise((0, *cuts, 2 * config.depth)))
    sizes = [float(config.rows), *rows]
    # best[s]: the least that everything before cut s - 1 costs where rows leave there, and the
    # compactions so far; the input counts as one for nothing.
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, len(parts) + 1):
        last = end == len(parts)
        found = []
        for start in range(int(last), end):
            cost, chosen = best[start]
            macs = sum(float(part_macs(config, sizes[start], *part)) for part in parts[start:end])
            found.append((cost + macs, chosen))
        cost, chosen = min(found, key=lambda one: one[0])
        best.append((cost, chosen) if last else (cost + price, [*chosen, end - 1]))
    return best[-1][1]
