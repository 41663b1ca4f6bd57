"""Every format in, every bad file refused in one line. The files are made from our own networks."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import refused
from PIL import Image
from safetensors import safe_open

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints.damage import unsealed
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch

SMALL = {"dim": 128, "heads": 2, "depth": 4, "stages": (1, 2, 3), "image_size": 64}
ROWS = {
    "as_deit_xs": replace(arch("as_deit_tiny"), name="as_deit_xs", num_classes=7, **SMALL),
    "as_lvvit_xs": replace(arch("as_lvvit_s"), name="as_lvvit_xs", num_classes=7, **SMALL),
}
ROWS = {name: row.saving() for name, row in ROWS.items()}  # as everything that is loaded
DEIT, LVVIT = ROWS["as_deit_xs"], ROWS["as_lvvit_xs"]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    """The small rows stand in the table while a test runs."""
    for name, row in ROWS.items():
        monkeypatch.setitem(ARCHS, name, row)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pt"


def network(config, adaptive=True, seed=0):
    torch.manual_seed(seed)
    return build(config, adaptive).eval()


def dense_state(config, seed=0):
    """Keys as DeiT, timm and LV-ViT write them."""
    return network(config, adaptive=False, seed=seed).state_dict()


def released_state(config, seed=0):
    """Keys as AS-ViT writes them."""
    return {
        re.sub(r"^thresholds\.(\d)$", r"score_predictor.\1.keep_threshold", key): value
        for key, value in network(config, seed=seed).state_dict().items()
    }


def released(config, **args):
    """A training checkpoint with everything the release puts beside the weights."""
    weights = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weights.parameters())
    weights(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    return {
        "model": released_state(config),
        "model_ema": released_state(config, seed=1),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {k: v for k, v in schedule.state_dict().items() if k != "_get_lr_called"},
        "scaler": {"scale": 65536.0, "growth_tracker": 0},
        "epoch": 29,
        "args": argparse.Namespace(lr=2e-5, model="small", betas=(0.9, 0.999), resume="", **args),
    }


def logits(model, size=64):
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        return model(torch.randn(2, 3, size, size, generator=generator))[0]


def refusal(path, **options):
    """The one line with which a file is refused; it names the file and what to do."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, **options)
    line = str(caught.value)
    assert line.startswith(f"{path} ")
    assert "\n" not in line
    assert ";" in line or ":" in line  # what is wrong; what to do
    return line


# --- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DEIT, LVVIT], ids=lambda c: c.head)
def test_released_format(config, file):
    torch.save(released(config), file)
    checkpoint = load_checkpoint(file)
    assert (checkpoint.format, checkpoint.adaptive, checkpoint.config) == ("as-vit", True, config)
    assert [checkpoint.state[f"thresholds.{i}"].item() for i in range(3)] == [
        pytest.approx(value) for value in (0.001, 0.002, 0.003)
    ]
    model = build_model(checkpoint)
    assert not model.training
    assert logits(model).equal(logits(network(config)))


@pytest.mark.parametrize(
    ("name", "adaptive_keys"), [("as_deit_small", 155), ("as_lvvit_s", 207)]
)  # fmt: skip
def test_key_counts_of_the_released_files(name, adaptive_keys, file):
    with torch.device("meta"):
        keys = list(build(arch(name)).state_dict())
    assert len(keys) == adaptive_keys
    assert sum(key.startswith("thresholds.") for key in keys) == 3


def test_moving_average_is_opt_in(file):
    torch.save(released(DEIT), file)
    plain, average = load_checkpoint(file), load_checkpoint(file, ema=True)
    assert plain.state["head.weight"].equal(network(DEIT).head.weight)
    assert average.state["head.weight"].equal(network(DEIT, seed=1).head.weight)
    torch.save({"model": released_state(DEIT)}, file)
    assert "no moving average" in refusal(file, ema=True)


