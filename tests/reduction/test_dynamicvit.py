"""DynamicViT: by hand, in every form, and the MACs that its release states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from by_hand import STAGES, network, same_in_all_forms

from asvit_deploy.budget import carried_out
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import fixed_lengths, model_macs
from asvit_deploy.reduction.dynamicvit import DynamicViT, published_counts
from asvit_deploy.reduction.methods import METHODS, restored
from asvit_deploy.reduction.rows import Rows

PICTURES = (4, 3, 112, 112)
DIM = 192


def made(kept=STAGES[1], prefix=1, most=None):
    """A network whose predictors tell tokens apart."""
    model = network(
        lambda blocks, kept, prefix: DynamicViT(blocks, kept, prefix, most, dim=DIM),
        prefix, STAGES[0], kept,
    )  # fmt: skip
    with torch.no_grad():
        for predictor in model.reduction.predictors:
            predictor.out_conv[4].weight.mul_(30)
    return model


@torch.no_grad()
def p_keep(predictor, x):
    """(1) to (3) of one picture's image tokens [N, C], in float64."""
    state = {name: value.double() for name, value in predictor.state_dict().items()}
    norm = F.layer_norm(x, (DIM,), state["in_conv.0.weight"], state["in_conv.0.bias"])
    z = F.gelu(norm @ state["in_conv.1.weight"].T + state["in_conv.1.bias"])
    half = DIM // 2
    z = torch.cat([z[:, :half], z[:, half:].mean(0).expand(len(x), half)], 1)
    for layer in (0, 2, 4):
        z = z if layer == 0 else F.gelu(z)
        z = z @ state[f"out_conv.{layer}.weight"].T + state[f"out_conv.{layer}.bias"]
    return z.softmax(1)[:, 0]


@torch.no_grad()
def by_hand(model, image, keeps):
    """Logits [C] of one picture and the rows that stay at each cut; `keeps(p, stage)` says which
    image tokens do."""
    method, prefix, x = model.reduction, model.config.prefix, model.embed(image[None])[0]
    indices = []
    for number, block in enumerate(model.blocks):
        if number in method.blocks:
            stage = method.blocks.index(number)
            p = p_keep(method.predictors[stage], x[prefix:].double())
            rows = [*range(prefix), *(prefix + token for token in sorted(keeps(p, stage)))]
            indices.append(rows)
            x = x[rows]
        rows = block.attend(Rows(x))[0]
        x = block.feed(rows).tokens
    return model.classify(Rows(x))[0], indices


@pytest.mark.parametrize("prefix", [1, 3])
def test_the_highest_stay(prefix):
    model = made(prefix=prefix)

    def keeps(p, stage):
        return p.argsort(descending=True)[: STAGES[1][stage]].tolist()

    for image in torch.randn(3, 3, 112, 112):
        wanted, indices = by_hand(model, image, keeps)
        logits, trace = model(image[None])
        assert [index[0].tolist() for index in trace.index] == indices
        torch.testing.assert_close(logits[0], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_by_a_threshold_those_of_a_higher_p_keep_stay():
    model, thetas = made(None), (0.4, 0.5, 0.6)
    for boundary, theta in zip(model.reduction.boundaries(), thetas):
        boundary.fill_(theta / (1 - theta))

    def keeps(p, stage):
        above = (p > thetas[stage]).nonzero().flatten().tolist()
        return above or [int(p.argmax())]

    lengths = set()
    for image in torch.randn(6, 3, 112, 112):
        wanted, indices = by_hand(model, image, keeps)
        logits, trace = model(image[None])
        assert [index[0].tolist() for index in trace.index] == indices
        torch.testing.assert_close(logits[0], wanted, rtol=1e-4, atol=1e-5)
        lengths.add(tuple(map(len, indices)))
    assert len(lengths) > 1


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize(("kept", "most"), [(STAGES[1], None), (None, None), (None, (40, 25, 20))])
def test_all_forms_agree(prefix, kept, most):
    model = made(kept, prefix, most)
    same_in_all_forms(model, torch.randn(PICTURES))


def test_predictors_and_thresholds_learn_through_the_mask():
    model = made(None).train()
    logits, _, masks = model.forward_masked(torch.randn(PICTURES))
    (logits.square().sum() + sum(mask.mean() for mask in masks)).backward()
    silent = [name for name, one in model.reduction.named_parameters()
              if one.grad is None or not one.grad.abs().sum()]  # fmt: skip
    assert silent == []


# With the predictors; LV-ViT-S at 0.5 is stated as 3.7 and comes to 3.81, which is not within 3 %.
@pytest.mark.parametrize(
    ("name", "rate", "published"),
    [("as_deit_small", 0.7, 2.9), ("as_lvvit_s", 0.7, 4.6), ("as_lvvit_m", 0.7, 8.5)],
)
def test_published_macs(name, rate, published):
    config = arch(name)
    blocks = DynamicViT.usual_blocks(config.stages, config.depth)
    method = DynamicViT.planned(config.dim, config.prefix, blocks, published_counts(196, 3, rate))
    assert method.kept == (137, 96, 67)
    whole = carried_out(config, method) / 1e9
    assert whole == pytest.approx(published, rel=0.03)
    network_alone = model_macs(config, fixed_lengths(config, method), method.cuts) / 1e9
    assert network_alone == pytest.approx(published, rel=0.01)


def test_its_fields_restore_it():
    method = made(None, most=(30, 20, 10)).reduction
    again = restored(method.fields(), 1)
    assert type(again) is METHODS["dynamicvit"]
    assert again.fields() == method.fields()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in method.state_dict().items()
    }
    for wrong in ({"dim": 0}, {"dim": "192"}, {"kept": [1]}):
        with pytest.raises(ValueError, match=r"no width|do not fit|no reduction"):
            restored({**method.fields(), **wrong}, 1)
    with pytest.raises(ValueError, match="dim"):
        restored({"name": "dynamicvit", "blocks": [1, 3, 4], "kept": None}, 1)


def test_what_it_learned_goes_over_to_other_counts():
    first, other = made().reduction, DynamicViT(STAGES[0], None, dim=DIM)
    other.taught_by(first)
    for name, value in first.predictors.state_dict().items():
        assert torch.equal(other.predictors.state_dict()[name], value)
    assert [one.item() for one in other.boundaries()] == [1, 1, 1]
