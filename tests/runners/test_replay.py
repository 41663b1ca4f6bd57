"""A reference that takes another's decisions: the same network along another path."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

WAYS = [("1", "auto"), ("dynamic", "auto"), ("1", "standard")]


def kept_of(prediction):
    return [stage[0] for stage in prediction.kept]


def others(kept):
    """A nested path that no threshold would choose: at each stage every second token is lost."""
    path, alive = [], np.arange(196)
    for _ in kept:
        alive = alive[1::2]
        path.append(alive)
    return path


@pytest.fixture(params=[*WAYS, "torch"])
def runner(request, mini, mini_artifacts):
    if request.param == "torch":
        return TorchRunner(mini)
    return OrtRunner(mini_artifacts[request.param])


def test_its_own_decisions_change_nothing(runner, photos):
    for image in photos[:3]:
        own = runner(image[None])
        again = runner.replay(image[None], kept_of(own))
        np.testing.assert_array_equal(again.output, own.output)
        for mine, theirs in zip(kept_of(own), kept_of(again)):
            np.testing.assert_array_equal(mine, theirs)
        for mine, theirs in zip(own.scores, again.scores):
            np.testing.assert_array_equal(mine[0], theirs[0])


def test_other_decisions_are_those_of_the_masked_form(runner, mini, photos):
    image = photos[0]
    path = others(range(3))
    replayed = runner.replay(image[None], path)
    masks = [np.isin(np.arange(196), stage).astype(np.float32)[None] for stage in path]
    with torch.no_grad():
        masked, _, _ = mini.forward_masked(
            torch.from_numpy(image[None]), selector=lambda s, *_: torch.from_numpy(masks[s])
        )
    scale = np.abs(replayed.output).max()
    np.testing.assert_allclose(replayed.output, masked.numpy(), atol=1e-5 * scale)
    assert not np.allclose(replayed.output, runner(image[None]).output, atol=1e-3 * scale)
    assert [length[0] for length in replayed.lengths] == [1 + len(stage) for stage in path]


@pytest.mark.slow
def test_a_library_is_named_too(op_library, mini_artifacts, photos):
    with_library = OrtRunner(mini_artifacts["1", "custom"], op_library)
    function = OrtRunner(mini_artifacts["1", "auto"])
    path = others(range(3))
    np.testing.assert_allclose(
        with_library.replay(photos[1][None], path).output,
        function.replay(photos[1][None], path).output, rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_decisions_are_of_one_image(mini):
    with pytest.raises(ValueError, match="decisions are of one image, not of 2"):
        mini(torch.zeros(2, 3, 56, 56), decisions=[torch.zeros(1, dtype=torch.int64)] * 3)


def test_the_file_itself_is_not_changed(mini_artifacts, photos):
    model = onnx.load(mini_artifacts["1", "auto"])
    before = model.SerializeToString()
    runner = OrtRunner(model)
    runner.replay(photos[0][None], kept_of(runner(photos[0][None])))
    assert model.SerializeToString() == before
