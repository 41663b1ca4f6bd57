"""A method chosen by evidence: what decides, who judges, and whether the figures are true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from asvit_deploy.choice import Wanted, choose, chosen
from asvit_deploy.data.images import open_images
from asvit_deploy.distance import distance, measure
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.reduction.baselines import Random
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import TopKNearest
from asvit_deploy.similarity import mean_interval

BASE = replace(arch("as_deit_mini"), image_size=28).saving()  # 49 tokens
CONFIGS = {
    "logits": BASE,
    "one logit": replace(BASE, num_classes=1),
    "embedding": replace(BASE, head="none", num_classes=128, prefix=5),
}
AUTO = Wanted(None, 0.65)


def network(config=BASE):
    """Random weights with peaked attention and well separated classes."""
    torch.manual_seed(0)
    model = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
            block.mlp.fc2.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def images():
    return [*open_images(None, BASE, limit=20)]


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, images):
    """A network, and what `choose` says of it."""
    model = network(CONFIGS[request.param])
    return model, choose(model, images, AUTO)


# --- what decides -------------------------------------------------------------------------------


def apart(*gains):
    """Distances of the first method and of others that are nearer by so much."""
    first = np.linspace(0.5, 1.0, len(gains[0]))
    return {"first": first, **{f"other {i}": first - gain for i, gain in enumerate(gains)}}


def test_a_challenger_wins_only_beyond_chance():
    noise = np.random.default_rng(0).normal(0, 1, 40)
    noise -= noise.mean()
    low = mean_interval(noise, 0.975)[0]
    assert chosen(apart(0.01 * (noise - low * 1.01)))[0] == "other 0"
    name, why = chosen(apart(0.01 * (noise - low * 0.99)))
    assert (name, why) == ("first", "no other is closer to the dense network beyond chance than "
                           "first")  # fmt: skip
    # One challenger of two may win by chance at 95 % each; the intervals are wider for that.
    between = -(low + mean_interval(noise, 0.95)[0]) / 2
    assert mean_interval(noise + between, 0.95)[0] > 0
    assert chosen(apart(noise + between, -np.ones(40)))[0] == "first"


def test_the_interval_is_of_pairs():
    """Pictures differ far more from each other than methods do."""
    first = np.random.default_rng(1).lognormal(0, 2, 30)
    name, why = chosen({"first": first, "other": first - 1e-3})
    assert (name, why) == ("other", "closer to the dense network than first on the pictures that "
                           "choose")  # fmt: skip
    assert chosen({"first": first, "other": first.copy()})[0] == "first", "a tie is no gain"
    assert chosen({"first": first, "other": first + 1e-3})[0] == "first"


def test_of_several_the_nearest_wins():
    small, large = np.full(10, 0.1), np.full(10, 0.2)
    assert chosen(apart(small, large))[0] == "other 1"
    assert chosen(apart(large, small))[0] == "other 0"
    assert chosen(apart(small)) == ("other 0", "closer to the dense network than first on the "
                                    "pictures that choose")  # fmt: skip
    assert chosen({"alone": np.ones(10)}) == ("alone", "asked for")


# --- who judges ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_picture_that_chose_judges(images):
    """Every second picture chooses: others leave its figures, and thresholds, as they are."""
    model, noise = network(), np.random.default_rng(0).normal(size=(20, *images[0].shape))
    noise = [*noise.astype(np.float32)]
    plain = choose(model, images, AUTO).report
    assert (plain["images"], plain["choosing_images"], plain["judging_images"]) == (20, 10, 10)
    judges = choose(model, [n if i % 2 else x for i, (x, n) in enumerate(zip(images, noise))],
                    AUTO).report  # fmt: skip
    choosers = choose(model, [x if i % 2 else n for i, (x, n) in enumerate(zip(images, noise))],
                      AUTO).report  # fmt: skip
    assert judges["method"] == plain["method"]
    assert judges["thresholds"]["values"] == plain["thresholds"]["values"]
    assert choosers["thresholds"]["values"] != plain["thresholds"]["values"]
    for name, row in plain["methods"].items():
        assert judges["methods"][name]["choosing_distance"] == row["choosing_distance"]
        assert judges["methods"][name]["distance"] != row["distance"]
        assert judges["methods"][name]["agreement"] != row["agreement"]
        assert choosers["methods"][name]["distance"] == row["distance"]
        assert choosers["methods"][name]["agreement"] == row["agreement"]
        assert choosers["methods"][name]["choosing_distance"] != row["choosing_distance"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "choose_"), [(8, 4), (9, 5), (128, 64), (130, 44), (200, 50)])
def test_few_choose_and_all_others_judge(count, choose_):
    config = replace(BASE, depth=2, stages=(1,))
    pictures = np.random.default_rng(0).normal(size=(count, 3, 28, 28)).astype(np.float32)
    report = choose(network(config), [*pictures], Wanted(Random, 0.75)).report
    assert (report["choosing_images"], report["judging_images"]) == (choose_, count - choose_)


def test_too_few_pictures(images):
    with pytest.raises(UserError, match="7 images are too few to calibrate on; give at least 8"):
        choose(network(), images[:7], AUTO)


# --- figures ------------------------------------------------------------------------------------


@torch.inference_mode()
def carried_out(model, reduction, images):
    """Outputs [P, C] and rows behind each cut [P, stages] of the network itself."""
    outputs, lengths = [], []
    for image in images:
        output, trace = model.with_reduction(reduction)(torch.from_numpy(image)[None])
        outputs.append(output[0].double().numpy())
        lengths.append([int(n) for n in trace.length])
    return np.array(outputs), np.array(lengths, np.int64)


def by_hand(config, dense, other):
    """The distance of each picture."""
    if config.output == "embedding":
        cosine = (dense * other).sum(1)
        return 1 - cosine / np.linalg.norm(dense, axis=1) / np.linalg.norm(other, axis=1)
    if config.num_classes == 1:
        return abs(dense - other)[:, 0]
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (dense, other))
    return (p * np.log(p / q)).sum(1)


@pytest.mark.slow
def test_the_figures_are_the_network_s_own(made, images):
    model, found = made
    config, report = model.config, found.report
    assert report["measure"] == {"embedding": "1 - cosine"}.get(
        config.output, "KL" if config.num_classes > 1 else "|difference|"
    )
    assert set(report["methods"]) == {"size-passing", "tome", "topk-nearest", "random"}
    assert not report["per_picture"]
    assert found.reduction.kept is not None
    assert found.reduction.name == report["method"]
    judging = images[1::2]
    dense = carried_out(model, None, judging)[0]
    output, lengths = carried_out(model, found.reduction, judging)
    own = report["methods"][report["method"]]
    assert own["distance"]["mean"] == pytest.approx(by_hand(config, dense, output).mean(), rel=1e-5)
    assert own["behind_chosen"] == {"mean": 0, "low": 0, "high": 0}
    macs = model_macs(config, list(lengths.T.astype(float)), found.reduction.cuts)
    share = float(np.mean(macs)) / teacher_macs(config)
    assert share == pytest.approx(0.65, rel=0.01)
    assert report["macs_ratio"] == own["macs_ratio"] == pytest.approx(share)
    kept = [k["mean"] for k in report["kept_tokens"]]
    assert kept == (lengths - config.prefix).mean(0).tolist()
    if config.output == "logits" and config.num_classes > 1:
        same = (dense.argmax(1) == output.argmax(1)).mean()
        assert report["agreement"]["top1"] == pytest.approx(same)
    assert report["agreement"] == own["agreement"]
    for row in report["methods"].values():
        assert row["distance"]["low"] <= row["distance"]["mean"] <= row["distance"]["high"]
        assert row["macs_ratio"] == pytest.approx(0.65, rel=0.01), "equal MACs"


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_figures_picture_by_picture(kind, images):
    model = network(CONFIGS[kind])
    config = model.config
    found = choose(model, images, replace(AUTO, method=SizePassing, per_picture=True))
    report, thresholds = found.report, found.report["thresholds"]
    assert report["per_picture"]
    assert found.reduction.kept is None
    assert [b.item() for b in found.reduction.boundaries()] == thresholds["values"]
    judging = images[1::2]
    dense = carried_out(model, None, judging)[0]
    output, lengths = carried_out(model, found.reduction, judging)
    apart = by_hand(config, dense, output)
    assert thresholds["distance"]["mean"] == pytest.approx(apart.mean(), rel=1e-5)
    macs = model_macs(config, list(lengths.T.astype(float)), found.reduction.cuts)
    share = float(np.mean(macs)) / teacher_macs(config)
    assert report["macs_ratio"] == thresholds["macs_ratio"] == pytest.approx(share)
    assert thresholds["drift"] == pytest.approx(share / 0.65 - 1)
    assert len(set(lengths[:, -1])) > 1, "pictures keep other numbers"
    kept = [(k["min"], k["max"]) for k in report["kept_tokens"]]
    wanted = zip((lengths - config.prefix).min(0), (lengths - config.prefix).max(0))
    assert kept == list(wanted)
    fixed = report["methods"]["size-passing"]["distance"]["mean"]
    assert thresholds["gain"]["mean"] == pytest.approx(fixed - apart.mean(), abs=1e-6)


def test_distance_of_equal_outputs_is_none_and_measures_have_names():
    outputs = torch.randn(5, 128)
    for config in (BASE, CONFIGS["embedding"]):
        assert distance(config, outputs, outputs) == pytest.approx(0, abs=1e-12)
    assert [measure(config) for config in CONFIGS.values()] == ["KL", "|difference|", "1 - cosine"]
    with pytest.raises(UserError, match="zero or not finite on 5 of 5 pictures"):
        distance(CONFIGS["embedding"], outputs, 0 * outputs)


# --- what is asked for --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_method_asked_for_is_taken_whatever_others_reach(images):
    report = choose(network(), images, Wanted(ToMe, 0.7, (1, 3))).report
    assert (report["method"], report["why"], report["blocks"]) == ("tome", "asked for", [1, 3])
    assert set(report["methods"]) == {"tome", "random"}
    assert report["thresholds"]["macs_ratio"] == pytest.approx(0.7, rel=0.05)


@pytest.mark.slow
def test_methods_out_of_reach_are_passed_over_and_named(images):
    """Size-passing and ToMe keep every second token at least."""
    report = choose(network(), images, Wanted(None, 0.4)).report
    assert report["method"] == TopKNearest.name
    assert set(report["methods"]) == {"topk-nearest", "random"}
    assert set(report["out_of_reach"]) == {"size-passing", "tome"}
    assert all("budget 0.4 is out of reach" in line for line in report["out_of_reach"].values())
    with pytest.raises(UserError, match=r"budget 0\.01 is out of reach of size-passing"):
        choose(network(), images, Wanted(None, 0.01))


@pytest.mark.slow
def test_pictures_that_no_threshold_parts_still_get_fixed_counts():
    """Black pictures, whose scores are all alike."""
    pictures = [np.zeros((3, 28, 28), np.float32)] * 8
    model = network()
    with torch.no_grad():
        model.pos_embed.zero_()
    found = choose(model, pictures, AUTO)
    assert found.report["thresholds"] is None
    assert "cannot be met within 1 %" in found.report["no_thresholds"]
    assert found.reduction.kept is not None
    assert found.report["macs_ratio"] == pytest.approx(0.65, rel=0.01)
    with pytest.raises(UserError, match="cannot be met within 1 % with these images"):
        choose(model, pictures, replace(AUTO, per_picture=True))


@pytest.mark.slow
def test_progress_reaches_its_end(images):
    seen: list[tuple[int, int]] = []
    choose(network(), images[:8], Wanted(TopKNearest, 0.7), lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
