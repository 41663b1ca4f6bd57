"""An edited state is one line, whatever stands in it and whoever made its digest anew."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import raises_one_line
from test_state import a_batch, small_trainer

from asvit_deploy.checkpoints.damage import digest
from asvit_deploy.training.recipe import Recipe
from asvit_deploy.training.state import load_state, save_state

RECIPE = Recipe(steps=10, budget=0.65, ema=0.9)
VALUES = {
    "None": None, "a list": [], "a dict": {}, "text": "x", "many digits": 10**5000, "-1": -1,
    "NaN": float("nan"), "another shape": torch.ones(3), "no shape": torch.ones(()),
    "half": torch.ones(3, dtype=torch.half), "complex": torch.ones(3, dtype=torch.complex64),
    "empty": torch.ones(0), "sparse": torch.ones(3).to_sparse(), "a set": {1}, "a tuple": (1, 2),
    "true": True,
}  # fmt: skip
PLACES = [
    ("step",), ("recipe",), ("model",), ("model", "cls_token"), ("average",), ("optimizer",),
    ("average", "n_averaged"), ("rng",), ("optimizer", "state"), ("optimizer", "state", 0),
    ("optimizer", "state", 0, "exp_avg"), ("optimizer", "state", 0, "exp_avg_sq"),
    ("optimizer", "state", 0, "step"), ("optimizer", "param_groups"),
    ("optimizer", "param_groups", 0), ("optimizer", "param_groups", 0, "params"),
    ("optimizer", "param_groups", 0, "pace"), ("optimizer", "param_groups", 0, "lr"),
    ("optimizer", "param_groups", 0, "betas"), ("optimizer", "param_groups", 0, "weight_decay"),
]  # fmt: skip
GONE = object()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    trainer, path = small_trainer(RECIPE), tmp_path_factory.mktemp("state") / "s.pt"
    trainer.step(0, a_batch())
    save_state(path, 1, trainer, {"seed": 1})
    return torch.load(path, weights_only=True)


def edited(saved, path, place, value):
    content = copy.deepcopy(saved)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    del content["digest"]
    try:
        content["digest"] = digest(content)
    except (OverflowError, RuntimeError, ValueError):  # what a digest cannot be made of
        content["digest"] = ""
    torch.save(content, path)
    return path


def same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_another_value_in_its_place(saved, tmp_path, place):
    """Nothing of it is put back: the trainer goes on as it was."""
    trainer = small_trainer(RECIPE)
    before = digest([trainer.model.state_dict(), trainer.optimizer.state_dict()])
    own = saved
    for key in place:
        own = own[key]
    for name, value in {**VALUES, "gone": GONE}.items():
        if value is not GONE and same(value, own):
            continue
        if place == ("optimizer", "state") and name == "a dict":
            continue  # a run that has not taken a step yet
        if place == ("optimizer", "state", 0) and name == "gone":
            continue  # a weight without a gradient
        path = edited(saved, tmp_path / "x.pt", place, value)
        raises_one_line(lambda: load_state(path, trainer, {"seed": 1}), str(path), "start over")  # noqa: B023
        assert digest([trainer.model.state_dict(), trainer.optimizer.state_dict()]) == before, name


@pytest.mark.parametrize("content", [[1], None, "x", torch.ones(2)])
def test_no_dict_at_all(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    trainer = small_trainer(RECIPE)
    raises_one_line(lambda: load_state(tmp_path / "x.pt", trainer, {}), "delete it and start over")


def test_a_scaler_of_numbers(saved):
    """fp16 keeps a scale, on a GPU; what it may be is asked before torch takes it."""
    from asvit_deploy.training.state_form import _scaler_fits

    own = torch.amp.GradScaler("cpu").state_dict()
    assert _scaler_fits(own, own)
    for name in own:
        for value in (None, "x", float("nan"), -1, torch.ones(1)):
            assert not _scaler_fits({**own, name: value}, own)
    assert not _scaler_fits({}, own)
    assert not _scaler_fits(None, own)
    assert not _scaler_fits({**own, "scale": 0.0}, own)


def test_a_state_of_a_torch_that_knows_more_settings(saved, tmp_path):
    content = copy.deepcopy(saved)
    del content["digest"]
    for group in content["optimizer"]["param_groups"]:
        group["of_a_later_torch"] = False
        group.pop("decoupled_weight_decay", None)
    torch.save({**content, "digest": digest(content)}, tmp_path / "x.pt")
    trainer = small_trainer(RECIPE)
    assert load_state(tmp_path / "x.pt", trainer, {"seed": 1}) == 1
    trainer.step(1, a_batch())


def test_the_state_of_another_average(saved, tmp_path):
    """A run without an average goes on from a state that has one, as before."""
    torch.save(saved, tmp_path / "x.pt")
    trainer = small_trainer(replace(RECIPE, ema=0.0))
    assert load_state(tmp_path / "x.pt", trainer, {"seed": 1}) == 1
