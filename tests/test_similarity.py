"""Cosines, nearest neighbours and votes, against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest

from asvit_deploy import similarity
from asvit_deploy.errors import UserError
from asvit_deploy.similarity import agreement, nearest, same_nearest, units, voted


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(23, 7)).astype(np.float32)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("exact", [0, 4096])
@pytest.mark.parametrize("block", [1, 5 * 23, 1 << 20])
def test_nearest_and_votes_are_those_of_the_definition(monkeypatch, vectors, block, exact):
    monkeypatch.setattr(similarity, "_EXACT", exact)
    monkeypatch.setattr(similarity, "_COSINES", block)
    labels = np.random.default_rng(1).integers(0, 3, len(vectors))
    found, votes = nearest(units(vectors)), voted(units(vectors), labels, 4)
    for i, own in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i]
        ranked = sorted(others, key=lambda j, own=own: -cosine(own, vectors[j]))
        assert found[i] == ranked[0]
        weight = dict.fromkeys(range(3), (0, 0.0))
        for j in ranked[:4]:
            count, total = weight[int(labels[j])]
            weight[int(labels[j])] = count + 1, total + cosine(own, vectors[j])
        assert votes[i] == max(weight, key=weight.__getitem__)


def test_a_vector_without_direction_is_nobodys_neighbour():
    made = units(np.array([[1.0, 0], [0, 0], [np.nan, 1], [1, 1], [np.inf, 0]]))
    assert np.isnan(made).any(1).tolist() == [False, True, True, False, True]
    assert nearest(made).tolist() == [3, -1, -1, 0, -1]
    assert nearest(units(np.ones((1, 3)))).tolist() == [-1], "there is no other"
    with pytest.raises(UserError, match=r"x gives embeddings .* on 3 of 5 pictures"):
        similarity.directions(np.array([[1.0, 0], [0, 0], [np.nan, 1], [1, 1], [np.inf, 0]]), "x")


def test_lengths_do_not_count_and_huge_ones_do_not_overflow(vectors):
    longer = vectors.astype(np.float64) * np.linspace(1e-30, 1e30, len(vectors))[:, None]
    assert (nearest(units(longer)) == nearest(units(vectors))).all()
    np.testing.assert_allclose(similarity.cosines(vectors, longer), 1, atol=1e-12)


def test_the_same_picture_twice_is_one_neighbour(vectors):
    ours = units(np.concatenate([vectors, vectors[:1]]))  # 0 and the last are equally near
    theirs = ours.copy()
    theirs[0, 0] += 1e-12
    assert same_nearest(ours, theirs).all()


def test_agreement_with_itself_and_with_noise(vectors):
    same = agreement(vectors, 3 * vectors, "x")
    assert same["cosine"] == pytest.approx(1)
    assert same["neighbour"] == 1
    noisy = vectors + np.random.default_rng(2).normal(size=vectors.shape)
    said = agreement(vectors, noisy, "x")
    each = [cosine(a, b) for a, b in zip(vectors, noisy)]
    assert said["cosine"] == pytest.approx(np.mean(each))
    assert said["p10"] == pytest.approx(np.quantile(each, 0.1))
    assert said["low"] < said["cosine"] < said["high"]
    assert 0 < said["neighbour"] < 1
    assert "neighbour" not in agreement(vectors[:2], noisy[:2], "x"), "each has one other"
