"""A schedule: by hand, in every form, and DiffRate's own, whose MACs are published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from by_hand import EVERY_BLOCK, network, same_by_hand, same_in_all_forms

from asvit_deploy.budget import carried_out
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.methods import restored
from asvit_deploy.reduction.schedule import Schedule

PICTURES = (4, 3, 112, 112)
MERGED = (5, 4, 0, 3, 8)
# Rows with the class token behind each block's pruning and merging, DeiT-S at 2.9 G.
PRUNED = (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3)
LEFT = (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)


def made(merged, prefix=1, **traits):
    return network(lambda blocks, kept, prefix: Schedule(blocks, kept, prefix, None, merged),
                   prefix, *EVERY_BLOCK, **traits)  # fmt: skip


def cut(here, kept, merged):
    ranked = sorted(here.rows, key=lambda row: -here.attention(row))
    stay, gone = sorted(ranked[:kept]), ranked[kept:]
    unit = F.normalize(here.x, dim=1)
    near = {i: max(stay, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in gone[:merged]}
    x, size = here.x.clone(), here.size.clone()
    for j in stay:
        group = [j, *(i for i in near if near[i] == j)]
        size[j] = sum(here.size[i] for i in group)
        x[j] = sum(here.size[i] * here.x[i] for i in group) / size[j]
    rows = [*range(here.prefix), *stay]
    return x[rows], size[rows], rows


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("merged", [MERGED, (0,) * 5, None])
def test_it_is_what_is_said(prefix, merged):
    model = made(merged, prefix)
    some = merged or (49,) * 5
    same_by_hand(model, lambda here: cut(here, EVERY_BLOCK[1][here.stage], some[here.stage]))


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("merged", [MERGED, None])
def test_all_forms_agree(prefix, merged):
    same_in_all_forms(made(merged, prefix, head="mean_norm"), torch.randn(PICTURES))


def test_published_macs_of_deit_small():
    counts = [rows - 1 for rows in LEFT]
    merged = [before - behind for before, behind in zip(PRUNED, LEFT)]
    config = arch("as_deit_small")
    method = Schedule(range(12), counts, 1, None, merged)
    assert carried_out(config, method) / 1e9 == pytest.approx(2.905, rel=0.001)
    # Our own form saves the last block's work for all rows but the class token's.
    ours = Schedule(range(11), counts[:11], 1, None, merged[:11])
    assert carried_out(config.saving(), ours) / 1e9 == pytest.approx(2.905, rel=0.01)


def test_its_fields_restore_it():
    method = Schedule((0, 2), (30, 20), 1, None, (4, 0))
    assert restored(method.fields(), 1).fields() == method.fields()
    for wrong in ({"merged": [1]}, {"merged": [-1, 2]}, {"merged": 3}, {"kept": None}):
        with pytest.raises(ValueError, match=r"merging tokens|no reduction|no thresholds"):
            restored({**method.fields(), **wrong}, 1)
