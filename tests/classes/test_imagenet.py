"""The list that the package carries."""

from __future__ import annotations

import json
from importlib.resources import files

from asvit_deploy.classes import imagenet
from asvit_deploy.classes.name_files import read_names


def lemmas() -> list[str]:
    text = files("asvit_deploy.classes").joinpath("imagenet_1k.txt").read_text()
    return [line.split(" ", 1)[1] for line in text.splitlines()]


def test_places_that_everybody_knows():
    names = imagenet.names()
    assert len(names) == len(set(names)) == 1000
    for number, synset, name in (
        (0, "n01440764", "tench"), (1, "n01443537", "goldfish"), (151, "n02085620", "Chihuahua"),
        (281, "n02123045", "tabby"), (404, "n02690373", "airliner"), (954, "n07753592", "banana"),
        (999, "n15075141", "toilet tissue"),
    ):  # fmt: skip
        assert names[number].startswith(name)
        assert imagenet.meant_by(synset) == {number}


def test_every_label_means_its_own_class():
    for i, label in enumerate(imagenet.names()):
        assert imagenet.meant_by(label) == {i}
        assert imagenet.meant_by(imagenet.synset(i)) == {i}


def test_doubles_bear_their_synset():
    names = imagenet.names()
    assert [names[i] for i in (134, 517)] == ["crane (n02012849)", "crane (n03126707)"]
    assert names[638] == "maillot (n03710637)"
    assert names[639] == "maillot, tank suit (n03710721)"
    assert sum("(n0" in name for name in names) == 4


def test_names_as_people_write_them():
    for name, number in (
        ("golden_retriever", 207), ("Golden Retriever", 207), ("Shih-Tzu", 155), ("shih tzu", 155),
        ("Cardigan", 264), ("cardigan", 474), ("missile", 657), ("projectile", 744),
        ("n01440764 tench, Tinca tinca", 0), ("n01440764_tench", 0), ("goldfish", 1),
    ):  # fmt: skip
        assert imagenet.meant_by(name) == {number}, name
    assert imagenet.meant_by("crane") == {134, 517}
    assert imagenet.meant_by("maillot") == {638, 639}
    assert imagenet.meant_by("unicorn") == set()


def test_lists_of_imagenet_are_known_by_their_content():
    own, first = lemmas(), [name.split(", ")[0] for name in lemmas()]
    synsets = [imagenet.synset(i) for i in range(1000)]
    for listed in (own, first, synsets, list(imagenet.names())):
        assert imagenet.are_these(listed)
    assert not imagenet.are_these(sorted(own))
    assert not imagenet.are_these(own[1:] + own[:1])
    assert not imagenet.are_these(own[:10])


def test_its_own_doubles_are_no_mistake_of_the_file(tmp_path):
    """transformers' config.json of every ImageNet network has two cranes."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"id2label": dict(enumerate(lemmas()))}))
    names = read_names(path)
    assert [names[i] for i in (134, 517)] == ["crane (n02012849)", "crane (n03126707)"]
    assert names[0] == "tench, Tinca tinca"
