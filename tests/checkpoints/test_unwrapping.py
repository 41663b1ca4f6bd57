"""The network is found in any wrapping, and what lies beside it is named."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from checkpoint_files import THIN, dense_state, headless, prefixed
from conftest import raises_one_line
from written_out import written_out

from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.models.archs import ARCHS


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(ARCHS, THIN.name, THIN)


@pytest.fixture
def load(tmp_path):
    """Load what is given, by way of a file."""

    def save_and_load(content, **options):
        torch.save(content, tmp_path / "weights.ckpt")
        return load_checkpoint(tmp_path / "weights.ckpt", **options)

    return save_and_load


def holds(checkpoint, seed):
    return all(checkpoint.state[key].equal(value) for key, value in dense_state(seed).items())


CHAINS = ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.backbone.",
          "_orig_mod.module.model.", "net.encoder.vit.", "_forward_module.module."]  # fmt: skip


@pytest.mark.parametrize("levels", [(), ("state_dict",), ("module",), ("model", "state_dict")])
@pytest.mark.parametrize("chain", CHAINS)
def test_wrappers_in_any_nesting(chain, levels, load):
    content = prefixed(chain, dense_state(3))
    for level in reversed(levels):
        content = {level: content, "epoch": 3}
    assert holds(load(content), 3)


def test_wrappers_in_the_middle_of_names(load):
    state = {
        key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._orig_mod."): value
        for key, value in dense_state(3).items()
    }
    assert holds(load({"model": prefixed("_fsdp_wrapped_module.", state)}), 3)


def test_a_checkpoint_of_lightning(load, monkeypatch):
    names = ("lightning_fabric", "lightning_fabric.utilities", "lightning_fabric.utilities.data")
    modules = {name: types.ModuleType(name) for name in names}
    ran = []

    class AttributeDict(dict):
        def __init__(self, *args, **more):
            ran.append(args)
            super().__init__(*args, **more)

        def __setstate__(self, state):
            ran.append(state)

    AttributeDict.__module__, AttributeDict.__qualname__ = names[2], "AttributeDict"
    modules[names[2]].AttributeDict = AttributeDict
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    hyper = AttributeDict(mean=[0.5] * 3, std=[0.5] * 3, folder=Path("/data/pictures"))
    ran.clear()
    content = {
        "epoch": 9, "global_step": 900, "pytorch-lightning_version": "2.5.0", "loops": {},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}], "lr_schedulers": [],
        "state_dict": {
            **prefixed("model.", dense_state(3)),
            "criterion.weight": torch.ones(7),
            "val_acc.tp": torch.zeros(7),
            **prefixed("teacher.", dense_state(4)),
        },
        "hparams_name": "kwargs", "hyper_parameters": hyper,
    }  # fmt: skip
    checkpoint = load(content)
    assert holds(checkpoint, 3)
    assert ran == []  # the stand-in was made, not the class
    assert checkpoint.config.preprocessing.mean == (0.5, 0.5, 0.5)
    assert checkpoint.origins.by_fact["mean"] == "hyper_parameters"
    notes = "\n".join(checkpoint.notes)
    assert "the network state_dict.model is taken, not state_dict.teacher" in notes
    assert "criterion.*, val_acc.*" in notes


def test_deepspeed(load):
    content = {"module": prefixed("module.", dense_state(3)), "optimizer": None, "ds_config": {}}
    assert holds(load(content), 3)


@pytest.mark.parametrize(
    "content",
    [
        {"model": dense_state(3), "model_ema": dense_state(4)},
        {"model": dense_state(3), "ema": {"module": dense_state(4)}},
        {"model": dense_state(3), "ema_state_dict": prefixed("module.", dense_state(4))},
        {"state_dict": dense_state(3), "state_dict_ema": dense_state(4)},
        {"model": dense_state(3), "swa": {"n_averaged": torch.tensor(5),
                                          **prefixed("module.", dense_state(4))}},
        {"state_dict": {**prefixed("model.", dense_state(3)),
                        **prefixed("ema_model.module.", dense_state(4)),
                        "ema_model.n_averaged": torch.tensor(5)}},
        {"state_dict": {**prefixed("net.", dense_state(3)),
                        **prefixed("averager.module.module.", dense_state(4)),
                        "averager.n_averaged": torch.tensor(5)}},
        {"current_model_state": dense_state(3), "state_dict": dense_state(4)},
        {"student": dense_state(3), "teacher": dense_state(4), "dino_loss": {}},
    ],
)  # fmt: skip
def test_a_moving_average_beside_the_weights_is_reported_and_opt_in(content, load):
    plain, average = load(content), load(content, ema=True)
    assert holds(plain, 3)
    assert any("--ema takes it" in note for note in plain.notes)
    assert holds(average, 4)
    assert any("the moving average is taken" in note for note in average.notes)
    assert plain.has_average
    assert average.has_average


def test_averaged_weights_alone_are_meant_and_reported(load):
    checkpoint = load({"n_averaged": torch.tensor(3), **prefixed("module.", dense_state(4))})
    assert holds(checkpoint, 4)
    assert "its only weights are a moving average (module)" in checkpoint.notes[0]


def test_no_average_to_take(load):
    raises_one_line(lambda: load({"model": dense_state()}, ema=True), "no moving average")
    distilled = {"student": dense_state(3), "teacher": dense_state(4)}
    raises_one_line(lambda: load(distilled, ema=True), "no moving average of its weights")


def test_student_before_teacher_and_base_before_momentum(load):
    checkpoint = load({"student": prefixed("module.", dense_state(3)), "teacher": dense_state(4)})
    assert holds(checkpoint, 3)
    assert checkpoint.notes == ("the network student.module is taken, not teacher",)
    moco = {
        **prefixed("module.base_encoder.", dense_state(3)),
        **prefixed("module.momentum_encoder.", dense_state(4)),
        "module.predictor.0.weight": torch.zeros(2, 2),
    }
    checkpoint = load({"state_dict": moco, "arch": "vit_small"})
    assert holds(checkpoint, 3)
    assert checkpoint.config.heads == 12
    notes = "\n".join(checkpoint.notes)
    assert "state_dict.module.base_encoder is taken" in notes
    assert "predictor.*" in notes


def test_two_networks_that_nothing_tells_apart(load):
    two = {"generator": dense_state(3), "critic": dense_state(4)}
    raises_one_line(lambda: load(two), "holds 2 networks (generator, critic), and nothing says")
    assert holds(load({"generator": dense_state(3), "critic": dense_state(3)}), 3)


def test_a_teacher_inside_the_networks_own_prefix_is_left_out(load):
    checkpoint = load({**dense_state(3), **prefixed("teacher.", dense_state(4))})
    assert holds(checkpoint, 3)
    assert "not teacher" in checkpoint.notes[0]


def test_a_key_inside_the_networks_own_prefix_is_refused(load):
    content = {"state_dict": prefixed("model.", {**dense_state(), "extra.weight": torch.ones(2)})}
    raises_one_line(lambda: load(content), "keys that as_deit_thin does not know: extra.weight")


def test_headless_weights_are_embeddings_and_say_what_lies_beside(load):
    content = {"state_dict": {**prefixed("backbone.", headless(dense_state(3))),
                              "classifier.weight": torch.zeros(7, 384)}}  # fmt: skip
    found = load(content)
    assert found.headless
    assert found.config.output == "embedding"
    assert found.notes[-1] == (
        "has no head (beside it lie classifier.*): its output is the class token, 384 numbers"
    )
    image, state = torch.randn(3, 32, 32), dense_state(3)
    wanted = written_out({k: v.double() for k, v in state.items()}, found.config, image)
    with torch.inference_mode():
        embedding = build_model(found)(image[None])[0][0].double()
    torch.testing.assert_close(embedding, wanted, rtol=1e-4, atol=1e-5)
    for name in ("head.bias", "head.weight"):
        raises_one_line(
            lambda left=name: load({k: v for k, v in dense_state(3).items() if k != left}),
            f"lacks {name}",
        )


def test_a_projector_in_the_head_s_place_is_no_head(load):
    state = headless(dense_state(3)) | {f"head.{i}.weight": torch.zeros(2, 2) for i in (0, 3)}
    checkpoint = load(prefixed("module.base_encoder.", state))
    assert checkpoint.headless
    assert "head.* (a projector)" in checkpoint.notes[-1]
    assert any("left out, no part of the network: head.*" in note for note in checkpoint.notes)


def test_a_loop_of_dictionaries_ends(load):
    content: dict = {"model": dense_state(3)}
    content["again"] = content
    assert holds(load(content), 3)


def test_a_name_on_two_levels(load):
    state = dense_state()
    content = {"a": state, "a.head.bias": torch.ones(7)}
    raises_one_line(lambda: load(content), "has a.head.bias twice")