@pytest.mark.parametrize(
    ("config", "wrap", "ema"),
    [
        (DEIT, lambda s: {"model": s}, False),
        (DEIT, lambda s: s, False),
        (LVVIT, lambda s: s, False),
        (LVVIT, lambda s: {"state_dict": s, "epoch": 3, "arch": "lvvit_s"}, False),
        (LVVIT, lambda s: {"state_dict_ema": s}, False),
        (LVVIT, lambda s: {"state_dict": dense_state(LVVIT, 9), "state_dict_ema": s}, True),
        (LVVIT, lambda s: {f"module.{k}": v for k, v in s.items()}, False),
        (LVVIT, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}, False),
    ],
)
def test_dense_formats(config, wrap, ema, file):
    torch.save(wrap(dense_state(config)), file)
    checkpoint = load_checkpoint(file, ema=ema)
    assert checkpoint.format == {"class": "deit", "class_and_tokens": "lv-vit"}[config.head]
    assert (checkpoint.adaptive, checkpoint.config) == (False, config)
    assert logits(build_model(checkpoint)).equal(logits(network(config, adaptive=False)))


def test_files_of_old_torch(file):
    torch.save(released(DEIT), file, _use_new_zipfile_serialization=False)
    assert load_checkpoint(file).format == "as-vit"


def test_plain_timm_safetensors(tmp_path):
    path = tmp_path / "deit.safetensors"
    safetensors.torch.save_file(dense_state(DEIT), path)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.format, checkpoint.metadata) == ("deit", {})
    assert logits(build_model(checkpoint)).equal(logits(network(DEIT, adaptive=False)))


@pytest.mark.parametrize("config", [DEIT, LVVIT], ids=lambda c: c.head)
@pytest.mark.parametrize("adaptive", [True, False])
def test_our_own_format_round_trips(config, adaptive, tmp_path):
    path, model = tmp_path / "own.safetensors", network(config, adaptive)
    save_checkpoint(path, model, {"budget": "0.65", "format": "cannot be overridden"})
    checkpoint = load_checkpoint(path)
    assert (checkpoint.config, checkpoint.adaptive) == (config, adaptive)
    assert checkpoint.format == "asvit-deploy"
    assert checkpoint.metadata == {
        "format": "asvit-deploy", "schema": "1", "arch": config.name, "image_size": "64",
        "num_classes": "7", "budget": "0.65", "heads": str(config.heads), "eps": str(config.eps),
        "preprocessing": json.dumps(config.preprocessing.fields()),
    }  # fmt: skip
    assert logits(build_model(checkpoint)).equal(logits(model))
    assert sorted(os.listdir(tmp_path)) == ["own.safetensors", "own.safetensors.json"]


def test_dense_twin_of_an_adaptive_checkpoint(file):
    torch.save(released(DEIT), file)
    model = build_model(load_checkpoint(file), dense=True)
    assert not model.adaptive
    assert logits(model).equal(logits(network(DEIT, adaptive=False)))


def test_two_models_of_one_checkpoint_share_no_memory(file):
    torch.save(released(DEIT), file)
    checkpoint = load_checkpoint(file)
    before = checkpoint.state["head.weight"].clone()
    build_model(checkpoint).head.weight.data.zero_()
    assert checkpoint.state["head.weight"].equal(before)


def test_half_precision_becomes_float32_and_thresholds_stay_as_they_were(file):
    state = released_state(DEIT)
    half = {k: v if "threshold" in k else v.half() for k, v in state.items()}
    torch.save({"model": half}, file)
    checkpoint = load_checkpoint(file)
    assert all(v.dtype == torch.float32 for v in checkpoint.state.values())
    assert checkpoint.state["thresholds.1"].item() == np.float32(0.002)
    assert checkpoint.state["head.weight"].equal(state["head.weight"].half().float())


def test_the_real_sizes_are_told_apart():
    """Shapes alone name the architecture, for every row of the table."""
    from asvit_deploy.checkpoints.formats import translate
    from asvit_deploy.checkpoints.network import infer_config

    for row in ARCHS.values():
        with torch.device("meta"):
            state = build(row).state_dict()
        assert infer_config(translate(state)[0], None, None)[0] == row


