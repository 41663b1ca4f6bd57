"""The arithmetic of the bench; no test here depends on how fast the machine is."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest

from asvit_deploy.evaluation import profile, timing
from asvit_deploy.models.macs import dense_macs, model_macs
from asvit_deploy.runners.onnx_runtime import OrtRunner


class Sleeper:
    """A runner that takes a known time."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def infer(self, images):
        self.calls += 1
        time.sleep(self.seconds)

    def describe(self):
        return {"backend": "sleep"}


def variants(slow=0.004, fast=0.002):
    return [
        timing.Variant("dense", "sleep", False, Sleeper(slow)),
        timing.Variant("adaptive", "sleep", True, Sleeper(fast)),
    ]


def test_every_variant_runs_every_round():
    rows = variants(0, 0)
    images = [np.zeros((3, 2, 2), np.float32)] * 3
    seconds = timing.interleave(rows, images, warmup=4, runs=7)
    assert [row.runner.calls for row in rows] == [11, 11]
    assert {name: len(t) for name, t in seconds.items()} == {"dense": 7, "adaptive": 7}
    assert all((t > 0).all() for t in seconds.values())


def test_ratio_and_interval():
    rng = np.random.default_rng(1)
    fast = rng.normal(1.0, 0.05, 400)
    ratio, low, high = timing.ratio_of_medians(fast * 1.5, fast)
    assert low <= ratio <= high
    assert ratio == pytest.approx(1.5, abs=0.03)
    assert timing.ratio_of_medians(fast, fast) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("slow", "fast", "words"),
    [(1.5, 1.0, "wins over dense"), (1.0, 1.5, "dense wins"), (1.0, 1.0, "a draw")],
)
def test_verdict_says_who_wins(slow, fast, words):
    noise = np.random.default_rng(0).normal(1, 0.01, (2, 200))
    seconds = {"dense": slow * noise[0], "adaptive": fast * noise[1]}
    rows = timing.summarise(variants(), seconds, np.full(200, 1.5))
    if words == "a draw":
        seconds["adaptive"] = seconds["dense"][::-1].copy()
        rows = timing.summarise(variants(), seconds, np.full(200, 1.5))
    assert words in timing.verdict(rows)


def test_share_of_the_macs_ratio_is_per_image():
    # Two kinds of image, MACs ratios 1 and 3; times follow the MACs but for a tenth lost.
    ratios = np.tile([1.0, 3.0], 50)
    dense = np.full(100, 6.0)
    share = timing.share_of_macs_ratio(dense, dense / ratios / 0.9, ratios)
    assert share == pytest.approx({"value": 0.9, "low": 0.9, "high": 0.9})


def test_verdict_without_a_pair():
    assert "nothing to compare" in timing.verdict([{"name": "x", "p50_ms": 1.0}])


def test_macs_follow_the_images_that_ran(mini_config):
    lengths = np.array([[197, 197, 197], [100, 50, 20]])
    summary = timing.macs_summary(mini_config, lengths, runs=3)
    low = model_macs(mini_config, [100, 50, 20])
    expected = (2 * dense_macs(mini_config) + low) / 3
    assert summary["adaptive_gmacs"] == pytest.approx(expected / 1e9)
    assert summary["ratio"] == pytest.approx(dense_macs(mini_config) / expected)
    assert summary["mean_kept"] == pytest.approx([(196 * 2 + 99) / 3, (196 * 2 + 49) / 3, 137.0])


def test_kept_counts_are_those_of_the_model(mini_artifacts, photos):
    pictures = [photos[i] for i in range(4)]
    runner = OrtRunner(mini_artifacts["1", "auto"])
    outputs, lengths = timing.run_once(runner, pictures)
    assert (outputs.shape, lengths.shape) == ((4, 10), (4, 3))
    assert (np.diff(lengths, axis=1) <= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("key", [("1", "auto"), ("1", "standard")])
def test_profiler_finds_scoring_and_compaction(mini_artifacts, photos, key):
    shares = profile.shares(mini_artifacts[key], [photos[i] for i in range(4)], warmup=2)
    assert 0 < shares["scoring"] < 0.5
    assert 0 < shares["compaction"] < 0.5
    assert shares["compaction"] < shares["both"] < 0.7
    assert shares["kernel_ms"] > 0


def test_a_disturbed_run_does_not_move_the_shares():
    """Five runs of 100 us, the last three counted; in one of them the scoring node was held up."""
    events = []
    for run, scoring in enumerate((10, 10, 10, 10_000, 10)):
        start = run * 100_000
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 90_000})
        for name, begin, dur in (("a", 0, 70), ("s", 20_000, scoring), ("c", 40_000, 20)):
            event = {"cat": "Node", "ts": start + begin, "dur": dur}
            events += [{**event, "name": f"{name}_kernel_time"}, {**event, "name": f"{name}_fence"}]
    events = events[::-1]  # the runs come after their nodes in a real file too
    shares = profile._medians(events, {"s": "scoring", "c": "compaction"}, warmup=2)
    assert shares == pytest.approx(
        {"scoring": 0.1, "compaction": 0.2, "both": 0.3, "kernel_ms": 0.1}
    )


def test_only_score_work_counts_as_scoring(mini_artifacts):
    model = onnx.load(mini_artifacts["1", "auto"])
    kinds = profile.classify_nodes(model, 3)
    ops = {node.name: node.op_type for node in model.graph.node}
    compaction = [ops[name] for name, kind in kinds.items() if kind == "compaction"]
    scoring = [ops[name] for name, kind in kinds.items() if kind == "scoring"]
    assert compaction == ["ThresholdCompact"] * 3
    # Per stage: one row of logits, its softmax, the context norms; never a projection.
    assert scoring.count("Softmax") == 3
    assert scoring.count("Sqrt") == 3
    assert scoring.count("MatMul") == 3
