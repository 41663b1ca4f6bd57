"""Files of candidates: a trace is shared by networks that differ in thresholds alone."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.graph import give_thresholds
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.tuning.contenders import with_values


@pytest.fixture(scope="module")
def traced():
    """A network with two cuts, and its graph."""
    import torch

    torch.manual_seed(3)
    model = build(arch("as_deit_mini"), adaptive=False).eval()
    network = model.with_reduction(with_values(SizePassing([2, 4]), [0.011, 0.012]))
    return model, to_onnx(network)


def test_given_thresholds_make_the_graph_that_tracing_makes(traced):
    model, proto = traced
    given = copy.deepcopy(proto)
    assert give_thresholds(given, [0.02, 0.03])
    again = to_onnx(model.with_reduction(with_values(SizePassing([2, 4]), [0.02, 0.03])))
    assert again.SerializeToString(deterministic=True) == given.SerializeToString(
        deterministic=True
    )


def test_thresholds_that_something_else_reads_stay(traced):
    given = copy.deepcopy(traced[1])
    given.graph.node.append(onnx.helper.make_node("Neg", ["threshold_1"], ["other"]))
    before = given.SerializeToString()
    assert not give_thresholds(given, [0.02, 0.03])
    assert given.SerializeToString() == before


def test_a_threshold_that_is_missing_leaves_the_graph_as_it_is(traced):
    given = copy.deepcopy(traced[1])
    assert not give_thresholds(given, [0.02, 0.03, 0.04])
    assert given == traced[1]


def test_values_are_float32(traced):
    given = copy.deepcopy(traced[1])
    assert give_thresholds(given, [0.1, 0.2])
    stored = {one.name: numpy_helper.to_array(one) for one in given.graph.initializer}
    assert stored["threshold_0"] == np.float32(0.1)
    assert stored["threshold_0"].shape == ()