# --- another image size -------------------------------------------------------------------------


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, which is PyTorch's."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_position_embeddings_are_resized(file):
    state = dense_state(DEIT)
    torch.save(state, file)
    checkpoint = load_checkpoint(file, image_size=128)
    assert (checkpoint.config.image_size, checkpoint.config.image_tokens) == (128, 64)
    resized = checkpoint.state["pos_embed"]
    assert resized.shape == (1, 65, 128)
    assert resized[0, 0].equal(state["pos_embed"][0, 0])  # the class token's row is not a place
    plane, old = resized[0, 1:].reshape(8, 8, 128), state["pos_embed"][0, 1:].reshape(4, 4, 128)
    for y in range(8):
        for x in (0, 3, 6):
            at_y, at_x = (y + 0.5) / 2 - 0.5, (x + 0.5) / 2 - 0.5  # of the new pixel, in old ones
            expected = sum(
                cubic(at_y - i) * cubic(at_x - j) * old[min(max(i, 0), 3), min(max(j, 0), 3)]
                for i in range(-3, 7)
                for j in range(-3, 7)
            )
            torch.testing.assert_close(plane[y, x], expected, atol=1e-6, rtol=1e-5)
    assert logits(build_model(checkpoint), size=128).shape == (2, 7)


def test_the_same_size_changes_nothing(file):
    torch.save(dense_state(DEIT), file)
    assert (
        load_checkpoint(file, image_size=64)
        .state["pos_embed"]
        .equal(dense_state(DEIT)["pos_embed"])
    )


def test_size_that_the_patch_does_not_divide(file):
    torch.save(dense_state(DEIT), file)
    assert "not a multiple of the 16-pixel patch" in refusal(file, image_size=100)


# --- which architecture -------------------------------------------------------------------------


def test_arch_only_settles_ambiguity(file, monkeypatch):
    torch.save(released(DEIT), file)
    assert load_checkpoint(file, arch="as_deit_xs").config == DEIT
    line = refusal(file, arch="as_deit_small")
    assert "holds as_deit_xs, not as_deit_small; drop --arch" in line
    twin = replace(DEIT, name="as_deit_twin", stages=(1, 2, 2))
    monkeypatch.setitem(ARCHS, "as_deit_twin", twin)
    assert "pass --arch as_deit_xs or --arch as_deit_twin" in refusal(file)
    assert load_checkpoint(file, arch="as_deit_twin").config == twin
    with pytest.raises(UserError, match="unknown arch 'resnet'"):
        load_checkpoint(file, arch="resnet")


@pytest.mark.parametrize(
    ("traits", "name"),
    [
        ({"depth": 5}, "vit_128x5_patch16"),
        ({"patch_size": 32}, "vit_128x4_patch32"),
        ({"mlp_ratio": 2.5}, "vit_128x4_patch16"),
        ({"dim": 192, "heads": 3, "depth": 12, "patch_size": 8}, "vit_tiny_patch8"),
    ],
)
def test_sizes_that_are_no_row_of_the_table(traits, name, file):
    config = replace(DEIT, **traits).saving()
    torch.save(dense_state(config), file)
    found = load_checkpoint(file)
    assert found.config == replace(config, name=name, stages=found.config.stages)
    assert found.format == "timm"
    assert logits(build_model(found)).equal(logits(network(config, adaptive=False)))


def test_an_unknown_size_with_a_convolutional_stem(file):
    torch.save(dense_state(replace(LVVIT, depth=5)), file)
    line = refusal(file)
    assert "a convolutional stem with width 128 and depth 5, which fits no known" in line
    assert "known: as_deit_tiny" in line


def test_position_embeddings_must_be_square(file):
    state = dense_state(DEIT)
    state["pos_embed"] = torch.zeros(1, 1 + 14, 128)
    torch.save(state, file)
    assert "14 image tokens; only square grids" in refusal(file)


# --- files that are no checkpoint ---------------------------------------------------------------


