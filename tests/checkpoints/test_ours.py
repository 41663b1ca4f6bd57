"""Files of our own with another method than thresholds."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.methods import METHODS
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.topk import TopK

CONFIG = arch("as_deit_mini").saving()


@pytest.fixture(params=[TopK, SizePassing], ids=lambda method: method.name)
def model(request):
    torch.manual_seed(0)
    return build(CONFIG, reduction=fixed_counts(CONFIG, request.param, 0.65)).eval()


@torch.inference_mode()
def test_a_method_comes_back(model, tmp_path):
    path, images = tmp_path / "m.safetensors", torch.randn(2, 3, 56, 56)
    save_checkpoint(path, model, {})
    loaded = load_checkpoint(path)
    assert loaded.adaptive
    again = build_model(loaded)
    assert type(again.reduction) is type(model.reduction) is METHODS[model.reduction.name]
    assert again.reduction.fields() == model.reduction.fields()
    torch.testing.assert_close(again(images)[0], model(images)[0], rtol=0, atol=1e-6)
    dense = build_model(loaded, dense=True)
    assert dense.reduction is None
    wanted = model.with_reduction(None)(images)[0]
    torch.testing.assert_close(dense(images)[0], wanted, rtol=0, atol=1e-6)
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["reduction"] == (
        model.reduction.fields()
    )


def test_versions_that_know_thresholds_alone_refuse_it(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model, {})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["schema"] == "4"


@pytest.mark.parametrize("fields", [
    "x", "[]", "{}", '{"name": "other", "blocks": [1], "kept": [3]}',
    '{"name": "topk", "blocks": [1, 9], "kept": [30, 20]}',
    '{"name": "topk", "blocks": [2, 1], "kept": [30, 20]}',
    '{"name": "topk", "blocks": [2, 3], "kept": [30]}',
    '{"name": "topk", "blocks": [2, 3], "kept": [30, 0.5]}',
    '{"name": "topk", "blocks": "ab", "kept": [30, 5]}',
    '{"name": "topk", "blocks": 7, "kept": [30]}',
    '{"name": "topk", "blocks": [2], "kept": [true]}',
])  # fmt: skip
def test_fields_that_do_not_fit_are_refused(tmp_path, fields):
    torch.manual_seed(0)
    state = build(CONFIG, adaptive=False).state_dict()
    metadata = {"format": "asvit-deploy", "schema": "4", "arch": CONFIG.name, "image_size": "56",
                "num_classes": "10", "reduction": fields}  # fmt: skip
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state, path, metadata)
    with pytest.raises(UserError, match=r"says reduction .* which does not fit as_deit_mini"):
        load_checkpoint(path)
