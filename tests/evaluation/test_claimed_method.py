"""`check --method`: an artefact is what it is said to be, or one line says what else it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import raises_one_line, refused, signed_copy

import asvit_deploy
from asvit_deploy.checkpoints.load import save_checkpoint
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.methods import METHODS
from asvit_deploy.reduction.tome import ToMe

MINI = replace(arch("as_deit_mini"), image_size=28)  # 49 tokens
BLOCKS = (1, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Exports of dense weights, by methods and as they are; of thresholds; with a bound."""
    folder, found = tmp_path_factory.mktemp("claimed"), {}
    torch.manual_seed(0)
    dense = build(MINI, adaptive=False).eval()
    per_picture = dense.with_reduction(ToMe(BLOCKS))
    for boundary in per_picture.reduction.boundaries():
        boundary.data.fill_(0.2)
    for name, model in (("dense", dense), ("threshold", build(MINI).eval()), ("tome", per_picture)):
        save_checkpoint(folder / f"{name}.safetensors", model, {"budget": "0.7"})
    made = {
        "fixed": ("dense", {"method": "size-passing", "budget": 0.7, "cuts": BLOCKS}),
        "usual": ("dense", {"method": "evit"}),
        "whole": ("dense", {"dense": True}),
        "threshold": ("threshold", {}),
        "free": ("tome", {}),
        "bounded": ("tome", {"max_kept": 30}),
    }
    for name, (source, options) in made.items():
        found[name] = asvit_deploy.export(
            folder / f"{source}.safetensors", output=folder / f"{name}.onnx", **options
        ).output
    return found


AGREE = [
    ("fixed", {"method": "size-passing"}),
    ("fixed", {"method": "size-passing", "cuts": BLOCKS}),
    ("fixed", {"cuts": list(BLOCKS)}),
    ("usual", {"method": "evit"}),
    ("threshold", {"method": "threshold"}),
    ("threshold", {"method": "threshold", "cuts": MINI.stages}),
    ("free", {"method": "tome"}),
    ("bounded", {"method": "tome"}),
    ("bounded", {"max_kept": 30}),
    ("bounded", {"method": "tome", "cuts": BLOCKS, "max_kept": 30}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), AGREE)
def test_what_it_is_passes(files, name, said):
    found = asvit_deploy.check(files[name], limit=2, **said)
    assert found
    assert all(comparison.passed for comparison in found)


REFUSED = [
    ("fixed", {"method": "tome"}, "fixed.onnx is of the method size-passing and not of tome; pass "
     "--method size-passing, or a file that was exported with --method tome"),
    ("fixed", {"method": "threshold"}, "is of the method size-passing and not of threshold"),
    ("threshold", {"method": "bat"}, "threshold.onnx is of the method threshold and not of bat"),
    ("whole", {"method": "bat"}, "whole.onnx is dense, of no method; drop --method"),
    ("whole", {"cuts": (1, 2)}, "whole.onnx is dense, of no method; drop --cuts"),
    ("fixed", {"cuts": (1, 2)}, "fixed.onnx cuts at the blocks 1,3 and not at 1,2"),
    ("threshold", {"cuts": (1, 2)}, "threshold.onnx cuts at the blocks "),
    ("fixed", {"max_kept": 9}, "is of size-passing, whose counts here --max-kept does not bound"),
    ("threshold", {"max_kept": 9}, "is of threshold, whose counts here --max-kept does not bound"),
    ("free", {"max_kept": 30}, "free.onnx bounds no picture; drop --max-kept"),
    ("bounded", {"max_kept": 31}, "bounded.onnx keeps 30 rows of any picture at most and not 31; "
     "pass --max-kept 30"),
    ("bounded", {"max_kept": 1}, "--max-kept 1 leaves no image token"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said", "words"), REFUSED)
def test_what_it_is_not_is_one_line(files, name, said, words):
    raises_one_line(lambda: asvit_deploy.check(files[name], limit=2, **said), words)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "edit", "words"), [
    ("fixed", {"kept": [40, 30]}, "says kept [40, 30] where size-passing has ["),
    ("free", {"name": "size-passing"}, "says that it is of the method size-passing, and "),
])  # fmt: skip
def test_a_sidecar_that_its_checkpoint_does_not_bear_out(files, name, edit, words, tmp_path):
    """Without the option the sidecar's word is what the file is compared with."""
    reduction = {**json.loads(Path(f"{files[name]}.json").read_text())["reduction"], **edit}
    other = signed_copy(files[name], tmp_path / "other.onnx", reduction=reduction, appended=0)
    raises_one_line(lambda: asvit_deploy.check(other, limit=2, method=reduction["name"]),
                    "other.onnx", words)  # fmt: skip


@pytest.mark.slow
def test_the_command_takes_it(files, cli):
    done = cli("check", files["fixed"], "--limit", 2, "--method", "size-passing", "--cuts", "1,3")
    assert done.code == 0, done.err
    refused(cli("check", files["fixed"], files["usual"], "--limit", 2, "--method", "size-passing"),
            "usual.onnx is of the method evit and not of size-passing")  # fmt: skip
    refused(cli("check", files["bounded"], "--max-kept", 20), "30 rows")


def test_what_cannot_be_checked(tmp_path):
    for other in ("auto", "nonsense", ""):
        raises_one_line(lambda o=other: asvit_deploy.check("x.onnx", method=o),
                        f"method={other!r} cannot be checked", *METHODS)  # fmt: skip
    for option in ({"method": "tome"}, {"cuts": (1,)}, {"max_kept": 9}):
        name = "--" + next(iter(option)).replace("_", "-")
        raises_one_line(lambda o=option: asvit_deploy.check("x.onnx", reference="y.onnx", **o),
                        f"{name} makes the reference from the checkpoint")  # fmt: skip
    raises_one_line(lambda: asvit_deploy.check("x.onnx", max_kept=0), "max_kept is 0")
