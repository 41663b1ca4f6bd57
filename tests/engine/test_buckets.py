"""Which sizes stages take."""

from __future__ import annotations

import onnx
import pytest

from asvit_deploy.engine.buckets import choose_buckets, parse_buckets, profiles_of
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.split import split_segments


@pytest.mark.parametrize(
    ("text", "numbers"), [("auto", None), ("16,32,197", (16, 32, 197)), ("8, 4", (8, 4))]
)
def test_parse(text, numbers):
    assert parse_buckets(text) == numbers


@pytest.mark.parametrize("text", ["", "16;32", "16,", "a", "1.5", "-"])
def test_what_is_no_list(text):
    with pytest.raises(UserError, match="is no list of numbers"):
        parse_buckets(text)


@pytest.mark.parametrize(
    ("wanted", "rows", "buckets"),
    [
        (None, 197, (*range(16, 193, 16), 197)),
        (None, 16, (16,)),
        (None, 17, (16, 17)),
        (None, 2, (2,)),
        (None, 48, (16, 32, 48)),
        ((197,), 197, (197,)),
        ((64, 197, 64, 2), 197, (2, 64, 197)),
    ],
)
def test_choose(wanted, rows, buckets):
    assert choose_buckets(wanted, rows, "m.onnx") == buckets


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ((16, 32), "--buckets 16,32 does not cover m.onnx.*197 rows; add 197"),
        ((), "does not cover"),
        ((1, 197), "--buckets 1 does not fit m.onnx.*2 to 197 rows"),
        ((-16, 197), "--buckets -16 does not fit"),
        ((16, 197, 198), "--buckets 198 does not fit"),
    ],
)
def test_refuses(wanted, words):
    with pytest.raises(UserError, match=words) as error:
        choose_buckets(wanted, 197, "m.onnx")
    assert "\n" not in str(error.value)


def test_one_profile_for_each_bucket(mini_artifacts):
    first, second, *_ = split_segments(onnx.load(mini_artifacts["1", "auto"]))
    assert profiles_of(first, (16, 197)) == []
    shapes = [(1, 16, 128), (1, 197, 128)]
    assert profiles_of(second, (16, 197)) == [{"kept": (shape,) * 3} for shape in shapes]
