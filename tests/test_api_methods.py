"""Which method a command takes: what options go together, and one line for all that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import raises_one_line

import asvit_deploy
from asvit_deploy.api.methods import method_for, with_method
from asvit_deploy.budget import carried_out, fixed_counts
from asvit_deploy.checkpoints.load import Checkpoint, build_model, load_checkpoint, save_checkpoint
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import teacher_macs
from asvit_deploy.reduction.methods import METHODS, RANKED, restored
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe

MINI = replace(arch("as_deit_mini"), image_size=28)  # 49 tokens
BLOCKS = (1, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same weights dense, by thresholds, and with methods; and a head that averages."""
    folder, found = tmp_path_factory.mktemp("methods"), {}
    torch.manual_seed(0)
    dense = build(MINI, adaptive=False).eval()
    made = {
        "dense": (dense, {}),
        "threshold": (build(MINI).eval(), {}),
        "fixed": (dense.with_reduction(fixed_counts(MINI, SizePassing, 0.7)), {"budget": "0.7"}),
        "per_picture": (dense.with_reduction(ToMe(BLOCKS)), {"budget": "0.7"}),
        "mean": (build(replace(MINI, name="m", head="mean_norm"), adaptive=False).eval(), {}),
    }
    for name, (model, metadata) in made.items():
        found[name] = folder / f"{name}.safetensors"
        save_checkpoint(found[name], model, metadata)
    return found


@pytest.fixture(scope="module")
def loaded(files) -> dict[str, Checkpoint]:
    return {name: load_checkpoint(path) for name, path in files.items()}


# --- method_for ---------------------------------------------------------------------------------


def test_dense_weights_take_what_evidence_says_and_others_their_own(loaded):
    taken = {name: method_for(checkpoint, None) for name, checkpoint in loaded.items()}
    assert taken == {"dense": "auto", "threshold": "threshold", "fixed": "size-passing",
                     "per_picture": "tome", "mean": "auto"}  # fmt: skip
    for name in METHODS:
        assert method_for(loaded["dense"], name) == name


def test_what_method_for_refuses(loaded):
    raises_one_line(lambda: method_for(loaded["dense"], "tomme"), "method='tomme'", "auto",
                    *METHODS)  # fmt: skip
    for name, own in (("threshold", "threshold"), ("fixed", "size-passing"),
                      ("per_picture", "tome")):  # fmt: skip
        for other in {"auto", "bat", "threshold", "size-passing", "tome"} - {own}:
            raises_one_line(lambda n=name, o=other: method_for(loaded[n], o), f"{name}.safetensors",
                            f"is a checkpoint of the method {own}", f"--method {own}")  # fmt: skip
        assert method_for(loaded[name], own) == own


@pytest.mark.parametrize("name", METHODS)
def test_heads_that_average_take_methods_that_carry_sizes(loaded, name):
    if METHODS[name].carries_sizes:
        assert method_for(loaded["mean"], name) == name
        return
    able = ", ".join(other for other, made in METHODS.items() if made.carries_sizes)
    assert able.startswith("size-passing, tome")
    raises_one_line(lambda: method_for(loaded["mean"], name), "mean.safetensors averages its "
                    f"tokens (mean_norm), and {name} does not say how many each stands for",
                    f"one of {able}, or --dense")  # fmt: skip


# --- with_method --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANKED)
def test_dense_weights_get_fixed_counts_at_the_budget(loaded, name):
    made = with_method(loaded["dense"], name, 0.75, None)
    assert made.adaptive
    assert (made.metadata["budget"], made.metadata["budget_by"]) == ("0.75", "executed")
    method = restored(made.reduction, 1)
    assert method.name == name
    share = carried_out(made.config, method) / teacher_macs(made.config)
    assert share == pytest.approx(0.75, rel=0.01)
    assert build_model(made).reduction.kept == method.kept
    other = restored(with_method(loaded["dense"], name, None, (0, 1, 3)).reduction, 1)
    assert other.blocks == (0, 1, 3)
    share = carried_out(made.config, other) / teacher_macs(made.config)
    assert share == pytest.approx(0.65, rel=0.01), "the default"


