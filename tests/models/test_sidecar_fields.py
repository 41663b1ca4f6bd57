"""A checkpoint of ours travels with its sidecar, and the two must belong together."""

from __future__ import annotations

import json

import pytest

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.errors import UserError


@pytest.fixture
def saved(mini, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, mini, {"budget": "0.65", "classes": json.dumps(list("abcdefghij"))})
    return path


@pytest.mark.slow
def test_sidecar_says_what_the_checkpoint_is(mini, saved):
    fields = artifact.read(saved)
    assert fields["kind"] == "checkpoint"
    assert fields["arch"] == "as_deit_mini"
    assert fields["budget"] == 0.65
    assert fields["classes"] == list("abcdefghij")
    assert fields["thresholds"] == mini.threshold_values()
    assert "torch" in fields["libraries"]


def test_loads_with_and_without_it(saved):
    assert load_checkpoint(saved).adaptive
    artifact.sidecar_path(saved).unlink()
    assert load_checkpoint(saved).adaptive


def test_refuses_an_edited_sidecar(saved):
    sidecar = artifact.sidecar_path(saved)
    sidecar.write_text(sidecar.read_text().replace("0.65", "0.5"))
    with pytest.raises(UserError, match=r"model\.safetensors\.json was edited"):
        load_checkpoint(saved)


def test_refuses_anothers_sidecar(mini, saved, tmp_path):
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, mini, {"budget": "0.5"})
    artifact.sidecar_path(other).replace(artifact.sidecar_path(saved))
    with pytest.raises(UserError, match="sha256 differs"):
        load_checkpoint(saved)
