"""Checkpoints of DynamicViT and LTMP as released, and of ltmp beside its network."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from checkpoint_files import THIN, dense_state
from conftest import raises_one_line

from asvit_deploy.checkpoints.beside import backbone_beside
from asvit_deploy.checkpoints.facts import Given
from asvit_deploy.checkpoints.load import (
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS
from asvit_deploy.reduction.dynamicvit import Predictor
from asvit_deploy.reduction.ltmp import LTMP, NEVER

DEEP = replace(THIN, name="as_deit_thin_deep", depth=4, stages=(1, 2, 3), image_size=64)
STATE = dense_state(config=DEEP)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(ARCHS, DEEP.name, DEEP)


def predictors(count=3):
    torch.manual_seed(3)
    return {f"score_predictor.{i}.{key}": value for i in range(count)
            for key, value in Predictor(384).state_dict().items()}  # fmt: skip


def maskers(blocks=4, merge=0.9, prune=0.01):
    return {f"blocks.{i}.{kind}_masker.threshold": torch.tensor([value]) for i in range(blocks)
            for kind, value in (("merge", merge), ("prune", prune))}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pth"


@pytest.mark.parametrize(
    ("args", "kept", "said"),
    [
        (None, (11, 7, 5), "assumed to be 0.7"),
        ({"base_rate": 0.5}, (8, 4, 2), "is 0.5 (args.base_rate"),
        ({"base_rate": 0.05, "model": "deit_small"}, (1, 1, 1), "is 0.05 (args.base_rate"),
    ],
)
def test_a_dynamicvit_loads_as_published(file, args, kept, said):
    more = {} if args is None else {"args": argparse.Namespace(**args)}
    torch.save({"model": {**STATE, **predictors()}, **more}, file)
    found = load_checkpoint(file)
    assert (found.format, found.adaptive) == ("dynamicvit", True)
    method = build_model(found).reduction
    assert (method.name, method.blocks, method.kept) == ("dynamicvit", (1, 2, 3), kept)
    assert any(said in line for line in found.lines)
    theirs = predictors()["score_predictor.2.out_conv.4.weight"]
    assert torch.equal(method.predictors[2].out_conv[4].weight, theirs)
    assert build_model(found, dense=True).reduction is None


@pytest.mark.parametrize(
    ("change", "args", "words"),
    [
        ({"score_predictor.1.in_conv.1.weight": torch.zeros(384, 192)}, {}, "[384, 192]"),
        ({"score_predictor.1.out_conv.4.bias": torch.zeros(3)}, {}, "[3] where [2]"),
        ({"score_predictor.1.out_conv.0.weight": ...}, {}, "lacks method.predictors.1.out_conv.0"),
        ({"score_predictor.0.in_conv.1.bias": torch.full((384,), torch.nan)}, {}, "NaN"),
        ({"score_predictor.3.in_conv.1.bias": torch.zeros(384)}, {}, "predictors 0, 1, 2"),
        ({}, {"base_rate": 1.5}, "base_rate 1.5"),
        ({}, {"base_rate": "half"}, "base_rate 'half'"),
        ({}, {"base_keep_rate": 0.7}, "(EViT)"),
    ],
)
def test_a_damaged_dynamicvit_is_refused(file, change, args, words):
    state = {**STATE, **predictors(), **change}
    state = {key: value for key, value in state.items() if value is not ...}
    torch.save({"model": state, "args": args}, file)
    raises_one_line(lambda: load_checkpoint(file), str(file), words)


def test_its_options_without_predictors_are_refused(file):
    torch.save({"model": STATE, "args": {"base_rate": 0.7}}, file)
    raises_one_line(lambda: load_checkpoint(file), str(file), "(DynamicViT)", "another method")


def test_an_ltmp_loads_as_published(file):
    torch.save({**STATE, **maskers()}, file)
    found = load_checkpoint(file)
    method = build_model(found).reduction
    assert (found.format, method.name, method.blocks) == ("ltmp", "ltmp", (0, 1, 2))
    assert [one.item() for one in method.merge] == pytest.approx([0.1] * 3)
    assert [one.item() for one in method.prune] == pytest.approx([0.01] * 3)
    assert any("the last block" in line for line in found.lines)
    assert any("of each two neighbours the other one merges" in line for line in found.lines)
    torch.save({**STATE, **maskers(merge=1.0, prune=0.0)}, file)
    method = build_model(load_checkpoint(file)).reduction
    assert [one.item() for one in method.parameters()] == pytest.approx([NEVER] * 6)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({**STATE, **maskers(3)}, "3 of LTMP's merge thresholds"),
        ({**STATE, **maskers(), "blocks.1.merge_masker.threshold": torch.ones(2)}, "of shape [2]"),
        ({**STATE, **maskers(merge=float("nan"))}, "method.merge.0 = nan"),
        (maskers(), "holds what LTMP learned"),
        (predictors(), "holds what DynamicViT learned"),
    ],
)
def test_a_damaged_ltmp_is_refused(file, state, words):
    torch.save(state, file)
    raises_one_line(lambda: load_checkpoint(file), str(file), words)


# --- beside its network -------------------------------------------------------------------------


def beside(folder):
    """An ltmp of a few numbers and its network."""
    network, file = folder / "dense.pth", folder / "ltmp.safetensors"
    torch.save(STATE, network)
    torch.manual_seed(0)
    model = build_model(load_checkpoint(network)).with_reduction(LTMP((0, 1, 2)))
    with torch.no_grad():
        for number, one in enumerate(model.reduction.parameters()):
            one.fill_(0.01 * (number + 1))
    save_checkpoint(file, model, {"budget": "0.7", "budget_by": "executed"}, network)
    return network, file, model


@torch.no_grad()
def test_numbers_lie_beside_their_network(tmp_path):
    _, file, model = beside(tmp_path)
    assert file.stat().st_size < 4000
    with safetensors.torch.safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {f"method.{k}.{i}" for k in ("merge", "prune")
                                      for i in range(3)}  # fmt: skip
        assert opened.metadata()["schema"] == "6"
    found = load_checkpoint(file)
    assert found.path == file
    assert any("dense.pth beside it" in line for line in found.lines)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(build_model(found)(image)[0], model(image)[0], rtol=0, atol=0)
    # Whole again where it is written elsewhere.
    save_checkpoint(tmp_path / "whole.safetensors", build_model(found), found.metadata)
    (tmp_path / "dense.pth").unlink()
    whole = build_model(load_checkpoint(tmp_path / "whole.safetensors"))
    torch.testing.assert_close(whole(image)[0], model(image)[0], rtol=0, atol=0)


def test_without_its_network_it_is_refused(tmp_path):
    network, file, model = beside(tmp_path)
    moved = network.rename(tmp_path / "other.pth")
    raises_one_line(lambda: load_checkpoint(file), str(file), "dense.pth", "is not beside it")
    torch.save({**STATE, "head.bias": STATE["head.bias"] + 1}, network)
    raises_one_line(lambda: load_checkpoint(file), str(file), "another network than the dense.pth")
    network.unlink()
    moved.rename(network)
    load_checkpoint(file)
    (deeper := tmp_path / "deeper").mkdir()
    raises_one_line(
        lambda: save_checkpoint(deeper / "x.safetensors", model, {}, network),
        "must lie beside its network",
    )
    assert list(deeper.iterdir()) == []


def test_a_network_that_is_read_otherwise_is_refused(tmp_path):
    _, file, _ = beside(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-3}))  # fmt: skip
    refused = "was made on a network with ", "put back what lay beside that"
    raises_one_line(lambda: load_checkpoint(file), str(file), *refused)
    (tmp_path / "config.json").unlink()
    # What is asked for on top of it is the caller's.
    assert load_checkpoint(file, image_size=32).config.image_size == 32
    assert load_checkpoint(file, given=Given(heads=3)).config.heads == 3


@pytest.mark.parametrize(
    ("options", "whole"),
    [({}, False), ({"given": Given(heads=3)}, True), ({"image_size": 32}, True),
     ({"given": Given(mean=(0.1, 0.2, 0.3))}, True), ({"ema": True}, True),
     ({"given": Given(heads=6)}, False)],
)  # fmt: skip
def test_options_that_changed_the_network_make_the_file_whole(tmp_path, options, whole):
    network, file = tmp_path / "dense.pth", tmp_path / "ltmp.safetensors"
    averaged = {**STATE, "head.bias": STATE["head.bias"] + 1}
    torch.save({"model": STATE, "model_ema": averaged}, network)
    checkpoint = load_checkpoint(network, **options)
    model = build_model(checkpoint).with_reduction(LTMP((0, 1, 2)))
    place = backbone_beside(file, model, checkpoint)
    assert place == (None if whole else network)
    assert backbone_beside(network, model, checkpoint) is None
    save_checkpoint(file, model, {}, place)
    again = load_checkpoint(file)
    assert again.config == checkpoint.config
    for key, value in checkpoint.state.items():
        assert torch.equal(again.state[key], value), key
    # So it is of what is made of that file in its turn.
    assert backbone_beside(tmp_path / "next.safetensors", model, again) == place


@pytest.mark.parametrize(
    "record", ["dense.pth", {"name": "../dense.pth", "sha256": ""}, {"name": "dense.pth"}, [1]]
)
def test_a_network_is_a_file_beside_it(tmp_path, record):
    torch.save(STATE, tmp_path / "dense.pth")
    model = build(DEEP.saving(), reduction=LTMP((0, 1, 2)))
    tensors = {k: v.detach() for k, v in model.state_dict().items() if k.startswith("method.")}
    metadata = {"format": "asvit-deploy", "schema": "6", "arch": DEEP.name, "image_size": "64",
                "num_classes": "7", "reduction": json.dumps(model.reduction.fields()),
                "backbone": record if isinstance(record, str) else json.dumps(record)}  # fmt: skip
    file = tmp_path / "ltmp.safetensors"
    safetensors.torch.save_file(tensors, file, metadata)
    raises_one_line(lambda: load_checkpoint(file), str(file), "names no file beside it")
