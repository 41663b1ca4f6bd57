"""Rewrites of a graph whose tokens begin with more than one row that never leaves."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from asvit_deploy import graph
from asvit_deploy.exporting import padded
from asvit_deploy.exporting.split import prefix_of, rows_of, split_segments
from asvit_deploy.exporting.static_topk import to_static_topk
from asvit_deploy.ops.reference import keep_mask

TOKENS = 5


def network(prefix):
    """Row i of `images` [1, M, 2] is a token; its first number is its score, and the logits are the
    mean of the second numbers of all rows that stay, weighted by their own softmax."""
    rows = prefix + TOKENS
    return onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 20, "asvit": 1]> '
        f"g (float[1,{rows},2] images) => (float[1,1] logits, int64[1] length_0) "
        f"<int64[1] begin = {{{prefix}}}, int64[1] end = {{{rows}}}, int64[1] one = {{1}}, "
        "int64[1] two = {2}, int64[1] zero = {0}, float threshold_0 = {0.5}> {"
        "tokens_0 = Identity (images)"
        "image_rows = Slice (images, begin, end, one)"
        "column = Slice (image_rows, zero, one, two)"
        "scores_0 = Squeeze (column, two)"
        'compact_0, index_0, length_0, size_0 = asvit.ThresholdCompact <plugin_version="1", '
        'plugin_namespace=""> (tokens_0, scores_0, threshold_0)'
        "second = Slice (compact_0, one, two, two)"
        "turned = Transpose <perm = [0, 2, 1]> (second)"
        "attention = Unsqueeze (turned, one)"  # [B, H, rows, M]
        "shares = Softmax <axis = 3> (attention)"
        "weights = Squeeze (shares, one)"
        "logits_3d = MatMul (weights, second)"
        "logits = Squeeze (logits_3d, two) }"
    )


def expected(image, kept):
    second = image[0, kept, 1].astype(np.float64)
    weights = np.exp(second - second.max())
    return (weights * second).sum() / weights.sum()


@pytest.fixture
def image():
    def make(prefix):
        random = np.random.default_rng(prefix)
        pixels = random.random((1, prefix + TOKENS, 2)).astype(np.float32)
        pixels[0, prefix:, 0] = [0.9, 0.1, 0.6, 0.2, 0.7]
        pixels[0, :, 1] *= 5
        return pixels

    return make


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_fixed_rows_keep_the_prefix_and_the_highest(image, prefix):
    model = to_static_topk(network(prefix), [2])
    pixels = image(prefix)
    (logits,) = ReferenceEvaluator(model).run(["logits"], {"images": pixels})
    kept = [*range(prefix), prefix, prefix + 4]
    np.testing.assert_allclose(logits[0, 0], expected(pixels, kept), rtol=1e-5)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_segments_know_their_prefix_from_the_shapes(image, prefix):
    first, last = segments = split_segments(network(prefix))
    assert (rows_of(segments), prefix_of(segments)) == (prefix + TOKENS, prefix)
    pixels = image(prefix)
    tokens, scores = ReferenceEvaluator(first).run(["tokens", "scores"], {"images": pixels})
    np.testing.assert_array_equal(scores, pixels[:, prefix:, 0])
    kept = [*range(prefix), prefix, prefix + 2, prefix + 4]
    bucket = np.full((1, prefix + TOKENS, 2), 3.0, np.float32)  # what lies behind does not count
    bucket[:, : len(kept)] = tokens[:, kept]
    feeds = {"kept": bucket, "length": np.array([len(kept)])}
    (logits,) = ReferenceEvaluator(last).run(["logits"], feeds)
    np.testing.assert_allclose(logits[0, 0], expected(pixels, kept), rtol=1e-5)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_padded_selection_keeps_the_prefix(prefix):
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20, "{padded.DOMAIN}": 1]>\n'
        "g (float[B,N] scores, float threshold, bool[B,N] alive)"
        " => (bool[B,M] mask, int64[B,M] index, int64[B] length) {\n"
        f"mask, index, length = {padded.DOMAIN}.Keep (scores, threshold, alive)\n}}"
    )
    model.functions.append(padded._stage_function(TOKENS, 20, prefix))
    scores = np.array([[0.9, 0.1, 0.6, 0.2, 0.7], [0.1, 0.2, 0.3, 0.2, 0.1]], np.float32)
    feeds = {"scores": scores, "threshold": np.float32(0.5), "alive": np.ones((2, TOKENS), bool)}
    mask, index, length = ReferenceEvaluator(model).run(None, feeds)
    assert mask[:, :prefix].all()
    np.testing.assert_array_equal(mask[:, prefix:], keep_mask(scores, 0.5))
    np.testing.assert_array_equal(length, prefix + np.array([3, 1]))
    np.testing.assert_array_equal(index, np.where(mask, np.arange(prefix + TOKENS), -1))


def test_the_prefix_is_what_the_scores_leave_out():
    for prefix in (1, 2, 5):
        assert graph.prefix_of(graph.inferred(network(prefix))) == prefix
