"""Token scores (Eq. 5-7) against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asvit_deploy.reduction.scoring import class_attention_row, token_scores


def by_hand(attention: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Equations 5 to 7, one token and head at a time."""
    batch, heads, rows, _ = context.shape
    scores = np.zeros((batch, rows - 1))
    for b in range(batch):
        for token in range(1, rows):
            norms = [np.sqrt((context[b, h, token] ** 2).sum()) for h in range(heads)]
            for h in range(heads):
                scores[b, token - 1] += norms[h] / sum(norms) * attention[b, h, token]
    return scores


def test_scores_by_hand():
    attention = torch.randn(3, 4, 9).softmax(2)
    context = torch.randn(3, 4, 9, 16)
    expected = by_hand(attention.double().numpy(), context.double().numpy())
    # The 1e-8 of the denominator and float32 rounding: 1e-6 of a score near 1/9.
    np.testing.assert_allclose(token_scores(attention, context).numpy(), expected, rtol=1e-6)


def test_scores_lie_between_the_heads_and_sum_to_at_most_one():
    attention, context = torch.randn(2, 6, 197).softmax(2), torch.randn(2, 6, 197, 64)
    scores = token_scores(attention, context)
    assert scores.dtype == torch.float32
    assert (scores <= attention[:, :, 1:].amax(1) + 1e-7).all()
    assert (scores >= attention[:, :, 1:].amin(1) - 1e-7).all()
    # Weighted per token, so not exactly 1 - A_cls,cls, but near 1 over 197 tokens.
    assert ((scores.sum(1) > 0.9) & (scores.sum(1) < 1.1)).all()


def test_one_head_is_plain_class_attention():
    attention = torch.randn(2, 1, 30).softmax(2)
    scores = token_scores(attention, torch.randn(2, 1, 30, 8))
    torch.testing.assert_close(scores, attention[:, 0, 1:], rtol=1e-6, atol=0)


def test_a_token_without_context_scores_zero_not_nan():
    context = torch.randn(1, 2, 5, 4)
    context[:, :, 3] = 0
    scores = token_scores(torch.randn(1, 2, 5).softmax(2), context)
    assert scores[0, 2] == 0
    assert scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_score_in_float32(dtype):
    """Scores of the rounded inputs: the arithmetic itself must add no half-precision rounding."""
    query, key = torch.randn(2, 3, 50, 64, dtype=dtype), torch.randn(2, 3, 50, 64, dtype=dtype)
    row = class_attention_row(query, key, None)
    context = torch.randn(2, 3, 50, 64, dtype=dtype)
    scores = token_scores(row, context)
    assert row.dtype == scores.dtype == torch.float32
    exact = class_attention_row(query.float(), key.float(), None)
    torch.testing.assert_close(row, exact, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores, token_scores(exact, context.float()), rtol=1e-6, atol=1e-8)


def test_class_attention_row_by_hand_and_masked():
    query, key = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    full = (query @ key.transpose(2, 3) / 8**0.5).softmax(3)[:, :, 0]
    torch.testing.assert_close(class_attention_row(query, key, None), full)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    row = class_attention_row(query, key, mask)
    torch.testing.assert_close(row[0], full[0])
    assert (row[1, :, 4:] == 0).all()
    torch.testing.assert_close(row[1, :, :4], full[1, :, :4] / full[1, :, :4].sum(1, keepdim=True))
