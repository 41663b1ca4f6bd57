"""Heads that average tokens, where some leave: each counts as often as it stands for others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints.load import save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.heads import HEADS
from asvit_deploy.reduction.removal import remove
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe

MEANS = ("mean", "mean_norm", "class_and_mean")
METHODS = (SizePassing, ToMe)
each = pytest.mark.parametrize(
    ("head", "method"), [(head, method) for head in MEANS for method in METHODS],
    ids=lambda value: value if isinstance(value, str) else value.name,
)  # fmt: skip


def network(head, method, kept=(35, 22, 15), prefix=3, **traits):
    config = replace(arch("as_deit_mini"), stem="patch", depth=4, stages=(1, 2, 3), image_size=28,
                     num_classes=20, head=head, prefix=prefix, **traits)  # fmt: skip
    torch.manual_seed(0)
    model = build(config, reduction=method((0, 1, 2), kept, prefix)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
            block.mlp.fc2.weight.mul_(4)
    for boundary in model.reduction.boundaries():
        boundary.data.fill_({"tome": 0.5, "size-passing": 0.01}[method.name])
    return model


@torch.no_grad()
def last_rows(model, image):
    """The rows behind the last block, of one image, and how many tokens each stands for."""
    rows = Rows(model.embed(image[None])[0])
    for stage in range(len(model.cuts)):
        rows, decision = model.scored(stage, rows)
        rows, _ = remove(model.reduction, stage, rows, decision, padded=False)
    return model.segment(len(model.cuts), rows)[0]


@each
@pytest.mark.parametrize("kept", [(35, 22, 15), None], ids=["fixed", "per picture"])
@torch.no_grad()
def test_masked_form_batches_and_single_images_agree(head, method, kept):
    model, images = network(head, method, kept), torch.randn(4, 3, 28, 28)
    alone = torch.cat([model(image[None])[0] for image in images])
    batch, trace = model(images)
    masked, _, masks = model.forward_masked(images)
    torch.testing.assert_close(batch, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked, alone, rtol=1e-5, atol=1e-5)
    assert (masks[-1].sum(1) + 3).tolist() == trace.length[-1].tolist()
    if kept is None:
        assert len(set(trace.length[-1].tolist())) > 1, "rows pad the batch"


@each
@torch.no_grad()
def test_the_mean_is_one_over_the_tokens_of_the_input(head, method):
    """By hand: every last token as often as tokens of the input became it."""
    model = network(head, method)
    for image in torch.randn(3, 3, 28, 28):
        rows = last_rows(model, image)
        size = rows.size[0, 3:]
        assert size.sum() == 49
        assert size.max() > 2
        tokens = rows.batched[0]
        normed = tokens if head == "mean_norm" else model.norm(tokens)
        repeated = torch.cat([normed[3 + i].expand(int(n), -1) for i, n in enumerate(size)])
        mean = repeated.double().mean(0).float()
        read = {"mean_norm": model.norm(mean), "class_and_mean": torch.cat([normed[0], mean])}
        wanted = model.head(read.get(head, mean))
        torch.testing.assert_close(model(image[None])[0][0], wanted, rtol=1e-4, atol=1e-5)
        every = normed[3:].mean(0)
        assert (every - mean).abs().max() > 1e-3, "which is another than the plain mean"


@each
@torch.no_grad()
def test_sizes_bring_the_output_nearer_to_the_dense_one(head, method):
    """Photographs, whose even parts go together; weighted against the plain mean."""
    model = network(head, method)
    dense, apart = model.with_reduction(None), {"sizes": 0.0, "plain": 0.0}
    for image in open_images(None, model.config, limit=12):
        image = torch.from_numpy(image)
        wanted = dense(image[None])[0]
        rows = last_rows(model, image)
        normed = rows if head == "mean_norm" else replace(rows, tokens=model.norm(rows.tokens))
        batched = replace(normed, tokens=normed.batched)
        for name, given in (("sizes", batched), ("plain", replace(batched, size=None))):
            found = HEADS[head].read(model, given, 3)
            apart[name] += float((found - wanted).norm())
    assert apart["sizes"] < 0.95 * apart["plain"], apart


@torch.no_grad()
def test_half_precision_holds_many_tokens():
    """Shares are worked out before tokens are added up: no sum leaves float16."""
    model = network("mean", SizePassing).half()
    tokens = torch.full((1, 3 + 40, 128), 100.0, dtype=torch.float16)
    size = torch.full((1, 3 + 40), 90.0)
    mean = HEADS["mean"].read(model, Rows(tokens, size=size), 3)
    plain = model.head(tokens[:, 3])
    torch.testing.assert_close(mean, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_from_export_to_check(cli, tmp_path):
    """A head that averages, with sizes, through the sidecar, and calibrated by evidence."""
    model = network("mean_norm", ToMe, prefix=1, name="vit_128x4_patch4").with_reduction(None)
    save_checkpoint(tmp_path / "mae.safetensors", model, {})
    done = cli("export", "--ckpt", "mae.safetensors", "--method", "tome", "--batch", "dynamic",
               "-o", "m.onnx")  # fmt: skip
    assert done.code == 0, done.err
    fields = json.loads(Path("m.onnx.json").read_text())
    assert (fields["reduction"]["name"], fields["last_block"], fields["mode"]) == (
        "tome", "all", "static",
    )  # fmt: skip
    checked = cli("check", "m.onnx", "--limit", 6, "--json")
    assert checked.code == 0, checked.err
    parity = json.loads(checked.out)[0]["parity"]
    assert parity["passed"]
    made = fixed_counts(model.config, ToMe, 0.65)
    assert fields["reduction"]["kept"] == list(made.kept)
    made = cli("calibrate", "--ckpt", "mae.safetensors", "--limit", 8, "--per-picture", "--json")
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert report["per_picture"]
    assert set(report["methods"]) == {"size-passing", "tome", "topk-nearest", "random"}
    done = cli("export", "--ckpt", "mae.calibrated.safetensors", "-o", "c.onnx")
    assert done.code == 0, done.err
    assert cli("check", "c.onnx", "--limit", 6).code == 0
