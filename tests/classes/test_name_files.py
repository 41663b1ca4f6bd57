"""Class names from text, JSON and the config.json of transformers and timm."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from conftest import raises_one_line

from asvit_deploy.bounded import MOST_TEXT
from asvit_deploy.classes.name_files import names_of_config, read_names

NAMES = ["cat", "Dogge, deutsche", "Köpfe"]


def written(tmp_path: Path, content: object, name: str = "names.txt") -> Path:
    path = tmp_path / name
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "cat\nDogge, deutsche\nKöpfe",
        "cat\nDogge, deutsche\nKöpfe\n\n\n",
        "\ufeffcat\r\nDogge, deutsche\r\nKöpfe\r\n\r\n",
        "cat\rDogge, deutsche\rKöpfe\r",
        " cat \n\tDogge, deutsche\nKöpfe",
    ],
)
def test_text(tmp_path, content):
    assert read_names(written(tmp_path, content.encode())) == NAMES


def test_names_keep_what_is_theirs(tmp_path):
    odd = ["[background]", "{x}", "# 7", "a\u2009b\u200cc", "\u00a0x\u0085y".strip("\u00a0")]
    assert read_names(written(tmp_path, "\n".join(odd[:4]).encode())) == odd[:4]


@pytest.mark.parametrize(
    "content",
    [
        NAMES,
        dict(enumerate(NAMES)),
        {name: i for i, name in enumerate(NAMES)},
        {"2": NAMES[2], "0": NAMES[0], "1": NAMES[1]},
        {"model_type": "vit", "id2label": dict(enumerate(NAMES))},
        {"label2id": {name: i for i, name in enumerate(NAMES)}},
        {"label2id": {name: str(i) for i, name in enumerate(NAMES)}},
        {"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label_names": NAMES},
        {"architecture": "vit", "label_names": NAMES, "label_descriptions": {"cat": "a cat"}},
        {"architecture": "vit", "pretrained_cfg": {"label_names": dict(enumerate(NAMES))}},
    ],
)
@pytest.mark.parametrize("name", ["names.json", "names.txt"])
def test_json_by_its_ending_or_its_look(tmp_path, content, name):
    assert read_names(written(tmp_path, content, name)) == NAMES
    bom = b"\xef\xbb\xbf" + json.dumps(content, indent=2).encode()
    assert read_names(written(tmp_path, bom, name)) == NAMES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"cat\ndog\ncat\n", "'cat' twice, as number 0 and 2"),
        (b"\x89PNG\r\n\x1a\n", "no UTF-8 text"),
        ("cat\ndog".encode("utf-16"), "no UTF-8 text"),
        (b"cat\nd\0g\n", "no plain text"),
        (b"cat\n\x1b[2Jdog\n", "no plain text"),
        (b"n01440764\ttench\n", "no plain text"),
        (b'["cat", "dog", "bi', "no whole JSON"),
        (b'[\n "cat",\n "dog",', "no whole JSON"),
        (b'{"id2label": {"0": "cat"', "no whole JSON"),
        (b"[" * 100_000 + b'"', "100,001 characters"),
        (["cat", 7], "is '7', no text"),
        (["cat", ""], "is '', no text"),
        (["cat", None], "no text"),
        (["cat", "a\nb"], "no plain text"),
        (b'["cat", "\\ud800"]', "no plain text"),
        (["cat", "cat"], "'cat' twice"),
        ({"0": "cat", "2": "dog"}, "none for number 1"),
        ({"1": "cat", "2": "dog"}, "none for number 0"),
        ({"0": "cat", "x": "dog"}, "'x' where a number is due"),
        ({"0": "cat", "-1": "dog"}, "'-1' where a number is due"),
        ({"0": "cat", "1": "dog", "01": "cow"}, "number 1 twice"),
        (b'{"0": "cat", "1": "dog", "0": "cow"}', "number 0 twice"),
        ({"cat": 0, "dog": 2}, "none for number 1"),
        ({"0": 1, "1": 1}, "one number to several"),
        ({"cat": "x", "dog": "y"}, "none of id2label"),
        ({"model_type": "vit"}, "none of id2label"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "only placeholders"),
        ({"id2label": "cat"}, "no list"),
        ({"id2label": {"0": ["cat"]}}, "no text"),
        ({"label2id": {"cat": 0, "dog": 0}}, "one number to several"),
        ({"label2id": {"cat": 0, "dog": True}}, "where a number is due"),
        ({"label2id": {"cat": 0, "dog": 1.5}}, "where a number is due"),
    ],
)
def test_bad_content_is_reported_in_a_line(tmp_path, content, words):
    path = written(tmp_path, content)
    raises_one_line(lambda: read_names(path), str(path), words)


def test_a_json_file_is_never_read_as_text(tmp_path):
    for content in (b"cat\ndog\n", b"7", b'"cat"', b"null"):
        path = written(tmp_path, content, "names.json")
        raises_one_line(lambda path=path: read_names(path), str(path))
    deep = written(tmp_path, b"[" * 100_000, "deep.json")
    raises_one_line(lambda: read_names(deep), "no whole JSON file: brackets too deep")


def test_what_is_no_file_of_names_is_not_opened(tmp_path):
    raises_one_line(lambda: read_names(tmp_path), "is a folder")
    raises_one_line(lambda: read_names(tmp_path / "no.txt"), "does not exist")
    os.mkfifo(tmp_path / "pipe")
    raises_one_line(lambda: read_names(tmp_path / "pipe"), "no regular file")
    huge = tmp_path / "huge.txt"
    with open(huge, "wb") as file:
        file.truncate(MOST_TEXT + 1)
    raises_one_line(lambda: read_names(huge), "too many for a file of class names")


@pytest.mark.slow
def test_many_names_take_no_quadratic_time(tmp_path):
    many = [f"class {i}" for i in range(300_000)]
    path = written(tmp_path, ("\n".join([*many, many[-1]])).encode())
    start = time.process_time()
    raises_one_line(lambda: read_names(path), "twice, as number 299999 and 300000")
    assert time.process_time() - start < 20, "comparing each with each takes hours"


def test_a_config_that_names_nothing(tmp_path):
    for content in ({"model_type": "vit"}, ["cat"], {"id2label": {"0": "LABEL_0"}}, {"0": "cat"}):
        assert names_of_config(written(tmp_path, content, "config.json")) is None
    raises_one_line(
        lambda: names_of_config(written(tmp_path, b'{"id2label"', "config.json")), "no whole JSON"
    )


def test_too_few(tmp_path):
    path = written(tmp_path, b"cat\n")
    assert read_names(path) == ["cat"]
    raises_one_line(lambda: read_names(path, least=2), "holds 1 class name", "at least 2")
