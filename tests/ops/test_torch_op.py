"""The PyTorch op against the numpy oracle bit for bit, and through torch.export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.export import Dim, export

from asvit_deploy.ops import reference
from asvit_deploy.ops.cases import CASES, EDGES, Case
from asvit_deploy.ops.torch_op import keep_mask, threshold_compact

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(case: Case, dtype: torch.dtype = torch.float32):
    return (
        torch.from_numpy(case.tokens).to(dtype),
        torch.from_numpy(case.scores),
        torch.tensor(case.threshold, dtype=torch.float32),
    )


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Half types as their bits: numpy has no bfloat16, and a copy must not change one."""
    plain = tensor.detach().contiguous()
    return (plain.view(torch.int16) if plain.element_size() == 2 else plain).numpy()


def assert_is_oracle(outputs, tokens: torch.Tensor, case: Case) -> None:
    expected = reference.threshold_compact(bits(tokens), case.scores, case.threshold)
    compact, index, length, size = outputs
    assert compact.dtype == tokens.dtype
    for name, ours, theirs in zip(expected._fields, (bits(compact), index, length, size), expected):
        np.testing.assert_array_equal(np.asarray(ours), theirs, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_bit_for_bit(case, dtype):
    tokens, scores, threshold = inputs(case, dtype)
    assert_is_oracle(threshold_compact(tokens, scores, threshold), tokens, case)


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_keep_mask_takes_a_number_or_a_tensor(case):
    _, scores, threshold = inputs(case)
    expected = reference.keep_mask(case.scores, case.threshold)
    assert keep_mask(scores, threshold).numpy().tolist() == expected.tolist()
    assert (
        keep_mask(scores, float(np.float32(case.threshold))).numpy().tolist() == expected.tolist()
    )


def test_random_cases():
    """Sizes, types and special values drawn together."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        batch, rows, dim = rng.integers(1, 9), rng.integers(2, 40), 2 ** rng.integers(0, 5)
        prefix = 1 if rng.random() < 0.5 else rng.integers(1, min(rows, 9))
        tokens = torch.from_numpy(rng.standard_normal((batch, rows, dim)).astype(np.float32))
        tokens = tokens.to(DTYPES[rng.integers(3)])
        scores = rng.integers(0, 6, (batch, rows - prefix)).astype(np.float32) / 5
        odd = rng.random(scores.shape)
        scores[odd < 0.1], scores[odd > 0.95], scores[(odd > 0.9) & (odd < 0.95)] = (
            np.nan, np.inf, -np.inf,
        )  # fmt: skip
        choices = [0.2, 0.4, 0.5, 1.0, np.nan, np.inf, -np.inf]
        case = Case("random", tokens.float().numpy(), scores, choices[rng.integers(len(choices))])
        outputs = threshold_compact(tokens, torch.from_numpy(scores), torch.tensor(case.threshold))
        assert_is_oracle(outputs, tokens, case)


def test_inputs_that_do_not_lie_contiguously():
    case = CASES[-1]
    tokens = torch.from_numpy(case.tokens).transpose(1, 2).contiguous().transpose(1, 2)
    scores = torch.from_numpy(case.scores).t().contiguous().t()
    assert not tokens.is_contiguous()
    outputs = threshold_compact(tokens, scores, torch.tensor(case.threshold))
    assert_is_oracle(outputs, tokens.contiguous(), case)


def test_outputs_share_no_memory_with_the_inputs():
    tokens, scores, threshold = inputs(EDGES[0])
    compact = threshold_compact(tokens, scores, threshold)[0]
    compact.zero_()
    assert tokens.abs().sum() > 0


@pytest.mark.parametrize(
    ("tokens", "scores"),
    [((0, 5, 4), (0, 4)), ((1, 1, 4), (1, 0)), ((1, 5, 4), (1, 5)), ((2, 5, 4), (1, 4)),
     ((5, 4), (5, 3)), ((1, 5, 4), (1, 6)), ((2, 5, 4), (2, 0)), ((2, 0, 4), (2, 0)),
     ((2, 0, 4), (2, 3)), ((2, 5, 4), (2,)), ((2, 5, 4), (2, 3, 1)), ((0, 5, 4), (0, 0))],
)  # fmt: skip
def test_shapes_that_are_refused(tokens, scores):
    with pytest.raises(ValueError, match=r"^(?!.*\n).*(do not fit|nothing to compact)"):
        threshold_compact(torch.zeros(tokens), torch.zeros(scores), torch.tensor(0.5))


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_registration(batch, prefix):
    """PyTorch's own checks of schema, fake and aliasing."""
    case = next(c for c in CASES if (len(c.tokens), c.prefix) == (batch, prefix))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(threshold_compact, inputs(case), test_utils=tests)


class Stage(torch.nn.Module):
    """The op between two layers, as in the network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)

    def forward(self, tokens, scores, threshold):
        compact, index, length, size = threshold_compact(self.linear(tokens), scores, threshold)
        return torch.relu(compact), index, length, size


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_program_gives_the_same_for_other_counts(dynamic, prefix):
    torch.manual_seed(0)
    stage, batch = Stage(16).eval(), 3 if dynamic else 1
    tokens, scores = torch.randn(batch, 30, 16), torch.rand(batch, 30 - prefix)
    axes = {0: Dim("batch", min=2, max=64)} if dynamic else None
    shapes = {"tokens": axes, "scores": axes, "threshold": None}
    program = export(stage, (tokens, scores, torch.tensor(0.5)), dynamic_shapes=shapes)
    assert any(
        node.target is torch.ops.asvit.threshold_compact.default for node in program.graph.nodes
    )
    module = program.module()
    for threshold in (0.5, 0.2, 2.0, -1.0, float("nan")):
        for count in (batch, batch + 2) if dynamic else (1,):
            tokens, scores = torch.randn(count, 30, 16), torch.rand(count, 30 - prefix)
            arguments = tokens, scores, torch.tensor(threshold)
            for ours, eager in zip(module(*arguments), stage(*arguments)):
                assert ours.equal(eager)


class Stages(torch.nn.Module):
    """Two in a row: the second's rows are known to the trace as a symbol alone."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, tokens, threshold):
        for _ in range(2):
            scores = tokens[:, self.prefix :, 0]
            tokens, _, length, _ = threshold_compact(tokens, scores, threshold)
            rows = torch.arange(tokens.shape[1])
            mask = (rows < length[:, None])[:, None, None]
            heads = tokens[:, None]
            attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)
            tokens = attended[:, 0] * torch.ones(tokens.shape[1])[:, None]
        return tokens, length


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_two_stages_in_a_row_are_exported(batch, prefix):
    """Also that the trace knows that a prefix and one token stay: attention asks for two rows."""
    torch.manual_seed(0)
    stages, threshold = Stages(prefix), torch.tensor(0.5)
    tokens = torch.rand(batch, 30, 16)
    program = export(stages, (tokens, threshold))
    for limit in (0.5, 0.2, 2.0, -1.0):
        tokens, threshold = torch.rand(batch, 30, 16), torch.tensor(limit)
        for ours, eager in zip(program.module()(tokens, threshold), stages(tokens, threshold)):
            assert ours.equal(eager)


@pytest.mark.parametrize("columns", [30, 31])
def test_scores_that_leave_no_prefix_are_refused_while_tracing(columns):
    tokens, scores = torch.rand(1, 30, 16), torch.rand(1, columns)
    with pytest.raises(Exception, match="at least one row must come before the image tokens"):
        export(Stage(16), (tokens, scores, torch.tensor(0.5)))
