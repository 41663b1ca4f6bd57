"""Class folders by number where all are numbers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from conftest import raises_one_line

from asvit_deploy.classes.order import in_order, number_of, orders_differ

DATA = Path("data")


@pytest.mark.parametrize(
    "ordered",
    [
        ["0", "1", "2", "9", "10", "11", "100"],
        ["002", "010", "100"],
        ["2", "010", "100"],  # numbers of several widths
        ["000", "1"],
        ["9" * 200, "1" + "0" * 200],
        ["10", "2", "cat"],  # a single one is no number: text, as everywhere
        ["-1", "0", "1"],
        ["1.5", "10", "2"],
        ["10", "2", "²"],
        ["10", "2", "٣"],
        ["Zebra", "ant"],
    ],
)
def test_numbers_go_by_number_and_all_else_by_text(ordered):
    mixed = ordered.copy()
    random.Random(0).shuffle(mixed)
    assert in_order(mixed, DATA) == ordered


@pytest.mark.parametrize("pair", [("1", "01"), ("0", "000"), ("10", "0010")])
def test_two_folders_of_one_number_are_refused(pair):
    raises_one_line(lambda: in_order(["5", *pair], DATA), "data", *pair, "the same number")
    assert in_order(["cat", *pair], DATA) == sorted(["cat", *pair]), "as text they differ"


def test_number_of():
    assert [number_of(name) for name in ("7", "007", "0", "", "7a", " 7")] == [
        "7", "7", "0", None, None, None,
    ]  # fmt: skip


def test_orders_differ():
    assert orders_differ(["2", "10"])
    assert not orders_differ(["02", "10"])
