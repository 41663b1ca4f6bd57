"""What the parts of `scripts/gpu_suite` measure and judge, over host memory."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from asvit_deploy.data.images import open_images
from asvit_deploy.models.archs import arch
from asvit_deploy.ops import trt_library
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners import torch_stages
from asvit_deploy.runners.pytorch import TorchRunner
from gpu_parts import (
    agreement,
    calls,
    cut_cost,
    methods_agreement,
    networks,
    packed,
    plugin,
    speed,
)
from gpu_parts import prepare as preparing
from gpu_parts import prepare_data as data
from gpu_parts.child import clean
from gpu_parts.kit import FailPart, Kit, SkipPart, target
from gpu_parts.run import _targets

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def prepared(compiler, trt_headers, tmp_path_factory) -> Path:
    """As much of a prepared folder as a rehearsal of these parts needs."""
    root = tmp_path_factory.mktemp("parts")
    (root / "data").mkdir()
    shelf = preparing.Shelf(root)
    preparing._host_code(shelf, lambda _: None, ROOT)
    data.write_networks(root / "data", [data.REHEARSED])
    data.write_cases(root / calls.CASES)
    manifest = {"host": shelf.host, "device": {}, "data": {}, "missing": {"device switch": "why"}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def kit(prepared, tmp_path, monkeypatch) -> Kit:
    made = Kit(prepared, tmp_path, rehearse=True)
    monkeypatch.setenv("ASVIT_KERNEL", str(made.file("kernel")))
    return made


@pytest.fixture(scope="module")
def mini(prepared, tmp_path_factory) -> networks.Network:
    return networks.load(Kit(prepared, tmp_path_factory.mktemp("kit"), rehearse=True), "mini_56")


# ---------------------------------------------------------------- what is prepared


def test_pictures_are_the_same_bits_as_read_anew():
    config = arch("as_deit_small")
    stored = networks.normalised(data.uint8_pictures(config, 3), config)
    images = open_images(None, config, limit=3)
    assert np.array_equal(stored, images.batch(range(3)))


@pytest.mark.slow
def test_kept_rows_are_those_of_the_reference(mini):
    lengths = [TorchRunner(mini.model)(picture[None]).lengths for picture in mini.pictures]
    assert np.array_equal(np.concatenate(lengths, 1), mini.kept)
    assert len(set(mini.kept[0])) > 1, "the pictures differ in what they keep"
    assert np.all(np.diff(mini.kept, axis=0) <= 0)


@pytest.mark.slow
def test_cases_are_those_of_every_other_form(prepared):
    from asvit_deploy.ops.cases import CASES

    stored = calls.stored_calls(prepared, 0)
    assert [call.name for call in stored] == [case.name for case in CASES]
    for call, case in zip(stored, CASES, strict=True):
        assert call.tokens.shape == case.tokens.shape
        assert call.prefix == case.prefix
        assert np.array_equal(call.scores, case.scores, equal_nan=True)
        assert np.float32(call.threshold) == np.float32(case.threshold) or case.threshold != (
            case.threshold
        )


def test_what_was_not_prepared_is_skipped_with_the_reason(prepared, tmp_path):
    with pytest.raises(SkipPart, match="switch was not prepared: why"):
        Kit(prepared, tmp_path).file("switch")


# ---------------------------------------------------------------- the plugin


def library(kit: Kit, tmp_path: Path, file: str, right: str, wrong: str) -> Path:
    """The plugin over host memory with one mistake."""
    sources = trt_library.sources_dir()
    text = (sources / file).read_text()
    assert right in text
    for path in sources.rglob("*"):
        if path.suffix in (".h", ".cuh", ".cpp"):
            copied = tmp_path / path.relative_to(sources)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(path.read_text())
    (tmp_path / file).write_text(text.replace(right, wrong))
    headers = trt_library.find_trt_headers()
    command = trt_library.compile_command(headers, "library.cpp", ("host",), None)
    command = [word.replace(str(sources), str(tmp_path)) for word in command]
    made = tmp_path / "wrong.so"
    done = subprocess.run([*command, "-o", made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


PLUGIN = "threshold_compact_plugin.cpp"
ARGUMENTS = "PluginTensorDesc const*, int32_t"
CHANGE = "int32_t ThresholdCompactPlugin::onShapeChange"
MISTAKES = {
    "size is always 32 bits wide": (
        plugin.contexts, PLUGIN, "DataType::kINT64 ? 8 : 4;", "DataType::kINT64 ? 4 : 4;",
    ),
    "more rows than can be counted are taken": (
        plugin.contexts, "kernels/threshold_compact.h", "kASVIT_MAX_ROWS = 4096;",
        "kASVIT_MAX_ROWS = 9999;",
    ),
    "shapes may not change": (
        plugin.contexts, PLUGIN, f"{CHANGE}(",
        f"{CHANGE}({ARGUMENTS}, {ARGUMENTS}) noexcept {{ return 1; }}\nint32_t right(",
    ),
    "a context gets no clone": (
        plugin.contexts, PLUGIN, "noexcept { return clone(); }", "noexcept { return nullptr; }",
    ),
    "equal scores pass": (
        plugin.oracle, "kernels/threshold_compact.cuh", "return score > threshold;",
        "return score >= threshold;",
    ),
    "none may be left": (
        plugin.graph_capture, "kernels/threshold_compact.cuh", "prefix + (above > 0 ? above : 1)",
        "prefix + above",
    ),
    "the class token is taken for the whole prefix": (
        plugin.oracle, PLUGIN, "call.rows - inputDesc[kSCORES].dims.d[1];", "1;",
    ),
    "one row stands for the whole prefix": (
        plugin.graph_capture, "kernels/threshold_compact_host.cpp", "static_cast<Row>(row);", "0;",
    ),
    "scores that leave no prefix are taken": (
        plugin.contexts, PLUGIN, "scores >= 1 && (rows == -1 || scores < rows)", "scores >= 1",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_of_the_plugin_fails_its_part(kit, tmp_path, mistake, monkeypatch):
    part, file, right, wrong = MISTAKES[mistake]
    files = {"plugin": library(kit, tmp_path, file, right, wrong), "driver": kit.file("driver")}
    monkeypatch.setattr(kit, "file", files.__getitem__, raising=False)
    with pytest.raises(FailPart) as error:
        part(kit)
    assert "\n" not in error.value.reason


@pytest.mark.slow
def test_right_plugin_passes_with_both_sizes(kit):
    done = plugin.contexts(kit)
    assert done["size_32_bits"] == done["size_64_bits"]
    assert min(done["size_64_bits"].values()) > 0
    assert plugin.oracle(kit)["calls"] > 200


@pytest.mark.slow
def test_oracle_covers_the_ranges_of_the_design(prepared, tmp_path):
    images, rows, widths, kinds = (set() for _ in range(4))
    for portion in plugin.oracle_calls(Kit(prepared, tmp_path)):
        for call in portion:
            b, m, d = call.tokens.shape
            images.add(b), rows.add(m), widths.add(d), kinds.add(call.kind)
    assert {1, 2, 8, 64, 256} <= images
    assert {2, 197, 577, 4096} <= rows
    assert {64, 192, 384, 768} <= widths
    assert kinds == {0, 1, 2}


def test_chains_end_in_padded_rows_and_in_the_least(prepared):
    chained = [chain for kind in range(3) for chain in calls.chains(prepared, kind)]
    assert all(len(chain) == 3 for chain in chained)
    assert any(np.isneginf(call.scores).any() for chain in chained for call in chain[1:])
    assert any(chain[2].tokens.shape[1] < chain[0].tokens.shape[1] for chain in chained)


def test_missed_target_is_a_figure(kit, monkeypatch):
    """Time stands still on the emulated device: a share of 1, and 5 us a call."""
    assert speed.speed(kit)["us_a_call"] == target(5.0, 10.0, at_most=True)
    monkeypatch.setattr(speed, "COPY_SHARE", 1.01)
    done = speed.speed(kit)
    assert done["share_of_a_copy"]["met"] is False
    assert _targets({"a": [{"b": done["share_of_a_copy"]}]}) == {"a.0.b": done["share_of_a_copy"]}


# ---------------------------------------------------------------- networks


def test_wrong_candidate_fails_agreement(kit, monkeypatch):
    real = torch_stages.TorchStages

    def wrong(model, *args, **kwargs):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.head.weight.mul_(1.1)
        return real(changed, *args, **kwargs)

    monkeypatch.setattr(torch_stages, "TorchStages", wrong)
    monkeypatch.setattr(agreement, "_RUNS", (("float32", 8),))
    with pytest.raises(FailPart, match=r"mini_56, float32, B = 8: logits differ") as error:
        agreement.agreement(kit)
    assert error.value.result["runs"][0]["images"] == 8


def test_batches_keep_what_each_picture_keeps_alone(kit, mini):
    buckets = (64, 128, mini.rows)
    stages = torch_stages.TorchStages(mini.model, buckets, batch=8)
    batch = agreement.Batches(stages, 3, buckets)(mini.pictures[:8])
    assert np.array_equal(np.stack(batch.lengths), mini.kept[:, :8])


@pytest.mark.slow
def test_method_that_keeps_others_fails_its_part(kit, tmp_path, monkeypatch):
    checkpoint = data._checkpoint(ROOT)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), np.uint8)
    np.save(tmp_path / "pictures.npy", pixels)
    files = {"checkpoint": checkpoint, "model_pictures": tmp_path / "pictures.npy"}
    monkeypatch.setattr(Kit, "file", lambda self, role: files[role])
    monkeypatch.setattr(methods_agreement, "RANKED", {"topk": RANKED["topk"]})
    monkeypatch.setattr(methods_agreement, "PER_PICTURE", ())
    assert len(methods_agreement.methods_agreement(kit)["runs"]) == 4

    class Other(methods_agreement.InItsType):
        def __init__(self, model):
            lowest = RANKED["min-k"](
                model.reduction.blocks, model.reduction.kept, model.config.prefix
            )
            super().__init__(model.with_reduction(lowest))

    monkeypatch.setattr(methods_agreement, "InItsType", Other)
    with pytest.raises(FailPart, match=r"topk, float32, B = 1: .* tokens? flipped"):
        methods_agreement.methods_agreement(kit)


def test_packed_attention_with_wrong_borders_fails(kit, monkeypatch):
    right = packed._one_by_one

    def wrong(q, k, v, borders, most):
        return right(q, k, v, torch.tensor([0, len(q)]), most)

    monkeypatch.setattr(packed, "_one_by_one", wrong)
    with pytest.raises(FailPart, match="logits differ from the reference"):
        packed.packed(kit)


@pytest.mark.parametrize("pixels", [224, 384])
@pytest.mark.parametrize("cuts", [11, 3, 2])
def test_plans_of_equal_cost(pixels, cuts):
    config = arch("as_deit_small").at(pixels)
    where = cut_cost.places(config, cuts)
    rows = cut_cost.plan(config, where)
    full = config.image_tokens + 1
    dense = config.depth * cut_cost.block_macs(config, full, full)
    share = sum(cut_cost.block_macs(config, a, b) for a, b in zip([full, *rows], rows)) / dense
    assert share == pytest.approx(cut_cost.SHARE, abs=0.01)
    changes = [i for i, (a, b) in enumerate(zip([full, *rows], rows)) if a != b]
    assert changes == list(where)
    assert len(where) == cuts
    # Of two neighbours one may leave at most: a cut of size-passing takes no more than half.
    assert all(a - b <= a // 2 for a, b in zip([full, *rows], rows))


@torch.no_grad()
def test_dense_variants_are_the_dense_network(mini):
    images = torch.from_numpy(mini.pictures[:2])
    (wanted,) = torch_stages.StaticModel(mini.model, None, batch=2)._forward(images)
    for bias in (False, True):
        (mine,) = cut_cost.CutModel(mini.model, None, bias, False)(images)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_sizes_are_passed_on_and_none_is_lost(mini):
    x = torch.randn(2, 11, 128)
    size = torch.rand(2, 11) + 1
    key, score = torch.randn(2, 2, 11, 64), torch.rand(2, 10)
    kept, sizes = cut_cost.CutModel._pass_sizes(x, size, key, score, 7)
    assert kept.shape == (2, 7, 128)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    odd = x[:, 2::2]  # rows of the tokens at odd places, which stay
    assert all(
        any(torch.equal(row, other) for other in kept[b]) for b in range(2) for row in odd[b]
    )
    assert torch.equal(kept[:, 0], x[:, 0])
    best, places = cut_cost.CutModel._highest(x, size, key, score, 4)
    assert torch.equal(best[0, 1:], x[0, 1:][score[0].topk(3).indices.sort().values])
    assert places.shape == (2, 4)


def test_json_holds_no_nan():
    given = {"a": float("nan"), 2: [np.float32(1.5), (float("inf"),)], "c": np.arange(2)}
    assert json.loads(json.dumps(clean(given), allow_nan=False)) == {
        "a": "nan", "2": [1.5, ["inf"]], "c": [0, 1],
    }  # fmt: skip