def test_a_checkpoint_stays_as_it_is_without_options(loaded):
    for name, checkpoint in loaded.items():
        own = None if name in ("dense", "mean") else method_for(checkpoint, None)
        for method in {None, own}:
            assert with_method(checkpoint, method, None, None) == checkpoint


def test_max_kept_bounds_thresholds(loaded):
    made = with_method(loaded["per_picture"], None, None, None, 20)
    method = restored(made.reduction, 1)
    assert method.most[-1] == 19
    assert method.most[0] > 19
    assert build_model(made).reduction.most == method.most


REFUSED = [
    ("dense", {"method": "auto"}, ("dense.safetensors is dense", "--method auto is settled on "
                                    "pictures", "asvit-deploy calibrate --method auto")),
    ("dense", {"method": "threshold"}, ("asvit-deploy calibrate --method threshold",)),
    ("dense", {"method": "none"}, ("method='none'", "size-passing")),
    ("dense", {"budget": 0.7}, ("--budget is of a method; pass --method too",)),
    ("dense", {"cuts": (1, 3)}, ("--cuts is of a method; pass --method too",)),
    ("dense", {"max_kept": 9}, ("--max-kept is of a method; pass --method too",)),
    ("dense", {"method": "tome", "max_kept": 9}, ("--max-kept bounds what pictures keep by",
                                                "calibrate --per-picture")),
    ("dense", {"method": "tome", "budget": 0.1}, ("budget 0.1 is out of reach of tome with 5 cuts",
                                                "it reaches 0.479 to 0.925")),
    ("dense", {"method": "evit", "budget": 1.5}, ("budget 1.5 is out of reach of evit",)),
    ("dense", {"method": "evit", "budget": float("nan")}, ("budget nan",)),
    ("dense", {"method": "evit", "budget": 0}, ("budget 0 is out of reach",)),
    ("dense", {"method": "evit", "budget": -0.65}, ("budget -0.65 is out of reach",)),
    ("dense", {"method": "evit", "budget": float("inf")}, ("budget inf",)),
    ("dense", {"method": "evit", "budget": "0.65"}, ("budget='0.65'",)),
    ("dense", {"method": "tome", "cuts": (3, 1)}, ("cuts 3,1 do not fit as_deit_mini",
                                                 "between 0 and 5")),
    ("dense", {"method": "tome", "cuts": (1, 1)}, ("cuts 1,1 do not fit",)),
    ("dense", {"method": "tome", "cuts": (1, 6)}, ("cuts 1,6 do not fit",)),
    ("dense", {"method": "tome", "cuts": (-1, 2)}, ("cuts -1,2 do not fit",)),
    ("dense", {"method": "tome", "cuts": ()}, ("cuts  do not fit",)),
    ("dense", {"method": "tome", "cuts": (1.5,)}, ("cuts 1.5 do not fit",)),
    ("mean", {"method": "evit"}, ("mean.safetensors averages its tokens",)),
    ("fixed", {"budget": 0.7}, ("fixed.safetensors has its budget and its cuts; drop --budget",)),
    ("fixed", {"method": "size-passing", "cuts": (1, 3)}, ("drop --cuts",)),
    ("threshold", {"budget": 0.7}, ("threshold.safetensors has its budget",)),
    ("per_picture", {"budget": 0.7, "max_kept": 9}, ("drop --budget",)),
    ("fixed", {"method": "tome"}, ("is a checkpoint of the method size-passing",)),
    ("fixed", {"max_kept": 9}, ("is a checkpoint of size-passing, whose counts --max-kept does "
                                 "not bound",)),
    ("threshold", {"max_kept": 9}, ("is a checkpoint of threshold, whose counts",)),
    ("per_picture", {"max_kept": 1}, ("--max-kept 1 leaves no image token beside the 1 row",)),
    ("per_picture", {"max_kept": 5}, ("--max-kept 5 is out of reach of tome", "13 rows")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_what_with_method_refuses(loaded, name, options, words):
    given = {"method": None, "budget": None, "cuts": None, **options}
    raises_one_line(lambda: with_method(loaded[name], **given), *words)


@pytest.mark.parametrize(("name", "options", "words"), REFUSED[::4])
def test_export_refuses_it_too_and_writes_nothing(files, name, options, words, tmp_path,
                                                  monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    raises_one_line(lambda: asvit_deploy.export(files[name], **options), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"method": "tome"}, {"budget": 0.7}, {"cuts": (1,)},
                                    {"max_kept": 9}])  # fmt: skip
def test_dense_has_no_method(files, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raises_one_line(lambda: asvit_deploy.export(files["dense"], dense=True, **option),
                    "--dense has no method")  # fmt: skip
    raises_one_line(lambda: asvit_deploy.evaluate(files["dense"], data="digits", dense=True,
                                                  **option), "--dense has no method")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [("dense", {"max_kept": 9}, ("--max-kept bounds what each picture keeps by --per-picture",)),
     ("dense", {"max_kept": 9, "per_picture": True, "method": "threshold"}, ("another method than "
                                                                             "threshold",)),
     ("dense", {"max_kept": 1, "per_picture": True, "method": "tome", "limit": 8},
      ("--max-kept 1 leaves no image token",)),
     ("dense", {"max_kept": 12, "per_picture": True, "method": "tome", "limit": 8},
      ("rows that this budget keeps on average",)),
     ("dense", {"per_picture": True, "method": "bat", "limit": 8}, ("bat keeps as many tokens",)),
     ("dense", {"method": "nonsense"}, ("method='nonsense'",)),
     ("dense", {"budget_by": "paper"}, ("budget_by='paper'", "executed, release")),
     ("dense", {"cuts": (4, 2), "limit": 8}, ("cuts 4,2 do not fit",)),
     ("dense", {"cuts": (2, 9), "limit": 8, "method": "threshold"}, ("stages 2,9 do not fit",)),
     ("dense", {"budget": 0.1, "limit": 8, "method": "tome"}, ("it reaches 0.479",)),
     ("dense", {"budget": float("nan"), "limit": 8}, ("budget nan",)),
     ("dense", {"budget": 0, "limit": 8}, ("budget 0 is out of reach",)),
     ("fixed", {"method": "bat"}, ("is a checkpoint of the method size-passing",)),
     ("mean", {"method": "threshold"}, ("averages its tokens",))],
)  # fmt: skip
def test_calibrate_refuses(files, name, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raises_one_line(lambda: asvit_deploy.calibrate(files[name], **options), *words)
    assert list(tmp_path.iterdir()) == []


def test_bench_refuses_methods_that_it_cannot_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong in ("tome,nonsense", ["nonsense"], "", "threshold", "tome,"):
        raises_one_line(lambda w=wrong: asvit_deploy.bench("x.onnx", methods=w), "methods has",
                        "size-passing")  # fmt: skip


def test_so_few_tokens_that_one_is_over_one_per_cent(tmp_path):
    config = replace(MINI, image_size=8)
    path = tmp_path / "few.safetensors"
    save_checkpoint(path, build(config, adaptive=False).eval(), {})
    few = load_checkpoint(path)
    raises_one_line(lambda: with_method(few, "topk", 0.9, (1,)), "out of reach of topk with 1 cut",
                    "and nearest to it 0.", "choose another budget")  # fmt: skip


def test_evaluate_of_an_onnx_file_has_its_method(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.onnx").write_bytes(b"")
    for option in ({"method": "tome"}, {"budget": 0.7}, {"cuts": (1,)}, {"max_kept": 9}):
        raises_one_line(lambda o=option: asvit_deploy.evaluate("x.onnx", data="digits", **o),
                        "x.onnx is an ONNX file",
                        f"--{next(iter(option)).replace('_', '-')}")  # fmt: skip


def test_export_names_what_can_be_done_with_a_head_that_averages(files, tmp_path, monkeypatch):
    """Nothing can be fine-tuned there: thresholds do not carry sizes."""
    monkeypatch.chdir(tmp_path)
    able = [name for name, made in METHODS.items() if made.carries_sizes]
    with pytest.raises(asvit_deploy.UserError) as caught:
        asvit_deploy.export(files["mean"])
    assert "finetune" not in str(caught.value)
    assert f"calibrate` on it, pass --method with one of {', '.join(able)}" in str(caught.value)
    raises_one_line(lambda: asvit_deploy.export(files["dense"]), "`finetune` on it")
