"""What `--ckpt` takes: a file, a hub's folder, a trainer's, an index of shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import PREPROCESSOR, dense_state
from conftest import raises_one_line, refused
from hub_files import CONFIG, sharded, vit_folder, vit_state, write_json
from PIL import Image

import asvit_deploy
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.checkpoints.places import files_of, fingerprint, name_of
from asvit_deploy.errors import UserError


def same(path: Path) -> bool:
    """Whether a checkpoint holds the thin network."""
    state, wanted = load_checkpoint(path).state, dense_state()
    return state.keys() == wanted.keys() and all(state[k].equal(v) for k, v in wanted.items())


def notes(path: Path) -> str:
    return "\n".join(load_checkpoint(path).lines)


def test_a_folder_is_its_weights_with_its_configs(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds")
    assert same(folder)
    found = load_checkpoint(folder)
    assert found.path == folder / "model.safetensors"
    assert found.config.preprocessing.mean == (0.4,) * 3
    assert found.config.eps == 1e-6


def test_a_folder_of_torch_weights(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds")
    (folder / "model.safetensors").unlink()
    torch.save(vit_state(), folder / "pytorch_model.bin")
    assert same(folder)


def test_a_trainers_folder_is_a_hub_folder(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "run")
    for step in ("checkpoint-500", "checkpoint-1000"):
        vit_folder(folder / step)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save({"anything": 1}, folder / name)
    write_json(folder, trainer_state={"global_step": 1000})
    assert same(folder)
    assert load_checkpoint(folder).path == folder / "model.safetensors"
    (folder / "model.safetensors").unlink()
    raises_one_line(lambda: load_checkpoint(folder), "checkpoint-1000, checkpoint-500", "name one")


def test_the_only_checkpoint_of_a_folder_is_taken_with_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    torch.save(dense_state(), folder / "best.pth")
    assert "the only checkpoint of the folder" in notes(folder)
    torch.save(dense_state(), folder / "last.pth")
    raises_one_line(lambda: load_checkpoint(folder), "2 checkpoints (best.pth, last.pth)")


def test_two_sets_of_the_same_weights(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds")
    torch.save(vit_state(), folder / "pytorch_model.bin")
    assert "lie beside it as pytorch_model.bin" in notes(folder)
    assert same(folder)


def test_two_sets_of_weights_that_differ(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds")
    torch.save(vit_state(seed=1), folder / "pytorch_model.bin")
    raises_one_line(
        lambda: load_checkpoint(folder), str(folder), "model.safetensors and pytorch_model.bin",
        "differ", "name the file",
    )  # fmt: skip
    assert same(folder / "model.safetensors")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 88245056\n"
# What has the name of weights and is none, and how it is called.
NO_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a dangling link": (lambda file: file.symlink_to("gone"), "a link to nothing"),
    "a folder": (lambda file: file.mkdir(), "a folder"),
    "a pointer": (lambda file: file.write_text(POINTER), "a Git-LFS pointer, not the weights"),
    "a pipe": (lambda file: os.mkfifo(file), "no regular file"),
}


@pytest.mark.parametrize("other", ["pytorch_model.bin", "best.pth"])
@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_what_is_no_weights_hides_none(case: str, other: str, tmp_path: Path) -> None:
    folder, (make, what) = tmp_path / "birds", NO_WEIGHTS[case]
    folder.mkdir()
    make(folder / "model.safetensors")
    torch.save(dense_state(), folder / other)
    assert same(folder)
    assert load_checkpoint(folder).path == folder / other
    assert files_of(folder) == (folder / other,)
    assert f"model.safetensors beside it is {what}; it is passed over" in notes(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "best.pth"])
@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_a_folder_of_what_is_no_weights(case: str, name: str, tmp_path: Path) -> None:
    folder, (make, what) = tmp_path / "birds", NO_WEIGHTS[case]
    folder.mkdir()
    make(folder / name)
    if (name, case) == ("best.pth", "a folder"):  # a run's, as any other
        what = "it has best.pth/"
    raises_one_line(lambda: load_checkpoint(folder), str(folder), "without weights", name, what)
    raises_one_line(lambda: files_of(folder), str(folder), "without weights", name, what)


def test_a_pointer_to_weights(tmp_path: Path) -> None:
    (tmp_path / "last.pth").write_text(POINTER)
    torch.save(dense_state(), tmp_path / "best.pth")
    raises_one_line(lambda: load_checkpoint(tmp_path / "last.pth"), "Git-LFS", "`git lfs pull`")
    assert same(tmp_path)
    assert "last.pth beside it is a Git-LFS pointer" in notes(tmp_path)


def test_pointers_to_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "birds")
    (folder / FIRST).write_text(POINTER)
    raises_one_line(lambda: load_checkpoint(folder), "did not fetch", FIRST, "`git lfs pull`")
    torch.save(vit_state(), folder / "pytorch_model.bin")
    assert same(folder)
    assert f"an index of shards that Git LFS did not fetch ({FIRST})" in notes(folder)


def test_two_files_of_which_one_is_damaged(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    raises_one_line(lambda: load_checkpoint(folder), "(model.safetensors, pytorch_model.bin)",
                    "of which pytorch_model.bin is truncated")  # fmt: skip


LONG = "a" * 5000


@pytest.mark.parametrize(
    "path", [LONG, f"{LONG}/model.safetensors", "a/" * 2500, "model.safetensors.index.json" + LONG]
)
def test_paths_that_no_file_can_have(path: str) -> None:
    for call in (load_checkpoint, asvit_deploy.load):
        with pytest.raises(UserError) as caught:
            call(Path(path))
        assert "check the path" in str(caught.value)
        assert len(str(caught.value)) < 400
    assert not name_of(Path(path)).startswith("/")


def test_a_path_with_a_zero() -> None:
    raises_one_line(lambda: load_checkpoint(Path("a\0b")), "does not exist")


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    """Its sidecar's would be too long, so it has none."""
    path = tmp_path / f"{'a' * 251}.pth"
    torch.save(dense_state(), path)
    assert same(path)


