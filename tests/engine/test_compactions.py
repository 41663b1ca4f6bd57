"""Where rows of a dynamic engine really leave: the choice, what it says, and what is built."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations, pairwise

import pytest
import torch
from conftest import raises_one_line

from asvit_deploy import per_picture, sidecar
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.engine import build, compactions
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.compactions import parse_blocks, physical_stages, worthwhile
from asvit_deploy.engine.graphs import make_graph
from asvit_deploy.engine.source import open_source
from asvit_deploy.exporting.export import export
from asvit_deploy.models import build as build_network
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import part_macs
from asvit_deploy.ops import onnx_op
from asvit_deploy.reduction.size_passing import SizePassing

CONFIG = replace(arch("as_deit_mini"), image_size=28).saving()  # 49 tokens, 6 blocks, 3 stages


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network that cuts in five blocks, picture by picture, exported by batch."""
    folder = tmp_path_factory.mktemp("per_picture")
    torch.manual_seed(0)
    model = build_network(CONFIG, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    pictures = open_images(None, CONFIG, limit=10)
    model = model.with_reduction(per_picture.fit(model, SizePassing, [*pictures], 0.65))
    path = folder / "mini.safetensors"
    save_checkpoint(path, model, {"budget": "0.65", "budget_by": "executed"})
    made = {}
    for batch in ("1", "dynamic"):
        made[batch] = folder / f"mini_{batch}.onnx"
        export(load_checkpoint(path), made[batch], pictures, batch)
    return made


def every_subset(stages):
    return chain.from_iterable(combinations(range(stages), n) for n in range(1, stages + 1))


@pytest.mark.parametrize("price", [0, 1e5, 1e6, 1e7, 1e9])
@pytest.mark.parametrize("rows", [(45, 40, 33, 25, 20), (49, 49, 30, 30, 8), (20, 19, 19, 18, 2)])
def test_the_choice_is_the_cheapest_of_all(price, rows):
    cuts = (1, 3, 5, 7, 9)

    def cost(physical):
        total, here = 0.0, float(CONFIG.rows)
        for stage, part in enumerate(pairwise((0, *cuts, 12))):
            here = rows[stage - 1] if stage - 1 in physical else here
            total += part_macs(CONFIG, here, *part)
        return total + price * len(physical)

    chosen = worthwhile(CONFIG, cuts, rows, price)
    assert chosen == sorted(chosen) != []
    assert cost(chosen) == pytest.approx(min(map(cost, every_subset(5))), rel=1e-12)


def test_a_price_decides():
    cuts, rows = (1, 3, 5, 7, 9), (45, 40, 33, 25, 20)
    assert worthwhile(CONFIG, cuts, rows, 0) == [0, 1, 2, 3, 4]
    assert len(worthwhile(CONFIG, cuts, rows, 1e12)) == 1


def test_blocks_as_they_are_written():
    assert parse_blocks("3,6, 9") == (3, 6, 9)
    assert parse_blocks("all") == "all"
    assert parse_blocks(" auto") is None
    raises_one_line(lambda: parse_blocks("3;6"), "--compact-at '3;6' is no list of blocks")


def chosen(path, wanted=None):
    said = []
    return physical_stages(open_source(path), wanted, None, 0, said.append), said


@pytest.mark.slow
def test_by_default_the_graph_decides_and_says_so(files):
    stages, (line,) = chosen(files["dynamic"])
    assert len(stages) == 1  # so small a network saves less than a compaction costs
    assert f"leave for good in block {stages[0]} of 5 with cuts" in line
    assert "--compact-at says otherwise" in line
    graph = make_graph(open_source(files["dynamic"]), "dynamic", None, stages)
    assert len(onnx_op.nodes_of(graph.graph)) == 1
    stages, (line,) = chosen(files["1"])
    assert stages is None
    assert "at each of 5 cuts" in line
    assert "--batch dynamic" in line


@pytest.mark.slow
def test_where_a_compaction_costs_nothing_all_stay(files, monkeypatch):
    monkeypatch.setattr(compactions.worthwhile, "__defaults__", (0.0,))
    assert chosen(files["dynamic"]) == (None, [])


@pytest.mark.slow
def test_what_is_asked_for(files, mini_artifacts):
    assert chosen(files["dynamic"], "all") == (None, [])
    assert chosen(files["dynamic"], (3, 1)) == ([1, 3], [])
    assert chosen(mini_artifacts["dynamic", "auto"]) == (None, [])  # AS-ViT's stages are few
    path = files["dynamic"]
    raises_one_line(lambda: chosen(path, (5,)), "--compact-at 5", "blocks 0,1,2,3,4")
    raises_one_line(lambda: make_graph(open_source(files["1"]), "dynamic", None, [1]),
                    "takes one picture", "--batch dynamic")  # fmt: skip
    for mode in ("padded", "bucketed"):
        options = Options(mode=mode, compact_at=(1,))
        raises_one_line(lambda options=options: build.refuse_misfits(None, options),
                        f"--compact-at does not go with --mode {mode}")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, (1, 3)])
def test_the_engine_has_as_many_compactions(rtx, trt_plugin, files, tmp_path, asked):
    options = Options("fp16", plugin=trt_plugin, target_sms=("86", "120"), checked=False,
                      compact_at=asked)  # fmt: skip
    built = build_engine(open_source(files["dynamic"]), tmp_path / "x.engine", rtx, options)
    fields = sidecar.read(tmp_path / "x.engine")
    assert fields["plugin_layers"] == len(fields["compactions"]) == (2 if asked else 1)
    assert asked is None or fields["compactions"] == [1, 3]
    assert built.warnings == []


@pytest.mark.slow
def test_the_comparison_is_of_what_is_built(rtx, trt_plugin, files, tmp_path):
    lines = []
    options = Options(plugin=trt_plugin, target_sms=("86",), limit=6)
    build_engine(open_source(files["dynamic"]), tmp_path / "x.engine", rtx, options,
                 say=lines.append)  # fmt: skip
    assert any("agrees with PyTorch on 6 images" in line for line in lines)
