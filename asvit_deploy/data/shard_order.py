"""In which order training sees the pictures of shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GROUP = 8  # shards that are shuffled together: enough to mix, few enough to stay in the page cache


class ShardOrder:
    """The endless order in which training sees the pictures of shards.

    In each epoch the shards are permuted, and the pictures of every `GROUP` shards that follow one
    another are permuted among themselves: reads stay within a few files, and where a picture
    stands is arithmetic on seed and position.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._counts, self._seed, self._epoch = np.array(counts), seed, sum(counts)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        # What was asked for last, each replaced whole: another thread may ask for something else.
        self._shards: tuple[int, NDArray, NDArray] = (-1, self._counts, self._counts)
        self._group: tuple[tuple[int, int], NDArray] = ((-1, -1), self._counts)

    def __call__(self, position: int) -> int:
        """The number of the picture that stands there."""
        epoch, place = divmod(position, self._epoch)
        shards, ends = self._epoch_order(epoch)
        group = int(np.searchsorted(ends, place, "right"))
        first = int(ends[group - 1]) if group else 0
        inside = int(self._group_order(epoch, group, int(ends[group]) - first)[place - first])
        own = shards[group * GROUP : (group + 1) * GROUP]
        before = np.cumsum(self._counts[own])
        which = int(np.searchsorted(before, inside, "right"))
        return int(self._starts[own[which]]) + inside - (int(before[which - 1]) if which else 0)

    def _epoch_order(self, epoch: int) -> tuple[NDArray, NDArray]:
        """The shards of an epoch in their order, and where each group of them ends."""
        known = self._shards
        if known[0] != epoch:
            shards = np.random.default_rng((self._seed, epoch)).permutation(len(self._counts))
            starts = np.arange(0, len(shards), GROUP)
            known = (epoch, shards, np.cumsum(np.add.reduceat(self._counts[shards], starts)))
            self._shards = known
        return known[1], known[2]

    def _group_order(self, epoch: int, group: int, count: int) -> NDArray:
        known = self._group
        if known[0] != (epoch, group):
            rng = np.random.default_rng((self._seed, epoch, group + 1))
            known = ((epoch, group), rng.permutation(count))
            self._group = known
        return known[1]
