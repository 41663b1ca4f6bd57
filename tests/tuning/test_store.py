"""Measurements that are taken up again, and those that must not be."""

from __future__ import annotations

import json

import pytest
from conftest import raises_one_line

from asvit_deploy.tuning.store import Store

OF = {"machine": {"cpu": "a"}, "checkpoint": "sha", "pictures": "other sha"}
SETTINGS = {"step": "fitted", "budget": 0.6}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path, OF, lambda line: None)
    store.keep(SETTINGS, {"share": 0.6})
    return store


def test_a_measurement_is_made_once(store):
    assert store.measured(SETTINGS, pytest.fail) == {"share": 0.6}
    assert (store.reused, store.added) == (1, 1)
    assert store.measured({**SETTINGS, "budget": 0.5}, lambda: 3) == 3


@pytest.mark.parametrize("other", [
    {"machine": {"cpu": "b"}}, {"checkpoint": "another"}, {"pictures": "others"},
])  # fmt: skip
def test_another_machine_network_or_folder_of_pictures_is_measured_again(store, tmp_path, other):
    assert Store(tmp_path, {**OF, **other}, print).found(SETTINGS) is None
    assert Store(tmp_path, OF, print).found(SETTINGS) == {"share": 0.6}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "measured", "value": 1}'])
def test_a_damaged_measurement_is_made_again_with_a_line(store, tmp_path, text):
    said = []
    (path,) = tmp_path.glob("*.json")
    path.write_text(text)
    again = Store(tmp_path, OF, said.append)
    assert again.measured(SETTINGS, lambda: 7) == 7
    assert len(said) == 1
    assert "measured again" in said[0]
    assert again.found(SETTINGS) == 7


def test_an_edited_measurement_is_not_believed(store, tmp_path):
    (path,) = tmp_path.glob("*.json")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "value": {"share": 0.1}}))
    assert Store(tmp_path, OF, lambda line: None).found(SETTINGS) is None


def test_a_measurement_that_cannot_be_written_is_one_line(tmp_path):
    folder = tmp_path / "measured"
    folder.write_text("a file")
    store = Store(folder, OF, print)
    with pytest.raises(FileExistsError):
        store.keep(SETTINGS, 1)
    folder.unlink()
    folder.mkdir()
    store._path(SETTINGS).mkdir()
    raises_one_line(lambda: store.keep(SETTINGS, 1), "it is a folder")
