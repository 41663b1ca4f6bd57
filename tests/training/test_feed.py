"""Worker processes that are killed: one line in place of the next batch, and no hang."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass

import pytest
import torch

from asvit_deploy.data.batches import Batch
from asvit_deploy.errors import UserError
from asvit_deploy.training.feed import batches
from asvit_deploy.training.recipe import Recipe

STEPS = 8


@dataclass
class Dying:
    """A source whose process goes, as where memory runs out, when it is to make a certain batch."""

    at: int
    parent: int

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        if step == self.at:
            assert os.getpid() != self.parent
            os.kill(os.getpid(), signal.SIGKILL)
        return Batch(torch.full((size, 3, 8, 8), float(step)), torch.zeros(size).long())


# The others' batches are waited for five seconds before their end is noticed.
@pytest.mark.parametrize(
    ("at", "workers"),
    [
        (3, 1), (STEPS - 1, 1), (STEPS - 1, 2),
        pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_killed_worker_is_one_line_in_place_of_a_batch(at, workers):
    before = signal.getsignal(signal.SIGCHLD)
    source, recipe = Dying(at, os.getpid()), Recipe(steps=STEPS, batch_size=2)
    found = batches(source, 0, recipe, range(2), workers)  # type: ignore[arg-type]
    watch = threading.Timer(90, os.kill, (os.getpid(), signal.SIGTERM))
    watch.start()
    try:
        for step, batch in found:
            if isinstance(batch, UserError):
                break
            assert (batch.images == step).all()  # none is lost or comes twice before that
        else:
            pytest.fail("all batches came")
    finally:
        watch.cancel()
    assert step <= at
    assert "\n" not in str(batch)
    assert "a process of --workers was killed, perhaps because memory ran out" in str(batch)
    found.close()  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_making_batches_draws_no_number_of_the_run(workers):
    source, recipe = Dying(-1, os.getpid()), Recipe(steps=2, batch_size=2)
    before = torch.get_rng_state()
    found = list(batches(source, 0, recipe, range(2), workers))  # type: ignore[arg-type]
    assert [step for step, _ in found] == [0, 1]
    assert torch.equal(torch.get_rng_state(), before)
