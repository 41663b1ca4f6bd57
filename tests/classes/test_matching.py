"""Data folders to a network's outputs."""

from __future__ import annotations

import time

import pytest
from conftest import raises_one_line

from asvit_deploy.classes import imagenet
from asvit_deploy.classes.matching import label_map
from asvit_deploy.classes.order import in_order

IMAGENET = imagenet.names()
SYNSETS = [imagenet.synset(i) for i in range(1000)]


def mapped(theirs, ours, count, firm=True):
    said: list[str] = []
    return label_map(theirs, ours, count, firm, said.append).tolist(), said


def test_by_name_or_by_order():
    assert mapped(["b", "c"], ["a", "b", "c"], 3) == ([1, 2], [])
    assert mapped(["x", "y", "z"], None, 3)[0] == [0, 1, 2]
    assert mapped(["n01", "n02"], ["0", "1"], 2)[0] == [0, 1]
    raises_one_line(lambda: label_map(["a", "z"], ["a", "b"], 2), "'z'", "does not know")
    raises_one_line(lambda: label_map(["a", "z"], None, 1000), "2 classes and the model 1000")


def test_an_order_that_nothing_gives_is_reported():
    _, (line,) = mapped(["bird", "cat"], None, 2)
    assert "in order ('bird' = 0, 'cat' = 1); --classes FILE" in line
    numbers = in_order(map(str, range(12)), "data")  # type: ignore[arg-type]
    found, (line,) = mapped(numbers, None, 12)
    assert found == list(range(12))
    assert "by number" in line
    assert mapped(list("0123456789"), None, 10) == (list(range(10)), []), "both orders are one"
    found, (line,) = mapped([str(i) for i in range(1, 11)], None, 10)
    assert found == list(range(10))
    assert "in order ('1' = 0" in line


def test_numbers_name_outputs_where_nothing_else_does():
    assert mapped(["3", "7"], None, 10)[0] == [3, 7]
    assert mapped(["003", "010"], None, 12)[0] == [3, 10]
    raises_one_line(lambda: label_map(["3", "70"], None, 10), "2 classes and the model 10")
    raises_one_line(lambda: label_map(["3", "9" * 5000], None, 10), "2 classes and the model 10")
    raises_one_line(lambda: label_map(["0", "1"], ["cat", "dog"], 2), "'0'", "does not know")
    assert mapped(["0", "1"], ["cat", "dog"], 2, firm=False)[0] == [0, 1]


def test_labels_in_an_order_of_their_own_keep_it():
    """Shards name label 2 "10": the label is the number, whatever its name."""
    assert mapped(["0", "1", "10", "2"], None, 4)[0] == [0, 1, 2, 3]
    text = sorted(map(str, range(12)))
    assert mapped(text, None, 12)[0] == list(range(12))


def test_names_as_people_write_them_are_matched_and_reported():
    found, (line,) = mapped(["egyptian_cat", "Dog"], ["dog", "Egyptian cat"], 2)
    assert found == [1, 0]
    assert "'egyptian_cat' = 1 (Egyptian cat)" in line
    assert mapped(["00", "07"], ["0", "7"], 2)[0] == [0, 1]
    assert mapped(["cat", "Cat"], ["Cat", "cat"], 2) == ([1, 0], [])
    raises_one_line(lambda: label_map(["CAT"], ["Cat", "cat"], 2), "'CAT' may mean")
    raises_one_line(lambda: label_map(["dog_", "Dog"], ["dog", "cat"], 2), "both mean output 0")


@pytest.mark.parametrize(
    "folders",
    [
        ["n01440764", "n02086240", "n03417042"],
        ["tench", "Shih-Tzu", "garbage_truck"],
        ["tench, Tinca tinca", "shih tzu", "garbage truck, dustcart"],
        ["0", "155", "569"],
        ["000", "155", "569"],
        ["n01440764", "Shih-Tzu", "dustcart"],
    ],
)
@pytest.mark.parametrize("ours", [IMAGENET, SYNSETS])
def test_a_part_of_imagenet(folders, ours):
    for firm in (True, False):
        assert mapped(folders, ours, 1000, firm)[0] == [0, 155, 569]


def test_all_of_imagenet():
    whole = list(range(1000))
    assert mapped(SYNSETS, IMAGENET, 1000, False)[0] == whole
    assert mapped([str(i) for i in whole], IMAGENET, 1000, False)[0] == whole
    by_name = sorted(IMAGENET)
    assert mapped(by_name, IMAGENET, 1000, False)[0] == [IMAGENET.index(n) for n in by_name]
    others = [f"product {i:04}" for i in whole]
    found, (line,) = mapped(others, IMAGENET, 1000, False)
    assert found == whole
    assert "in order ('product 0000' = 0" in line
    # A few that happen to be called like one of ImageNet's do not make it ImageNet.
    assert mapped(["goldfish", "pizza", *others[2:]], IMAGENET, 1000, False)[0] == whole


def test_what_imagenet_does_not_have():
    raises_one_line(lambda: label_map(["tench", "unicorn"], IMAGENET, 1000, False), "'unicorn'")
    raises_one_line(lambda: label_map(["tench", "crane"], IMAGENET, 1000, False), "'crane'",
                    "134 (crane (n02012849))", "517 (crane (n03126707))")  # fmt: skip
    raises_one_line(lambda: label_map(["tench", "n01440764"], IMAGENET, 1000), "both mean output 0")
    raises_one_line(lambda: label_map([*SYNSETS[:999], "x"], IMAGENET, 1000, False), "'x'")


def test_many_classes_take_no_quadratic_time():
    many = [f"class {i}" for i in range(100_000)]
    start = time.process_time()
    assert mapped(many[::-1], many, len(many))[0] == list(range(len(many)))[::-1]
    assert time.process_time() - start < 10