def test_an_index_of_one_shard(tmp_path: Path) -> None:
    lines = notes(sharded(tmp_path / "birds", 1)).splitlines()
    assert any(line.endswith("its weights lie in 1 shard") for line in lines)


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards_by_their_folder_or_their_index(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "birds")
    assert same(folder / name)
    assert "3 shards" in notes(folder / name)
    assert load_checkpoint(folder / name).config.preprocessing.mean == (0.4,) * 3


def test_shards_of_torch(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds")
    (folder / "model.safetensors").unlink()
    state, places = vit_state(), {}
    for i, names in enumerate((sorted(state)[:20], sorted(state)[20:])):
        shard = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({key: state[key] for key in names}, folder / shard)
        places.update(dict.fromkeys(names, shard))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(folder)


FIRST = "model-00001-of-00003.safetensors"


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def rewrite(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


def shard(folder: Path, change: Callable[[dict], object]) -> None:
    state = safetensors.torch.load_file(folder / FIRST)
    change(state)
    safetensors.torch.save_file(state, folder / FIRST)


def lie_in_two(folder: Path) -> None:
    other = next(key for key, name in index(folder)["weight_map"].items() if name != FIRST)
    shard(folder, lambda state: state.update({other: torch.zeros(1)}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (lambda f: (f / FIRST).unlink(), f"not there ({FIRST})"),
    "a tensor less": (lambda f: shard(f, dict.popitem), "tensors that its shards lack"),
    "a tensor twice": (lie_in_two, "that both hold"),
    "a tensor more": (lambda f: shard(f, lambda s: s.update(extra=torch.zeros(1))),
                      "does not name all that its shards hold (extra)"),
    "a damaged shard": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-9]),
                        "truncated or damaged"),
    "no JSON": (lambda f: rewrite(f, "{"), "cut or no JSON"),
    "no map": (lambda f: rewrite(f, {"metadata": {}}), "no weight_map"),
    "elsewhere": (lambda f: rewrite(f, {"weight_map": {"a": "../secret.safetensors"}}),
                  "no file beside it"),
    "a long name": (lambda f: rewrite(f, {"weight_map": {LONG: f"{LONG}.bin"}}),
                    "no file beside it"),
    "a name of 300 bytes": (lambda f: rewrite(f, {"weight_map": {"a": 150 * "é"}}),
                            "no file beside it"),
    "a long key": (lambda f: rewrite(f, {"weight_map": {**index(f)["weight_map"], LONG: FIRST}}),
                   "tensors that its shards lack"),
    "a number": (lambda f: rewrite(f, {"weight_map": {"a": 1}}), "no file beside it"),
    "many": (lambda f: rewrite(f, {"weight_map": {str(i): f"{i}.bin" for i in range(999)}}),
             "999 shards"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_shards_that_do_not_fit_their_index(case: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "birds")
    change, words = BROKEN[case]
    change(folder)
    raises_one_line(lambda: load_checkpoint(folder), "model.safetensors.index.json", words)
    with pytest.raises(UserError, match="index") as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 600


def test_one_shard_is_no_checkpoint(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "birds")
    raises_one_line(lambda: load_checkpoint(folder / FIRST), "one shard of several", "index.json")
    (folder / "model.safetensors.index.json").unlink()
    raises_one_line(lambda: load_checkpoint(folder), "without their index")


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_json(folder, adapter_config={"peft_type": "LORA"})
    key = "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight"
    safetensors.torch.save_file({key: torch.zeros(8, 384)}, folder / "adapter_model.safetensors")


EMPTY: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "nothing": (lambda f: shutil.rmtree(f) or f.mkdir(), ("without weights", "empty")),
    "configs": (lambda f: (f / "model.safetensors").unlink(),
                ("without weights (it has config.json, preprocessor_config.json)",)),
    "TensorFlow": (lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"),
                   ("without PyTorch's weights (it has tf_model.h5)",)),
    "an adapter": (adapter, ("PEFT adapter", "merge_and_unload")),
    "an adapter beside": (lambda f: write_json(f, adapter_config={}), ("PEFT adapter",)),
}  # fmt: skip


@pytest.mark.parametrize("case", EMPTY)
def test_folders_without_a_network(case: str, tmp_path: Path, cli: Callable) -> None:
    folder = vit_folder(tmp_path / "birds")
    change, words = EMPTY[case]
    change(folder)
    refused(cli("export", "--ckpt", folder, "--dense"), str(folder), *words)
    assert not list(Path.cwd().glob("*.onnx"))


def test_adapters_by_their_keys(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds")
    adapter(folder)
    raises_one_line(lambda: load_checkpoint(folder / "adapter_model.safetensors"), "PEFT adapter",
                    "merge")  # fmt: skip
    state = {f"base_model.model.{key}": value for key, value in vit_state().items()}
    name = "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.default.weight"
    torch.save({**state, name: torch.zeros(8, 384)}, tmp_path / "unmerged.pt")
    raises_one_line(lambda: load_checkpoint(tmp_path / "unmerged.pt"), "PEFT adapter", "merge")


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("siglip", ("a SigLIP", "pass a CLIP")), ("siglip2", ("SigLIP 2",)),
        ("siglip_vision_model", ("a SigLIP",)), ("dinov3_vit", ("a DINOv3", "rotary", "DINOv2")),
        ("eva02", ("an EVA-02",)), ("beit", ("a BEiT",)), ("data2vec-vision", ("a Data2Vec",)),
        ("swin", ("a Swin",)), ("swinv2", ("a Swin V2",)), ("convnext", ("a ConvNeXt",)),
        ("resnet", ("a ResNet", "no tokens")), ("vit_mae", ("a ViT-MAE", "pass its encoder")),
        ("yolos", ("such a network",)),
        ("clip", ("holds transformers ViT where config.json says model_type 'clip'",)),
        ("dinov2", ("holds transformers ViT where config.json says model_type 'dinov2'",)),
        ("bert", ("holds transformers ViT where config.json says model_type 'bert'",)),
    ],
)  # fmt: skip
def test_configs_of_other_networks(model_type: str, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds", config={**CONFIG, "model_type": model_type})
    raises_one_line(lambda: load_checkpoint(folder), str(folder / "model.safetensors"), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Dinov2Backbone", "one for each patch"), ("ViTForMaskedImageModeling", "each patch"),
        ("Dinov2ForDepthEstimation", "each patch"), ("ViTForSemanticSegmentation", "each patch"),
        ("CLIPForImageClassification", "mean of a CLIP's tokens"),
        ("CLIPTextModel", "reads texts"),
    ],
)  # fmt: skip
def test_classes_whose_output_is_no_vector(name: str, words: str, tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds", config={**CONFIG, "architectures": [name]})
    raises_one_line(lambda: load_checkpoint(folder), "model.safetensors", name, words)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"image_size": 64}, "image_size 64"), ({"num_hidden_layers": 12}, "num_hidden_layers 12"),
        ({"num_attention_heads": 5}, "5 heads"), ({"hidden_size": 768}, "hidden_size 768"),
        ({"patch_size": 14}, "patch_size 14"), ({"intermediate_size": 1536}, "1536"),
        ({"use_swiglu_ffn": True}, "gated MLP"), ({"hidden_act": "silu"}, "'silu'"),
        ({"num_channels": 1}, "1 channels"), ({"id2label": None}, "num_labels 2"),
        ({"image_size": [32, 64]}, "[32, 64]"),
    ],
)  # fmt: skip
def test_configs_that_lie(lie: dict, words: str, tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds", config={**CONFIG, **lie})
    raises_one_line(lambda: load_checkpoint(folder), "model.safetensors", "config.json", words)


@pytest.mark.parametrize("size", [[224, 336], {"height": 448, "width": 112}])
@pytest.mark.parametrize("asked", [None, 32])
def test_oblong_pictures(size: object, asked: int | None, tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "birds", config={**CONFIG, "image_size": size})
    raises_one_line(lambda: load_checkpoint(folder, asked), "model.safetensors", "config.json",
                    "px wide", "only square")  # fmt: skip


def test_registers_that_are_not_there(tmp_path: Path) -> None:
    state = {**dense_state(), "reg_token": torch.zeros(1, 4, 384)}
    folder = vit_folder(tmp_path / "birds", config={**CONFIG, "architectures": None})
    safetensors.torch.save_file(state, folder / "model.safetensors")
    raises_one_line(lambda: load_checkpoint(folder), "holds registers 4", "model_type vit")


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    config = {**CONFIG, "auto_map": {"AutoModel": "modeling_birds.Birds"}}
    folder = vit_folder(tmp_path / "birds", config=config)
    (folder / "modeling_birds.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "code of its own (auto_map), which is not run" in notes(folder)
    assert not (tmp_path / "ran").exists()


def test_outputs_that_are_a_yes_or_no_each(tmp_path: Path) -> None:
    config = {**CONFIG, "problem_type": "multi_label_classification"}
    assert "problem_type multi_label_classification" in notes(
        vit_folder(tmp_path / "birds", config=config)
    )


def test_a_processor_within_a_processor(tmp_path: Path) -> None:
    """transformers 5 writes one file for a CLIP's tokenizer and its image processor."""
    folder = vit_folder(tmp_path / "birds", preprocessor_config="{}",
                        processor_config={"image_processor": PREPROCESSOR})  # fmt: skip
    (folder / "preprocessor_config.json").unlink()
    assert load_checkpoint(folder).config.preprocessing.mean == (0.4,) * 3
    assert "from processor_config.json" in notes(folder)


def test_names_of_outputs(tmp_path: Path) -> None:
    for made in (vit_folder(tmp_path / "birds"), sharded(tmp_path / "a.b" / "birds")):
        assert name_of(made) == "birds"
    assert name_of(tmp_path / "birds" / "model.safetensors") == "model"
    assert name_of(tmp_path / "a.b" / "birds" / "model.safetensors.index.json") == "model"
    assert name_of(Path("as_deit_s.pth.tar")) == "as_deit_s"


def test_a_fingerprint_sees_each_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "birds")
    before = fingerprint(folder)
    assert before == fingerprint(folder / "model.safetensors.index.json")
    shard(folder, lambda state: state.update({k: v + 1 for k, v in state.items()}))
    assert fingerprint(folder) != before


@pytest.mark.slow
def test_commands_take_folders(tmp_path: Path, cli: Callable) -> None:
    """Export, check against the shards, and notice that one has changed."""
    folder = sharded(tmp_path / "birds")
    made = cli(
        "calibrate", "--ckpt", folder, "--budget", 0.8, "--limit", 8, "--method", "threshold"
    )
    assert made.code == 0, made.err
    assert Path("birds.calibrated.safetensors").is_file()
    done = cli("export", "--ckpt", folder, "--dense")
    assert (done.code, done.out.strip()) == (0, "birds.dense.onnx"), done.err
    source = json.loads(Path("birds.dense.onnx.json").read_text())["source"]
    assert len(source["shards"]) == 3
    checked = cli("check", "birds.dense.onnx", "--limit", 4)
    assert checked.code == 0, checked.err
    assert asvit_deploy.evaluate(folder, data=labelled()).rows[0]["images"] == 7
    shard(folder, lambda state: state.update({k: v + 1 for k, v in state.items()}))
    refused(cli("check", "birds.dense.onnx", "--limit", 4), FIRST, "changed")
    (folder / FIRST).unlink()
    refused(cli("check", "birds.dense.onnx", "--limit", 4), FIRST, "is gone")


@pytest.mark.slow
def test_finetune_takes_folders_and_knows_them_again(tmp_path: Path, cli: Callable) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(default_checkpoint(), folder)
    run = ("finetune", "--data", "digits", "--pretrained", folder, "--teacher", folder, "--steps",
           1, "--batch-size", 2, "--validation-limit", 2, "-o", "t.safetensors")  # fmt: skip
    done = cli(*run)
    assert done.code == 0, done.err
    assert "the only checkpoint of the folder" in done.err
    weights = next(folder.iterdir())
    refused(cli(*run[:-1], weights, "--force"), "the input itself")


def labelled() -> Path:
    """A picture of each class, to train on and to judge by."""
    for part in ("train", "val"):
        for i in range(7):
            place = Path("pictures", part, str(i))
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (30 * i, 99, 9)).save(place / "a.png")
    return Path("pictures")


