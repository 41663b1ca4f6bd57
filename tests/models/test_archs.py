"""The table of architectures and how a row moves to another size."""

from __future__ import annotations

import pytest

from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch


@pytest.mark.parametrize("name", ARCHS)
def test_rows_are_consistent(name):
    row = ARCHS[name]
    assert row.name == name
    assert row.dim == 64 * row.heads
    assert row.image_size % row.patch_size == 0
    assert 0 < row.stages[0] < row.stages[-1] < row.depth
    assert list(row.stages) == sorted(set(row.stages))


def test_another_size_and_head():
    row = arch("as_deit_base").at(384, 10)
    assert (row.image_tokens, row.num_classes) == (576, 10)
    assert arch("as_deit_base").image_tokens == 196


@pytest.mark.parametrize("size", [225, 8, 0, -16])
def test_sizes_that_the_patch_does_not_divide(size):
    with pytest.raises(UserError, match=r"not a multiple of the 16-pixel patch.*try \d+ or \d+"):
        arch("as_deit_small").at(size)


def test_size_beyond_what_any_machine_runs():
    assert arch("as_deit_small").at(4096).image_tokens == 65_536
    with pytest.raises(UserError, match="400000000 is too large for as_deit_small; at most 4096"):
        arch("as_deit_small").at(400_000_000)


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="unknown arch 'vit'; known: as_deit_tiny, "):
        arch("vit")


def test_dense_models_have_no_thresholds():
    adaptive, dense = build(arch("as_deit_mini")), build(arch("as_deit_mini"), adaptive=False)
    assert adaptive.adaptive
    assert not dense.adaptive
    assert set(adaptive.state_dict()) - set(dense.state_dict()) == {
        f"thresholds.{i}" for i in range(3)
    }
