"""Thresholds for any method that ranks: the budget, the bound, and what cannot be met."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from asvit_deploy import per_picture
from asvit_deploy.budget import fixed_counts
from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.reduction.bat import BAT
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import EViT, TopKNearest

MINI = replace(arch("as_deit_mini"), image_size=28).saving()  # 49 tokens
METHODS = (SizePassing, ToMe, TopKNearest, EViT)


def network(config=MINI):
    torch.manual_seed(0)
    model = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def images():
    return [*open_images(None, MINI, limit=10)]


@torch.inference_mode()
def lengths_of(model, reduction, images):
    """Rows behind each cut, prefix included, int64 [P, stages]."""
    adaptive = model.with_reduction(reduction)
    traces = [adaptive(torch.from_numpy(image)[None])[1] for image in images]
    return np.array([[int(n) for n in trace.length] for trace in traces])


def share(config, lengths, reduction):
    macs = model_macs(config, list(lengths.T.astype(float)), reduction.cuts)
    return float(np.mean(macs)) / teacher_macs(config)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("budget", [0.55, 0.65, 0.8])
def test_the_budget_is_met_on_what_was_fitted(images, method, budget):
    model, ticks = network(), []
    made = per_picture.fit(model, method, images, budget, progress=lambda: ticks.append(1))
    lengths = lengths_of(model, made, images)
    assert share(MINI, lengths, made) == pytest.approx(budget, rel=0.01)
    assert len(ticks) == len(images)
    assert len(set(lengths[:, 0])) > 1, "pictures keep other numbers"
    # Each cut keeps on average what fixed counts of the same budget would.
    plan = fixed_counts(MINI, method, budget)
    np.testing.assert_allclose(lengths.mean(0) - 1 - made.appends, plan.kept, rtol=0.1, atol=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, made in RANKED.items() if made.adapts])
def test_every_method_with_thresholds_and_other_cuts(images, name):
    model = network(replace(MINI, prefix=3))
    made = per_picture.fit(model, RANKED[name], images, 0.7, (1, 3))
    assert made.cuts == (3, 7)
    lengths = lengths_of(model, made, images)
    assert share(model.config, lengths, made) == pytest.approx(0.7, rel=0.01)


@pytest.mark.parametrize("method", [BAT, RANKED["random"]])
def test_a_method_without_thresholds(images, method):
    with pytest.raises(UserError, match=f"^{method.name} keeps as many tokens of every picture: it "
                       "has no thresholds to fit; drop --per-picture$"):  # fmt: skip
        per_picture.fit(network(), method, images, 0.65)


# --- max_kept -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("prefix", [1, 3])
def test_max_kept_bounds_every_picture(images, method, prefix):
    """Noise too, on which thresholds that photographs fitted let more through."""
    config = replace(MINI, prefix=prefix)
    model = network(config)
    noise = np.random.default_rng(0).normal(size=(8, 3, 28, 28)).astype(np.float32)
    pictures = [*images, *noise, *(30 * noise[:4])]
    free = lengths_of(model, per_picture.fit(model, method, images, 0.7), pictures)
    bound = int(free[:, -1].max()) - 1
    made = per_picture.fit(model, method, images, 0.7, max_kept=bound)
    assert share(config, lengths_of(model, made, images), made) == pytest.approx(0.7, rel=0.01)
    lengths = lengths_of(model, made, pictures)
    assert lengths[:, -1].max() <= bound
    assert (lengths - prefix - made.appends <= np.array(made.most)).all(), "at every cut"
    with torch.inference_mode():  # in a batch, where rows pad, as alone
        batch = torch.from_numpy(np.stack(pictures[:6]))
        trace = model.with_reduction(made)(batch)[1]
    assert torch.stack(trace.length, 1).tolist() == lengths[:6].tolist()


def test_bounds_fall_by_one_ratio_and_end_at_the_bound():
    plan = fixed_counts(MINI, TopKNearest, 0.65)
    assert per_picture.bounds(MINI, plan, 50) == [49] * 5
    found = per_picture.bounds(MINI, plan, 11)
    assert found == [round(49 * (10 / 49) ** (s / 5)) for s in (1, 2, 3, 4, 5)]
    evit = fixed_counts(MINI, EViT, 0.7)
    assert per_picture.bounds(MINI, evit, 20)[-1] == 18, "the prefix and the fused row beside it"


@pytest.mark.parametrize(
    ("method", "prefix", "bound", "words"),
    [(SizePassing, 1, 1, "leaves no image token beside the 1 row that always stay"),
     (SizePassing, 5, 5, "leaves no image token beside the 5 rows that always stay"),
     (EViT, 1, 2, "leaves no image token"),
     # Every second token stays at each cut, whatever is asked for.
     (SizePassing, 1, 2, "out of reach of size-passing, which keeps 25 rows behind its last of 1"),
     (ToMe, 1, 10, "out of reach of tome, which keeps 25 rows")],
)  # fmt: skip
def test_a_bound_out_of_reach(method, prefix, bound, words):
    config = replace(MINI, prefix=prefix)
    plan = fixed_counts(config, method, 0.8, (1,) if words.startswith("out") else None)
    with pytest.raises(UserError, match=f"^--max-kept {bound} .*{words}") as error:
        per_picture.bounds(config, plan, bound)
    assert "\n" not in str(error.value)


def test_a_bound_under_the_mean(images):
    plan = fixed_counts(MINI, TopKNearest, 0.65)
    with pytest.raises(UserError, match=f"is no more than the {plan.kept[-1] + 1} rows that this "
                       "budget keeps on average behind the last cut"):  # fmt: skip
        per_picture.fit(network(), TopKNearest, images, 0.65, max_kept=plan.kept[-1] + 1)


# --- what cannot be met -------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_of_two_scores_cannot_meet_every_budget():
    """One threshold moves many equal tokens at once: refused, not missed in silence."""
    flat = [np.full((3, 28, 28), value, np.float32) for value in np.repeat([0.0, 1.0], 4)]
    model = network()
    with torch.no_grad():
        model.pos_embed.zero_()
    with pytest.raises(UserError, match="cannot be met within 1 % with these images"):
        per_picture.fit(model, TopKNearest, flat, 0.63)
    with pytest.raises(UserError, match=r"with --max-kept 48 and these images.*pass more"):
        per_picture.fit(model, TopKNearest, flat, 0.63, max_kept=48)


@pytest.mark.slow
def test_a_cut_at_which_nothing_may_leave():
    """Of a lone token behind the cuts before, every picture keeps it."""
    config = replace(MINI, image_size=8, depth=8, stages=(1, 2, 3))  # 4 tokens
    pictures = [*np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)]
    model = network(config)
    plan = SizePassing(range(7), [2, 1, 1, 1, 1, 1, 1])
    floor = share(config, np.array([[3, 2, 2, 2, 2, 2, 2]]), plan)
    made = per_picture.fit(model, SizePassing, pictures, floor * 1.005)
    lengths = lengths_of(model, made, pictures)
    assert share(config, lengths, made) == pytest.approx(floor, rel=0.015)
    assert (lengths[:, -1] == 2).all()