def test_an_input_is_never_replaced(tmp_path: Path, cli: Callable) -> None:
    folder = sharded(tmp_path / "birds")
    before = (folder / FIRST).read_bytes()
    refused(cli("calibrate", "--ckpt", folder, "-o", folder / FIRST, "--force"), "the input itself")
    assert (folder / FIRST).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["calibrate", "export", "finetune"])
def test_networks_that_average_their_tokens(command: str, tmp_path: Path, cli: Callable) -> None:
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v
             for k, v in dense_state().items()}  # fmt: skip
    torch.save(state, "mean.pth")
    arguments = {"calibrate": ("--ckpt", "mean.pth", "--method", "threshold"),
                 "export": ("--ckpt", "mean.pth", "--method", "evit"),
                 "finetune": ("--data", "digits", "--pretrained", "mean.pth")}  # fmt: skip
    refused(cli(command, *arguments[command]), "mean.pth averages its tokens",
            "pass --method with one of size-passing, tome", "--dense")  # fmt: skip
    if command == "export":
        assert cli("export", "--ckpt", "mean.pth", "--dense").code == 0


def test_one_shard_of_one_is_a_whole_network(tmp_path: Path) -> None:
    path = vit_folder(tmp_path / "birds") / "model.safetensors"
    alone = path.rename(path.with_name("weights-00001-of-00001.safetensors"))
    assert load_checkpoint(alone).config.depth == load_checkpoint(alone.parent).config.depth
