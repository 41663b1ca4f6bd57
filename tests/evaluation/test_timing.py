"""The arithmetic of the bench; no test here depends on how fast the machine is."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest

from asvit_deploy.artefacts.onnx_file import find_op_library
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


@pytest.mark.parametrize(("after", "warm", "timed"), [(0, 0, 0), (5, 2, 0), (9, 2, 2)])
def test_what_ends_in_a_round_keeps_the_whole_ones_before(after, warm, timed):
    rows, first = variants(0, 0), dict[str, np.ndarray]()
    images = [np.zeros((3, 2, 2), np.float32)]
    seconds = timing.interleave(
        rows, images, 2, 7, first=first,
        ended=lambda: sum(row.runner.calls for row in rows) >= after,
    )  # fmt: skip
    assert {len(one) for one in first.values()} == {warm}
    assert {len(one) for one in seconds.values()} == {timed}
    assert all((one > 0).all() for one in [*seconds.values(), *first.values()])


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
    kinds = {"s": "scoring", "c": "compaction"}
    shares = profile._medians(profile._spent(events, kinds, profile._KINDS, "network", warmup=2))
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


def test_time_between_cuts_is_all_of_it_and_each_stage_has_its_blocks(
    mini_artifacts, mini_config, photos
):
    images = [photos[i] for i in range(4)]
    for library in (None, find_op_library(None)):
        shares = profile.shares(mini_artifacts["1", "auto"], images, library, warmup=1)
        assert len(shares["stages_ms"]) == 4
        assert min(shares["stages_ms"]) > 0
    model = onnx.load(mini_artifacts["1", "auto"])
    stages = profile.stages_of_nodes(model, 3)
    assert set(stages.values()) == {0, 1, 2, 3}
    ops = {node.name: node.op_type for node in model.graph.node}
    ends = [stages[name] for name, op in ops.items() if op == "ThresholdCompact"]
    assert ends == [0, 1, 2]
    assert {stages[name] for name, op in ops.items() if op == "Conv"} == {0}
    blocks = [sum(op == "Gelu" and stages[name] == s for name, op in ops.items()) for s in range(4)]
    assert blocks == np.diff([0, *mini_config.stages, mini_config.depth]).tolist()


def test_latency_as_a_line_over_kept_tokens():
    tokens = np.array([50.0, 100.0, 150.0, 80.0])
    rounds = np.arange(40) % 4
    line = timing.line_over_kept((2 + 0.01 * tokens[rounds]) / 1e3, tokens)
    assert line["ms_per_token"] == pytest.approx(0.01)
    assert line["ms_at_none"] == pytest.approx(2)
    assert (line["r2"], line["pictures"]) == (pytest.approx(1), 4)
    noise = np.random.default_rng(0).normal(1, 0.1, 40)  # which tokens do not explain
    assert timing.line_over_kept(noise, tokens)["r2"] < 0.9
    assert timing.line_over_kept(noise[:2], tokens) is None, "two points are always on a line"
    assert timing.line_over_kept(noise, np.full(4, 50.0)) is None, "fixed counts"


def test_kept_tokens_are_those_that_the_blocks_see(mini_config):
    p, n, depth = mini_config.prefix, mini_config.image_tokens, mini_config.depth
    dense = np.full((2, len(mini_config.stages)), mini_config.rows)
    assert timing.tokens_by_image(mini_config, dense).tolist() == [n, n]
    half = np.array([[p + n // 2]])
    cut = 2 * depth - 1  # rows leave in the middle of the last block
    seen = timing.tokens_by_image(mini_config, half, [cut])
    assert seen.tolist() == [pytest.approx((cut * n + n // 2) / (2 * depth))]


def test_rounds_of_equal_work_that_take_unequal_time_are_said():
    rows, rng, core = variants(), np.random.default_rng(0), timing.Core()
    calm = rng.normal(1, 0.02, 200)
    uneven = {"dense": calm, "adaptive": calm * rng.uniform(0.5, 2, 200)}
    assert timing.busy(rows, uneven, core) is None
    said = timing.busy(rows, {"dense": calm * rng.uniform(1, 2, 200), "adaptive": calm}, core)
    assert said.startswith("the machine was busy: one round in ten of the dense network took 1.")
    assert timing.busy(rows[1:], {"adaptive": calm}, core) is None, "nothing does equal work"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_a_steady_neighbour_on_the_same_core_is_said():
    """Every round is slowed alike, so that their spread shows nothing."""
    code = """
import os, subprocess, sys, time
from asvit_deploy.evaluation.timing import Core, too_busy
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
spins = [sys.executable, "-c", "print(flush=True)\\nwhile True: pass"]
neighbour = subprocess.Popen(spins, stdout=subprocess.PIPE)
neighbour.stdout.readline()
with Core() as core:
    until = time.perf_counter() + 1
    while time.perf_counter() < until:
        pass
neighbour.kill()
print(too_busy([[1.0] * 10], core.share))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the machine was busy: this process had 0."), done.stdout
    assert timing.Core().share == 1, "and before anything was timed nothing is said"


def test_rows_stand_beside_dense_ones_of_other_runtimes_and_precisions_too():
    rows = [
        timing.Variant("eager, dense", "torch", False, Sleeper(0)),
        timing.Variant("dense", "sleep", False, Sleeper(0)),
        timing.Variant("dense, int8", "sleep", False, Sleeper(0), "int8"),
        timing.Variant("adaptive, int8", "sleep", True, Sleeper(0), "int8"),
    ]
    seconds = {v.name: np.full(20, s) for v, s in zip(rows, (8.0, 4.0, 2.0, 1.0))}
    *dense, adaptive = timing.summarise(rows, seconds, np.full(20, 2.0))
    assert adaptive["speedup"]["value"] == 2
    found = {name: ratio["value"] for name, ratio in adaptive["over_others"].items()}
    assert found == {"eager, dense": 8, "dense": 4}
    assert not any("over_others" in row for row in dense)
