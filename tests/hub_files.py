"""Folders as transformers and its hub write them, made without either."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from checkpoint_files import HF, PREPROCESSOR, dense_state
from torch import Tensor

CONFIG: dict[str, Any] = {**HF, "architectures": ["ViTForImageClassification"]}
_NAMES = (
    (r"(cls_token)", r"vit.embeddings.\1"),
    (r"pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"vit.encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"vit.encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"vit.encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"vit.encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"vit.encoder.layer.\1.output.dense.\2"),
    (r"norm\.(\w+)", r"vit.layernorm.\1"),
    (r"head\.(\w+)", r"classifier.\1"),
)


def vit_state(seed: int = 0) -> dict[str, Tensor]:
    """The thin network of `checkpoint_files` under the names of ViTForImageClassification."""
    made: dict[str, Tensor] = {}
    for key, value in dense_state(seed).items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", key):
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                name = f"vit.encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"
                made[name] = third.contiguous()
            continue
        pattern, theirs = next(row for row in _NAMES if re.fullmatch(row[0], key))
        made[re.sub(pattern, theirs, key)] = value
    return made


def write_json(folder: Path, **files: Any) -> None:
    """JSON files by their stems; text as it is."""
    for stem, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.json").write_text(text)


def vit_folder(folder: Path, **files: Any) -> Path:
    """A folder of `save_pretrained`: weights, config and preprocessor; keywords replace those."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(vit_state(), folder / "model.safetensors")
    write_json(folder, **{"config": CONFIG, "preprocessor_config": PREPROCESSOR, **files})
    return folder


def sharded(folder: Path, count: int = 3, **files: Any) -> Path:
    """The same in shards."""
    vit_folder(folder, **files)
    (folder / "model.safetensors").unlink()
    state = vit_state()
    names, places = sorted(state), {}
    for i in range(count):
        shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = names[i::count]
        safetensors.torch.save_file({name: state[name] for name in part}, folder / shard)
        places.update(dict.fromkeys(part, shard))
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cached(cache: Path, repository: str, commit: str = "c" * 40, make: Any = vit_folder) -> Path:
    """A repository as huggingface_hub keeps it: blobs, and a snapshot of links to them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    made = make(root / "made")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(made.iterdir())):
        blob = file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    made.rmdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return snapshot
