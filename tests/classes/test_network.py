"""Where a network's class names come from, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import raises_one_line

from asvit_deploy.checkpoints.load import Checkpoint
from asvit_deploy.classes import imagenet
from asvit_deploy.classes.network import ASSUMED, BESIDE, OWN, named, of_checkpoint, of_fields
from asvit_deploy.models.archs import arch

THREE = ["cat", "dog", "cow"]


def network(tmp_path: Path, count: int = 3, name: str = "as_deit_small", **metadata) -> Checkpoint:
    config = arch(name).at(num_classes=count)
    state = {"head.weight": torch.zeros(count, 1)}
    return Checkpoint(config, state, True, tmp_path / "x.pt", "as-vit", metadata)


def beside(tmp_path: Path, content: object) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "config.json").write_bytes(data)


def found(checkpoint: Checkpoint, given: Path | None = None):
    said: list[str] = []
    return of_checkpoint(checkpoint, given, said.append), said


def names_file(tmp_path: Path, *names: str) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names))
    return path


def test_imagenets_are_assumed_for_its_networks_alone(tmp_path):
    for name in ("as_deit_small", "as_deit_tiny", "as_lvvit_s"):
        names, (line,) = found(network(tmp_path, 1000, name))
        assert names.names == imagenet.names()
        assert names.origin == ASSUMED
        assert not names.firm
        assert "ImageNet-1k's names, assumed" in line
        assert "--classes" in line
    assert found(network(tmp_path, 1000, "as_deit_mini")) == (None, [])
    assert found(network(tmp_path, 999)) == (None, [])
    assert of_checkpoint(network(tmp_path, 1000), None, print, assume=False) is None


def test_the_option_wins_over_all_and_says_so(tmp_path):
    beside(tmp_path, {"id2label": {i: f"c{i}" for i in range(3)}})
    own = network(tmp_path, classes=json.dumps(["cat", "cow", "dog"]))
    names, (line,) = found(own, names_file(tmp_path, *THREE))
    assert names.names == tuple(THREE)
    assert names.origin == "--classes names.txt"
    assert "output 1 is 'dog', not 'cow'" in line
    assert found(own, names_file(tmp_path, "cat", "cow", "dog"))[1] == [], "they are the same"
    assert found(own)[0].origin == OWN
    assert found(network(tmp_path), names_file(tmp_path, *THREE))[1] == []


def test_what_made_the_file_says_where_its_names_came_from(tmp_path):
    own = network(tmp_path, classes=json.dumps(THREE), classes_from="names of the class folders")
    assert found(own)[0].origin == "names of the class folders"
    kept = named(network(tmp_path), found(own)[0])
    assert json.loads(kept.metadata["classes"]) == THREE
    assert kept.metadata["classes_from"] == "names of the class folders"


def test_config_json_beside_the_checkpoint(tmp_path):
    beside(tmp_path, {"id2label": {"2": "cow", "0": "cat", "1": "dog"}})
    names, (line,) = found(network(tmp_path))
    assert names.names == tuple(THREE)
    assert names.origin == BESIDE
    assert str(tmp_path / "config.json") in line
    names, lines = found(network(tmp_path, 1000))
    assert "names 3 classes" in lines[0]
    assert names.origin == ASSUMED


@pytest.mark.parametrize(
    "content",
    [{"id2label": {i: f"LABEL_{i}" for i in range(3)}}, {"hidden_size": 384}, THREE, 7],
)
def test_a_config_without_names_is_passed_over(tmp_path, content):
    beside(tmp_path, content)
    assert found(network(tmp_path)) == (None, [])


def test_names_of_no_use_beside_the_checkpoint_are_reported(tmp_path):
    beside(tmp_path, {"id2label": {0: "cat", 1: "dog", 2: "cat"}})
    names, (line,) = found(network(tmp_path))
    assert names is None
    assert "'cat' twice" in line
    assert "not used" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id2label": {"0": "cat", "1"', "no whole JSON"),
        ({"id2label": {"0": "cat", "1": "dog", "3": "cow"}}, "none for number 2"),
        (b"\xff\xfe", "no UTF-8"),
    ],
)
def test_a_config_that_is_cut_or_lies_is_refused_unless_the_option_tells(tmp_path, content, words):
    beside(tmp_path, content)
    raises_one_line(lambda: found(network(tmp_path)), "config.json", words, "--classes FILE")
    assert found(network(tmp_path), names_file(tmp_path, *THREE))[0].names == tuple(THREE)
    assert found(network(tmp_path, classes=json.dumps(THREE)))[0].origin == OWN


@pytest.mark.parametrize(("count", "words"), [(2, "has 2 outputs"), (1, "has 1 output;")])
def test_another_number_of_names_is_refused(tmp_path, count, words):
    path = names_file(tmp_path, *THREE)
    raises_one_line(lambda: found(network(tmp_path, count), path), str(path), "3 classes", words)


def test_artefacts_of_before(tmp_path):
    """Their sidecars have no `classes_from`, and no names of ImageNet."""
    said: list[str] = []
    fields = {"arch": "as_deit_small", "num_classes": 1000, "classes": None}
    assert of_fields(tmp_path / "x.onnx", fields, None, said.append).origin == ASSUMED
    assert len(said) == 1
    fields = {"arch": "as_deit_mini", "num_classes": 3, "classes": THREE}
    assert of_fields(tmp_path / "x.onnx", fields, None, said.append).origin == OWN
    assert len(said) == 1
    assert of_fields(tmp_path / "x.onnx", {**fields, "classes": None}, None, print) is None