class Bomb:
    """Leaves a mark when something unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_missing_folder_and_empty(tmp_path):
    assert "does not exist" in refusal(tmp_path / "gone.pt")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refusal(tmp_path / "empty.pt")


@pytest.mark.slow
def test_unreadable(powerless_cli, tmp_path):
    (tmp_path / "closed.pt").write_bytes(b"x")
    (tmp_path / "closed.pt").chmod(0)
    (result,) = powerless_cli(tmp_path, ["export", "--ckpt", "closed.pt"])
    refused(result, "closed.pt cannot be read: Permission denied; check its permissions")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.99])
def test_truncated_torch_files(file, share, legacy):
    torch.save(released(DEIT), file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert "truncated or damaged; copy or download it again" in refusal(file)


def test_a_file_damaged_inside(file):
    torch.save(released(DEIT), file)
    whole = bytearray(file.read_bytes())
    start = whole.index(b"data.pkl") + 100
    whole[start : start + 40] = b"\xff" * 40
    file.write_bytes(whole)
    assert "truncated or damaged" in refusal(file)


@pytest.mark.parametrize("length", [50, 5000, -1])
def test_truncated_safetensors(tmp_path, length):
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, network(DEIT), {})
    path.write_bytes(path.read_bytes()[:length])
    assert "truncated or damaged" in refusal(path)


def test_files_of_other_kinds(tmp_path):
    text, picture, archive, noise = (tmp_path / name for name in ("t.pt", "p.pt", "z.pt", "n.pt"))
    text.write_text("epoch,loss\n1,0.5\n" * 40)
    Image.new("RGB", (16, 16)).save(picture, format="PNG")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("folder/readme.txt", "nothing here")
    noise.write_bytes(np.random.default_rng(0).bytes(4000))
    for path in (text, picture, archive, noise):
        assert "is not a checkpoint" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_not_run(tmp_path, file, legacy):
    mark = tmp_path / "mark"
    content = {"model": released_state(DEIT), "extra": Bomb(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    line = refusal(file)
    assert "holds pickled code" in line
    assert "system" in line
    assert "was not run" in line
    assert not mark.exists()


def test_plain_pickles_are_not_run(tmp_path, file):
    mark = tmp_path / "mark"
    for protocol in (0, 2, 4):
        file.write_bytes(pickle.dumps(Bomb(mark), protocol))
        assert "was not run" in refusal(file)
    assert not mark.exists()


def test_whole_models_and_numpy_numbers_are_code_too(file):
    torch.save(network(DEIT), file)
    assert "ViT), which was not run; save only the model's state_dict()" in refusal(file)
    torch.save({"model": dense_state(DEIT), "best": np.float64(1)}, file)
    assert "numpy" in refusal(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "no weights in it"),
        ({"epoch": 3, "best": 1.0}, "epoch, best are no weights"),
        ({"model": {"conv1.weight": torch.zeros(4)}}, "is no ViT that is known here"),
    ],
)
def test_contents_that_are_no_state_dict(content, words, file):
    torch.save(content, file)
    assert words in refusal(file)


# --- networks of others -------------------------------------------------------------------------


def changed(config, **extra):
    return {"model": {**dense_state(config), **extra}}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"score_predictor.0.in_conv.0.weight": torch.zeros(4)}, "the predictors 0 where"),
        ({"score_predictor.2.out_conv.4.bias": torch.zeros(2)}, "DynamicViT"),
        ({"head_dist.weight": torch.zeros(7, 128)}, "lacks head_dist.bias"),
        ({"norm_pre.weight": torch.zeros(128)}, "lacks norm_pre.bias"),
        ({"blocks.0.ls1.gamma": torch.zeros(128)}, "lacks blocks.0.ls2.gamma, blocks.1.ls1.gamma"),
        ({"blocks.3.ls1.gamma": torch.zeros(128)}, "does not know: blocks.3.ls1.gamma"),
        (
            {"dist_token": torch.zeros(1, 1, 128), "reg_token": torch.zeros(1, 4, 128)},
            "has a distillation token and registers",
        ),
        ({f"extra.{i}": torch.zeros(1) for i in range(9)}, "extra.0, extra.1, extra.2 and 6 more"),
    ],
)
def test_relatives_are_named(extra, words, file):
    torch.save(changed(DEIT, **extra), file)
    assert words in refusal(file)


@pytest.mark.parametrize("flag", ["accu", "ema_accu"])
def test_ablation_flags_are_refused(flag, file):
    torch.save(released(DEIT, **{flag: True}), file)
    assert f"--{flag}" in refusal(file)
    torch.save(released(DEIT, **{flag: False}), file)
    assert load_checkpoint(file).adaptive


# --- states that are not right ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["blocks.2.attn.qkv.weight", "head.bias", "norm.weight"])
def test_missing_keys(key, file):
    state = dense_state(DEIT)
    del state[key]
    torch.save(state, file)
    assert f"lacks {key}; pass a complete checkpoint of as_deit_xs" in refusal(file)


@pytest.mark.parametrize("key", ["cls_token", "head.weight", "patch_embed.proj.weight"])
def test_missing_keys_without_which_nothing_is_recognised(key, file):
    state = dense_state(DEIT)
    del state[key]
    torch.save(state, file)
    assert f"lacks {key}" in refusal(file)


@pytest.mark.parametrize(
    ("key", "shape"),
    [("blocks.1.attn.proj.weight", (128, 64)), ("head.bias", (8,)), ("cls_token", (128,)),
     ("pos_embed", (1, 17, 64)), ("head.weight", (0, 128)), ("norm.bias", ())],
)  # fmt: skip
def test_wrong_shapes(key, shape, file):
    torch.save({**dense_state(DEIT), key: torch.zeros(shape)}, file)
    assert f"has {key} of shape {list(shape)}" in refusal(file)


@pytest.mark.parametrize(
    "value", [torch.zeros(128, dtype=torch.int8), torch.zeros(128, dtype=torch.complex64)]
)  # fmt: skip
def test_wrong_types(value, file):
    torch.save({**dense_state(DEIT), "norm.bias": value}, file)
    assert f"has norm.bias as {value.dtype}" in refusal(file)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(1).expand(128), "view that repeats its values (shape [128])"),
        (lambda: torch.zeros(1).expand(1 << 50), "view that repeats its values"),
        (lambda: torch.zeros(128).to_sparse(), "torch.sparse_coo tensor"),
        (lambda: torch.zeros(128, 1).to_sparse_csr(), "torch.sparse_csr tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]), "nested tensor"),
        (lambda: torch.empty(128, device="meta"), "meta tensor"),
        (lambda: torch.quantize_per_tensor(torch.zeros(128), 0.1, 0, torch.qint8), "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, about such tensors
def test_tensors_that_are_no_plain_block_of_numbers(make, words, file):
    torch.save({**dense_state(DEIT), "norm.bias": make()}, file)
    assert f"has norm.bias as {words}" in refusal(file)


def test_plain_views_are_read(file):
    state = dense_state(DEIT)
    whole = torch.randn(256)
    state["norm.bias"] = whole[128:]
    state["head.weight"] = state["head.weight"].T.contiguous().T
    torch.save(state, file)
    assert load_checkpoint(file).state["norm.bias"].equal(whole[128:])


def test_negative_variances(file):
    state = dense_state(LVVIT)
    state["patch_embed.bn2.running_var"][5] = -0.5
    torch.save(state, file)
    assert "has negative variances in patch_embed.bn2.running_var" in refusal(file)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["blocks.3.mlp.fc2.bias", "patch_embed.bn2.running_var"])
def test_weights_that_are_not_finite(bad, key, file):
    state = dense_state(LVVIT)
    state[key][5] = bad
    torch.save(state, file)
    assert f"NaN or infinite values in {key}" in refusal(file)


def test_weights_that_float32_cannot_hold(file):
    state = dense_state(DEIT)
    state["norm.bias"] = torch.full((128,), 1e300, dtype=torch.float64)
    torch.save(state, file)
    assert "NaN or infinite values in norm.bias" in refusal(file)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -0.001, float("-inf")])
def test_thresholds_that_cannot_be(bad, file):
    state = released_state(DEIT)
    state["score_predictor.1.keep_threshold"] = torch.tensor(bad)
    torch.save({"model": state}, file)
    assert f"has threshold thresholds.1 = {bad:g}; thresholds are finite and above 0" in refusal(
        file
    )


@pytest.mark.parametrize(("drop", "add", "found"), [(2, None, 2), (None, 3, 4), (1, 5, 3)])
def test_wrong_number_of_thresholds(drop, add, found, file):
    state = released_state(DEIT)
    if drop is not None:
        del state[f"score_predictor.{drop}.keep_threshold"]
    if add is not None:
        state[f"score_predictor.{add}.keep_threshold"] = torch.tensor(0.1)
    torch.save({"model": state}, file)
    assert f"has {found} thresholds" in refusal(file)


def test_a_threshold_under_both_names(file):
    torch.save({**released_state(DEIT), "thresholds.0": torch.tensor(0.1)}, file)
    words = "has both thresholds.0 and score_predictor.0.keep_threshold, which are one; leave one"
    assert words in refusal(file)


def test_thresholds_of_one_element_are_scalars_and_longer_ones_refused(file):
    state = released_state(DEIT)
    state["score_predictor.0.keep_threshold"] = torch.tensor([0.004])
    torch.save({"model": state}, file)
    assert load_checkpoint(file).state["thresholds.0"].shape == ()
    state["score_predictor.0.keep_threshold"] = torch.tensor([0.004, 0.005])
    torch.save({"model": state}, file)
    assert "thresholds.0 of shape [2]" in refusal(file)


# --- our own format -----------------------------------------------------------------------------


def rewrite(path, **metadata):
    """The same weights with other metadata; None takes a field out."""
    with safe_open(path, "pt") as file:
        fields = {**unsealed(file.metadata()), **metadata}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    fields = {key: value for key, value in fields.items() if value is not None}
    safetensors.torch.save_file(tensors, path, fields)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"schema": "7"}, "has schema 7, this version reads up to 6; update the tool"),
        ({"schema": "one"}, "does not say its schema"),
        ({"schema": None}, "does not say its schema"),
        ({"arch": None}, "does not say its arch"),
        ({"arch": "as_deit_small"}, "says it is as_deit_small but holds as_deit_xs"),
        ({"image_size": "banana"}, "says image_size 'banana' but holds 64"),
        ({"image_size": "128"}, "says image_size '128' but holds 64"),
        ({"num_classes": "-3"}, "says num_classes '-3' but holds 7"),
        ({"budget": "abc"}, "says budget 'abc', which is no number above 0"),
        ({"budget": "nan"}, "says budget 'nan'"),
        ({"budget": "inf"}, "says budget 'inf'"),
        ({"budget": "-0.5"}, "says budget '-0.5'"),
        ({"classes": "not json"}, "says classes 'not json', which is no JSON list of 7 names"),
        ({"classes": '["a", "b"]'}, "no JSON list of 7 names"),
        ({"classes": "7"}, "no JSON list of 7 names"),
        ({"classes": "[1, 2, 3, 4, 5, 6, 7]"}, "no JSON list of 7 names"),
        ({"classes": "[" * 100_000}, "no JSON list of 7 names"),
    ],
)
def test_metadata_that_does_not_fit(metadata, words, tmp_path):
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, network(DEIT), {})
    artifact.sidecar_path(path).unlink()  # the metadata alone is under test
    rewrite(path, **metadata)
    assert words in refusal(path)


def test_metadata_that_fits_is_handed_on(tmp_path):
    path = tmp_path / "own.safetensors"
    metadata = {"budget": "0.7", "classes": '["a", "b", "c", "d", "e", "f", "g"]'}
    save_checkpoint(path, network(DEIT), metadata)
    assert metadata.items() <= load_checkpoint(path, image_size=128).metadata.items()


def test_where_a_checkpoint_cannot_be_written(tmp_path):
    for path, words in (
        (tmp_path / "own.pt", "name in .safetensors"),
        (tmp_path / "gone" / "own.safetensors", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            save_checkpoint(path, network(DEIT), {})
    assert os.listdir(tmp_path) == []
