"""Foreign values, looked at once: what they must be, and what a text may hold."""

from __future__ import annotations

import pytest

from asvit_deploy.page import schema
from asvit_deploy.page.schema import Refused


@pytest.mark.parametrize(("reader", "value", "words"), [
    (schema.number, "fast", "'fast', where a number belongs"),
    (schema.number, True, "true, where a number"),
    (schema.number, None, "null, where a number"),
    (schema.number, float("nan"), "nan, where a finite number"),
    (schema.number, float("inf"), "inf, where a finite number"),
    (schema.number, 10**400, "where a finite number"),
    (schema.number, [1], "a list, where a number"),
    (schema.positive, -1.0, "no negative number"),
    (schema.share, 1.5, "a share from 0 to 1"),
    (schema.count, 1.5, "a whole number"),
    (schema.count, -1, "a whole number from 0"),
    (schema.count, 10**20, "a whole number from 0"),
    (schema.text, 3, "3, where a text"),
    (schema.text, {"a": 1}, "a dict, where a text"),
    (schema.flag, "yes", "true or false"),
    (schema.one_of("batch"), ["batch"], "one of batch"),
    (schema.each(schema.count), {"0": 1}, "a list"),
    (schema.each(schema.count, 2), [1, 2, 3], "2 is the most"),
    (schema.each(schema.count), [1, "x"], "x[1] is 'x'"),
    (schema.named(schema.count), [1], "an object"),
    (schema.pair(schema.count), [1, 2, 3], "a list of two"),
    (schema.record({"a": schema.count}), {}, "x has no 'a'"),
    (schema.record({"a": schema.count}), [], "an object"),
    (schema.record({}, {"a": schema.count}), {"a": "1"}, "x.a is '1'"),
])  # fmt: skip
def test_what_does_not_belong_is_named_with_its_place(reader, value, words):
    with pytest.raises(Refused) as caught:
        reader(value, "x")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 160


def test_what_belongs_is_taken():
    assert schema.number(3, "") == 3.0
    assert schema.any_number(float("inf"), "") == float("inf")
    assert schema.share(1 + 1e-12, "") == 1
    read = schema.record({"a": schema.count}, {"b": schema.text, "c": schema.each(schema.flag)})
    assert read({"a": 1, "c": None, "other": "dropped"}, "") == {"a": 1, "b": None, "c": None}


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/b.png", "..", ".", "", "a\\b.png",
                                  "a\0.png", "a\n.png", "\u202egnp.exe", "a" * 300, 3,
                                  None])  # fmt: skip
def test_files_lie_in_the_folder_itself(name):
    with pytest.raises(Refused, match=r"in the same folder|the name of a file"):
        schema.plain_name(name, "file")


def test_texts_are_one_visible_line():
    assert schema.clean("a\nb\tc  d") == "a b c d"
    assert schema.clean("\x1b[31mred\x1b[0m") == "\\x1b[31mred\\x1b[0m"
    assert schema.clean("abc\u202etxt") == "abc\\u202etxt"
    assert schema.clean("\u2066x\u2069\u200b\ufeff") == "\\u2066x\\u2069\\u200b\\ufeff"
    assert schema.clean("\ud800") == "\\ud800"
    assert schema.clean("\ue000\U000e0041") == "\\ue000\\U000e0041"
    for kept in ("Zürich", "猫", "שלום", "a\u200cb", "😀", "<b>&amp;"):
        assert schema.clean(kept) == kept
    long = schema.clean("x" * 10_000)
    assert len(long) <= schema.LONGEST + 1
    assert "…" in long
