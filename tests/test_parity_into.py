"""Where leaving tokens go: compared, judged by how near the next best was, and replayed."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.parity import compare
from asvit_deploy.reduction.bat import BAT
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import EViT, TopKNearest
from asvit_deploy.runners.base import decode, into_rows, rows_of
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

MINI = replace(arch("as_deit_mini"), stem="patch", depth=5, image_size=28).saving()  # 7 x 7 tokens
BLOCKS, KEPT = (1, 3), (35, 26)


def network(method=SizePassing, kept=KEPT, prefix=1):
    """Peaked attention; tokens have no positions, so that equal patches are equal tokens."""
    torch.manual_seed(0)
    config = replace(MINI, prefix=prefix)
    model = build(config, reduction=method(BLOCKS, kept, prefix)).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
            block.mlp.fc2.weight.mul_(8)
        model.head.weight.mul_(8)
        for boundary in model.reduction.boundaries():
            boundary.fill_({"tome": 0.7, "size-passing": 0.02}[method.name])
    return model


@pytest.fixture(scope="module")
def pictures():
    """Noise, whose patches are not alike."""
    return [*np.random.default_rng(0).normal(size=(4, 3, 28, 28)).astype(np.float32)]


def patch(image, token):
    y, x = divmod(token, 7)
    return image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]


def with_twins(image, off=0.0):
    """The picture with the patch of an odd place at another odd place, too, but for a little."""
    image = image.copy()
    for one, other in zip((11, 13), (31, 33)):
        patch(image, other)[:] = patch(image, one) * np.float32(1 + off)
    return image


def elsewhere(model, choose):
    """The same network, of which some leaving tokens go elsewhere at the first cut.

    Args:
        choose: (decision) -> int64 [B, M], its `into`.
    """
    other = copy.deepcopy(model)
    honest = other.reduction.rank

    def rank(stage, rows, seen):
        found = honest(stage, rows, seen)
        return found if stage else replace(found, into=choose(found, rows, seen))

    other.reduction.rank = rank
    return other


def to_the_twin(found, rows, seen):
    """What goes to one of two equal tokens goes to the other; prefix of one row."""
    into = found.into.clone()
    for one, other in zip((11, 13), (31, 33)):
        for a, b in ((one, other), (other, one)):
            into[found.into == a + 1] = b + 1
    own = torch.arange(into.shape[1])
    return torch.where(found.into == own, own, into)


def far_away(found, rows, seen):
    """Every leaving token that has a clear best goes to the last odd place instead."""
    into, prefix = found.into.clone(), into_prefix(found)
    own = torch.arange(into.shape[1])
    clear = torch.cat([torch.zeros(len(into), prefix), found.into_margin], 1) > 0.05
    last = prefix + 47
    return torch.where(clear & (into != own) & (into != last), last, into)


def into_prefix(found):
    return found.into.shape[1] - found.score.shape[1]


def compared(model, other, pictures, precision="float32"):
    names = [str(i) for i in range(len(pictures))]
    return compare(TorchRunner(model), TorchRunner(other), pictures, names, model.boundaries(),
                   precision)  # fmt: skip


METHODS = [(SizePassing, KEPT), (ToMe, KEPT), (SizePassing, None), (ToMe, None)]
IDS = ["size-passing", "tome", "size-passing by thresholds", "tome by thresholds"]
each_method = pytest.mark.parametrize(("method", "kept"), METHODS, ids=IDS)


@each_method
@pytest.mark.parametrize("off", [0.0, 1e-7])
def test_a_near_tie_passes_and_is_listed(method, kept, off, pictures):
    model = network(method, kept)
    images = [with_twins(image, off) for image in pictures]
    other = elsewhere(model, to_the_twin)
    found = compared(model, other, images)
    assert found.passed, found.failures
    assert found.turns, "some leaving token had an equal choice"
    assert all(turn.turned and turn.borderline and turn.stage == 0 for turn in found.turns)
    assert found.flips == []
    assert found.equal_sets == len(images), "the same tokens stay"
    assert found.replayed > 0
    assert found.logit_error <= 1e-5
    said = found.as_dict()["turns"]
    assert {turn["token"] for turn in said} == {turn.token for turn in found.turns}
    assert all(turn["borderline"] and turn["turned"] for turn in said)


@each_method
def test_a_clear_choice_that_goes_elsewhere_fails(method, kept, pictures):
    model = network(method, kept)
    other = elsewhere(model, far_away)
    found = compared(model, other, pictures)
    assert not found.passed
    assert any(turn.margin > 0.05 and not turn.borderline for turn in found.turns)
    assert any("beyond rounding" in words for words in found.failures)
    # The candidate is followed, so that what it does with its own choice is judged too.
    assert found.logit_error <= 1e-5
    assert not any("logits" in words for words in found.failures)


def test_turns_hide_no_wrong_network(pictures):
    model = network()
    other = elsewhere(model, to_the_twin)
    with torch.no_grad():
        other.head.bias.add_(0.01)
    found = compared(model, other, [with_twins(image) for image in pictures])
    assert found.turns
    assert any("logits differ" in words for words in found.failures)


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize(
    ("method", "kept"), [(SizePassing, KEPT), (ToMe, None), (TopKNearest, KEPT), (BAT, KEPT)]
)
def test_replayed_with_into_it_is_the_candidate_s_output(method, kept, prefix, pictures):
    """Of a network that sends every leaving token to the same row."""
    model = network(method, kept, prefix)
    other = copy.deepcopy(model)
    honest = other.reduction.destined
    target = prefix + 47

    def destined(rows, stay, decision):
        found = honest(rows, stay, decision)
        goes = torch.where(rows.leaving(stay, prefix) > 0, best(stay, target), found.into)
        return replace(found, into=goes)

    def best(stay, wanted):
        """A row that stays, the last of them."""
        places = torch.arange(stay.shape[1])
        return torch.where(stay > 0, places, -1).amax(1, keepdim=True)

    other.reduction.destined = destined
    reference, candidate = TorchRunner(model), TorchRunner(other)
    for image in pictures[:2]:
        theirs, own = candidate(image[None]), reference(image[None])
        kept_, into = ([stage[0] for stage in some] for some in (theirs.kept, theirs.into))
        again = reference.replay(image[None], kept_, into)
        np.testing.assert_allclose(again.output, theirs.output, rtol=0, atol=1e-5)
        assert np.abs(own.output - theirs.output).max() > 1e-3
        without = reference.replay(image[None], kept_)
        assert np.abs(without.output - theirs.output).max() > 1e-3, "it is `into` that matters"
        assert [stage[0].tolist() for stage in again.kept] == [k.tolist() for k in kept_]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kept", "batch"),
    [(SizePassing, KEPT, "dynamic"), (ToMe, None, "1"), (ToMe, None, "dynamic"),
     (TopKNearest, KEPT, "1"), (BAT, KEPT, "1")],
)  # fmt: skip
def test_a_graph_says_where_tokens_go(method, kept, batch, pictures):
    model = network(method, kept)
    graph = OrtRunner(to_onnx(model, batch))
    reference = TorchRunner(model)
    size = 1 if batch == "1" else 3
    images = np.stack(pictures[:size])
    theirs, ours = graph(images), reference(images)
    assert theirs.into is not None
    assert len(theirs.into) == len(ours.into) == len(ours.into_margin) == 2
    for stage in range(2):
        for b in range(size):
            before = ours.kept[stage - 1][b] if stage else np.arange(49)
            gone = np.setdiff1d(before, ours.kept[stage][b])
            assert theirs.kept[stage][b].tolist() == ours.kept[stage][b].tolist()
            assert theirs.into[stage][b][gone].tolist() == ours.into[stage][b][gone].tolist()
            assert np.isin(ours.into[stage][b][gone], ours.kept[stage][b]).all(), "to what stays"
            assert (ours.into_margin[stage][b][gone] >= 0).all()
    found = compare(reference, graph, pictures, list("abcd"), model.boundaries(), batch=size)
    assert found.passed, found.failures
    assert found.turns == []


def test_every_cut_says_where_tokens_go_though_none_leaves(pictures):
    """BAT with a first cut that keeps all."""
    prediction = TorchRunner(network(BAT, (49, 30)))(pictures[0][None])
    assert len(prediction.into) == len(prediction.into_margin) == 2
    gone = np.setdiff1d(np.arange(49), prediction.kept[1][0])
    assert np.isin(prediction.into[1][0][gone], prediction.kept[1][0]).all()


def test_methods_of_which_nothing_goes_on_say_nothing(pictures):
    prediction = TorchRunner(network(EViT))(pictures[0][None])
    assert (prediction.into, prediction.into_margin) == (None, None)


# --- row numbers and tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("appended", [0, 1, 2])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_rows_become_tokens_and_rows_again(prefix, appended, seed):
    """Two images, three cuts; what cuts add is token N, N + 1 and so on."""
    rng, tokens, stages = np.random.default_rng(seed), 14, 3
    names = [list(range(tokens)) for _ in range(2)]
    index, into, values, lengths, wanted = [], [], [], [], []
    for stage in range(stages):
        width = max(map(len, names))  # rows in use, and rows that pad the shorter image
        stays = [np.sort(rng.choice(len(one), len(one) // 2 + int(rng.integers(2)), replace=False))
                 for one in names]  # fmt: skip
        last = prefix + max(map(len, stays)) + appended
        rows, goes = np.full((2, last), -1), np.tile(np.arange(prefix + width), (2, 1))
        for b, (one, stay) in enumerate(zip(names, stays)):
            gone = np.setdiff1d(np.arange(len(one)), stay)
            goes[b, prefix + gone] = prefix + rng.choice(stay, len(gone))
            wanted.append({one[g]: one[goes[b, prefix + g] - prefix] for g in gone})
            used = [*range(prefix), *(prefix + stay), *(prefix + width + np.arange(appended))]
            rows[b, : len(used)] = used
        added = [tokens + stage * appended + a for a in range(appended)]
        names = [[*(one[s] for s in stay), *added] for one, stay in zip(names, stays)]
        index.append(rows)
        into.append(goes)
        values.append(rng.random((2, width)).astype(np.float32))
        lengths.append(np.array([prefix + len(one) for one in names]))
    found = decode(np.zeros((2, 3)), lengths, index, values, prefix=prefix, appended=appended,
                   into=into, into_margin=values)  # fmt: skip
    for b in range(2):
        kept, goes = ([stage[b] for stage in some] for some in (found.kept, found.into))
        back = zip(rows_of(kept, tokens, prefix, appended),
                   into_rows(goes, kept, tokens, prefix, appended))  # fmt: skip
        before = tokens
        for stage, (rows, targets) in enumerate(back):
            assert all(goes[stage][one] == other for one, other in wanted[2 * stage + b].items())
            np.testing.assert_array_equal(np.isnan(found.into_margin[stage][b]), goes[stage] == -1)
            np.testing.assert_array_equal(found.into_margin[stage][b], found.scores[stage][b])
            own = index[stage][b]
            kept_rows = own[(own >= 0) & (own < into[stage].shape[1])]
            assert rows.tolist() == kept_rows.tolist()
            assert targets.tolist() == into[stage][b][: prefix + before].tolist()
            before = len(kept[stage]) + appended
