"""Checkpoints in and out: every foreign format enters here, and only here.

Whatever comes in leaves as a clean state dict under our own names, float32, complete, finite and
of the right shapes, or as one `UserError` that names the file, what is wrong and the mend.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asvit_deploy import artifact
from asvit_deploy.artifact import provenance
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.registry import ARCHS, ArchConfig
from asvit_deploy.models.registry import arch as arch_by_name
from asvit_deploy.models.vit import AdaptiveViT

FORMAT = "asvit-deploy"
SCHEMA = 2  # 2 tells stages of its own, which 1 did not know
# Under these keys a training script keeps its weights, and a moving average of them.
_WEIGHTS, _EMA = ("model", "state_dict"), ("model_ema", "state_dict_ema")
_FOREIGN_THRESHOLD = re.compile(r"^score_predictor\.(\d+)\.keep_threshold$")
_THRESHOLD = re.compile(r"^thresholds\.(\d+)$")
_OLD_TORCH = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before its zip files
)
_LISTED = 3  # keys that a message names before it says how many more there are

Refuse = Callable[[str], NoReturn]


@dataclass(frozen=True)
class Checkpoint:
    """What a file held, under our names.

    `state` is complete and finite; its thresholds are float32 scalars `thresholds.0` … in stage
    order, present exactly when `adaptive`. `format` is one of "asvit-deploy", "as-vit", "deit" and
    "lv-vit"; `metadata` is what an asvit-deploy file says of itself, empty for the others.
    """

    config: ArchConfig
    state: dict[str, Tensor]
    adaptive: bool
    path: Path
    format: str
    metadata: dict[str, str]


def load_checkpoint(
    path: Path, image_size: int | None = None, arch: str | None = None, ema: bool = False
) -> Checkpoint:
    """Read a checkpoint of any known format; nothing that it holds is ever executed.

    Args:
        path: AS-ViT, DeiT, timm or LV-ViT file of torch.save, or `.safetensors`.
        image_size: pixels; the position embeddings are resized to it. By default, the file's own.
        arch: settles which architecture it is where the shapes fit several.
        ema: take the moving average of the weights where the file has one beside them.

    Raises:
        UserError: the file cannot be read, does not hold exactly one known network, or is ours and
            has a sidecar that was edited or belongs to another file.
    """
    path = Path(path)

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{path} {reason}")

    content, metadata = _read(path, refuse)
    ours = metadata.get("format") == FORMAT
    if ours:
        _check_schema(metadata, refuse)
        if artifact.sidecar_path(path).is_file():
            artifact.read(path)  # refuses a sidecar that does not belong to it
    raw = _strip_prefix(_select(content, ema, refuse))
    _refuse_relatives(raw, refuse)
    state = _renamed(raw, refuse)
    config = _infer_config(state, metadata.get("arch") if ours else None, arch, refuse)
    if ours:
        _check_told(metadata, config, refuse)
        config = _staged(metadata, config, refuse)
    adaptive = any(map(_THRESHOLD.match, state))
    state = _checked(state, config, adaptive, refuse)
    if image_size is not None and image_size != config.image_size:
        try:
            target = config.at(image_size)
        except UserError as error:
            refuse(f"cannot be loaded at another size: {error}")
        state["pos_embed"] = _resize(state["pos_embed"], config.grid, target.grid)
        config = target
    return Checkpoint(
        config=config,
        state=state,
        adaptive=adaptive,
        path=path,
        format=FORMAT if ours else _format_of(config, adaptive),
        metadata=metadata if ours else {},
    )


def build_model(checkpoint: Checkpoint, dense: bool = False) -> AdaptiveViT:
    """The network of a checkpoint in eval mode, float32, on the CPU; `dense` drops thresholds."""
    adaptive = checkpoint.adaptive and not dense
    with torch.device("meta"):  # no time spent on an initialisation that is replaced at once
        model = build(checkpoint.config, adaptive)
    model.to_empty(device="cpu")
    wanted = {k: v for k, v in checkpoint.state.items() if adaptive or not _THRESHOLD.match(k)}
    model.load_state_dict(wanted, strict=True)
    return model.eval()


def save_checkpoint(path: Path, model: AdaptiveViT, metadata: dict[str, str]) -> None:
    """Write a model as `.safetensors` and its sidecar, whole or not at all.

    Args:
        metadata: text or JSON, told beside the weights; format, schema, arch, image_size,
            num_classes and, where they are not the arch's own, stages are added and cannot be
            overridden.

    Raises:
        UserError: another suffix than `.safetensors`, a weight or threshold that is not finite, or
            the folder cannot be written.
    """
    path, config = Path(path), model.config
    if path.suffix != ".safetensors":
        raise UserError(f"{path} cannot be written: give the checkpoint a name in .safetensors")
    own = {
        "format": FORMAT,
        "schema": "1",
        "arch": config.name,
        "image_size": str(config.image_size),
        "num_classes": str(config.num_classes),
    }
    if config.stages != ARCHS[config.name].stages:
        own |= {"schema": "2", "stages": json.dumps(config.stages)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if odd := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(
            f"{path} is not written: {_list(odd)} holds NaN or infinite values; "
            "lower the learning rate, or start from other weights"
        )
    told = {**metadata, **own}
    fields = {"kind": "checkpoint", **provenance(["torch", "safetensors"])}
    fields |= {key: _parsed(value) for key, value in told.items() if key != "schema"}
    fields["thresholds"] = model.threshold_values()
    artifact.write(path, safetensors.torch.save(tensors, told), fields)


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


# --- bytes -> objects ---------------------------------------------------------------------------


def _read(path: Path, refuse: Refuse) -> tuple[Any, dict[str, str]]:
    """The objects in a file, and the metadata of a `.safetensors`; told apart by content."""
    if path.is_dir():
        refuse("is a folder; name the checkpoint file in it")
    if path.exists() and not path.is_file():  # a pipe would be waited for
        refuse("is no regular file; name a checkpoint file")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        refuse("does not exist; check the path")
    except OSError as error:
        refuse(f"cannot be read: {error.strerror}; check its permissions")
    if not head:
        refuse("is empty; copy or download it again")
    # A safetensors file starts with the length of its header, which is JSON.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return _read_safetensors(path, refuse)
    return _read_torch(path, refuse), {}


def _read_safetensors(path: Path, refuse: Refuse) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError:
        refuse("is truncated or damaged; copy or download it again")


def _read_torch(path: Path, refuse: Refuse) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them comes as an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch answers to bad bytes with nearly any exception
        _refuse_unread(path, str(error), refuse)


def _refuse_unread(path: Path, message: str, refuse: Refuse) -> NoReturn:
    """Say in one line why torch.load did not read a file."""
    # torch names what it would have had to import: "Unsupported global: GLOBAL a.B was not an
    # allowed global" or, for modules it never allows, "unsupported GLOBAL a.B whose module".
    code = re.search(r"unsupported (?:global: )?GLOBAL ([\w.]+)", message, re.I)
    if code or re.search(r"unsupported class|trying to call reduce", message, re.I):
        name = f" ({code[1]})" if code else ""
        refuse(f"holds pickled code{name}, which was not run; save only the model's state_dict()")
    if "TorchScript" in message:
        refuse("is a TorchScript archive; save the model's state_dict() instead")
    with open(path, "rb") as file:
        head = file.read(len(_OLD_TORCH))
    if head == _OLD_TORCH or (head[:4] == b"PK\x03\x04" and _cut_or_torch_zip(path)):
        refuse("is truncated or damaged; copy or download it again")
    if head[:1] == b"\x80" and "Unsupported operand" in message:
        refuse("is a pickle that torch.save did not write; it was not run; name a checkpoint file")
    refuse("is not a checkpoint (neither safetensors nor torch.save); name a file that holds one")


def _cut_or_torch_zip(path: Path) -> bool:
    """Whether a zip file has lost its end, or holds what torch.save puts into one."""
    if not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return True


# --- objects -> state dict ----------------------------------------------------------------------


def _check_schema(metadata: Mapping[str, str], refuse: Refuse) -> None:
    schema = metadata.get("schema", "")
    if not schema.isdecimal():
        refuse("does not say its schema; write it again with this tool")
    if int(schema) > SCHEMA:
        refuse(f"has schema {schema}, this version reads up to {SCHEMA}; update the tool")
    if not {"arch", "image_size", "num_classes"} <= metadata.keys():
        refuse("does not say its arch, image_size and num_classes; write it again with this tool")


def _check_told(metadata: Mapping[str, str], config: ArchConfig, refuse: Refuse) -> None:
    """What our own file says of itself must fit its tensors: later steps take it from here."""
    for key, holds in (("image_size", config.image_size), ("num_classes", config.num_classes)):
        if metadata[key] != str(holds):
            refuse(
                f"says {key} {_quoted(metadata[key])} but holds {holds}; write it again with this "
                "tool"
            )
    if "budget" in metadata and not 0 < _number(metadata["budget"]) < math.inf:
        refuse(
            f"says budget {_quoted(metadata['budget'])}, which is no number above 0; write it "
            "again with this tool"
        )
    if "classes" in metadata:
        names = _parsed(metadata["classes"])
        fits = isinstance(names, list) and len(names) == config.num_classes
        if not fits or not all(isinstance(name, str) for name in names):
            refuse(
                f"says classes {_quoted(metadata['classes'])}, which is no JSON list of "
                f"{config.num_classes} names; write it again with this tool"
            )


def _staged(metadata: Mapping[str, str], config: ArchConfig, refuse: Refuse) -> ArchConfig:
    """The architecture with the stages that the file tells, where they are not its usual ones."""
    if "stages" not in metadata:
        return config
    stages = _parsed(metadata["stages"])
    try:
        return config.with_stages(stages if isinstance(stages, list) else [])
    except (UserError, TypeError):
        refuse(
            f"says stages {_quoted(metadata['stages'])}, which do not fit {config.name}; write it "
            "again with this tool"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _quoted(text: str) -> str:
    """Foreign text in one line, not too long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def _select(content: Any, ema: bool, refuse: Refuse) -> dict[str, Tensor]:
    """The state dict among what a training script saved."""
    if not isinstance(content, dict):
        refuse(f"holds a {type(content).__name__}, not a state dict; save the model's state_dict()")
    _refuse_ablations(content.get("args"), refuse)
    plain = [content[key] for key in _WEIGHTS if isinstance(content.get(key), dict)]
    average = [content[key] for key in _EMA if isinstance(content.get(key), dict)]
    if ema and not average:
        refuse("holds no moving average of its weights; drop --ema")
    # Where there are only averaged weights, those are meant.
    chosen = (average if ema or not plain else plain) or [content]
    state = chosen[0]
    odd = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if odd or not state:
        told = f"{_list(odd)} are no weights" if odd else "there are no weights in it"
        refuse(f"is no state dict: {told}; save the model's state_dict()")
    for key, value in state.items():
        # Before anything is computed from them: these fail, or grow, in the middle of it.
        if reason := _not_plain(value):
            refuse(f"has {key} as {reason}; save the weights as plain, contiguous tensors")
    return state


def _not_plain(value: Tensor) -> str | None:
    """What is odd about a tensor that is no block of numbers of its own, or None."""
    if value.is_nested:
        return "nested tensor"
    if value.is_meta:
        return "meta tensor, which has no values"
    if value.layout != torch.strided:
        return f"{value.layout} tensor"
    if value.is_quantized:
        return f"quantized {value.dtype} tensor"
    # A few bytes on disk can claim any size this way.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"view that repeats its values (shape {list(value.shape)})"
    return None


def _renamed(raw: Mapping[str, Tensor], refuse: Refuse) -> dict[str, Tensor]:
    """The release's name of a threshold becomes ours."""
    state: dict[str, Tensor] = {}
    for key, value in raw.items():
        ours = _FOREIGN_THRESHOLD.sub(r"thresholds.\1", key)
        if ours != key and ours in raw:
            refuse(f"has both {key} and {ours}, two thresholds of one stage; leave one of them")
        state[ours] = value
    return state


def _refuse_ablations(args: Any, refuse: Refuse) -> None:
    """The release declares flags it never passes on: a file with them set came from other code."""
    options = vars(args) if isinstance(args, argparse.Namespace) else args
    if isinstance(options, dict):
        for flag in ("accu", "ema_accu"):
            if options.get(flag):
                refuse(
                    f"was trained with --{flag} (accumulated scores), which is another method; "
                    "pass a file trained without it"
                )


def _strip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what DataParallel does to names."""
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _refuse_relatives(state: Mapping[str, Tensor], refuse: Refuse) -> None:
    """Networks that share most names with ours, yet are others."""
    if any(re.match(r"score_predictor\.\d+\.(in_conv|out_conv)\.", key) for key in state):
        refuse(
            "holds DynamicViT predictors (in_conv); AS-ViT needs keep_threshold: "
            "pass an AS-ViT file, or dense weights to `calibrate` or `finetune`"
        )
    if "dist_token" in state or any(key.startswith("head_dist.") for key in state):
        refuse(
            "is a distilled DeiT (dist_token, head_dist), which has a second class token that "
            "AS-ViT does not; pass the DeiT of the same size without distillation"
        )


# --- state dict -> architecture -----------------------------------------------------------------


def _infer_config(
    state: Mapping[str, Tensor], told: str | None, wanted: str | None, refuse: Refuse
) -> ArchConfig:
    """Find the row of the table that the shapes fit.

    Args:
        told: arch name in the file's own metadata.
        wanted: arch name the user gave.
    """
    fits = _fitting_archs(state, refuse)
    if wanted is not None and arch_by_name(wanted).name not in fits:
        refuse(f"holds {' or '.join(fits)}, not {wanted}; drop --arch or name another file")
    if told is not None and told not in fits:
        refuse(f"says it is {told} but holds {' or '.join(fits)}; write it again with this tool")
    name = wanted or told or fits[0]
    if wanted is None and told is None and len(fits) > 1:
        refuse(f"fits several architectures; pass --arch {' or --arch '.join(fits)}")
    row = ARCHS[name]
    tokens = state["pos_embed"].shape[1] - 1
    grid = round(max(tokens, 0) ** 0.5)
    if grid == 0 or grid * grid != tokens:
        refuse(f"has position embeddings for {tokens} image tokens; only square grids are read")
    return row.at(grid * row.patch_size, state["head.weight"].shape[0])


def _fitting_archs(state: Mapping[str, Tensor], refuse: Refuse) -> list[str]:
    """Names of the rows with the state's stem, width, depth, hidden width and patch."""
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "head.weight": 2}
    needed["blocks.0.mlp.fc1.weight"] = 2
    missing = [key for key in needed if key not in state]
    if len(missing) == len(needed):
        refuse(f"is no DeiT or LV-ViT checkpoint (keys such as {_list(state)}); name one that is")
    if missing:
        refuse(f"lacks {_list(missing)}; pass a complete DeiT, LV-ViT or AS-ViT checkpoint")
    for key, dims in needed.items():
        if state[key].ndim != dims or 0 in state[key].shape:
            refuse(f"has {key} of shape {list(state[key].shape)}; pass an unmodified checkpoint")
    stem = "conv" if "patch_embed.conv1.weight" in state else "patch"
    patch = state["patch_embed.proj.weight"].shape[3] * (2 if stem == "conv" else 1)
    dim = state["cls_token"].shape[2]
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in state)
    depth = len({match[1] for match in blocks if match})
    found = (stem, dim, depth, hidden, patch)
    rows = ARCHS.values()
    fits = [r.name for r in rows if (r.stem, r.dim, r.depth, r.hidden, r.patch_size) == found]
    if not fits:
        refuse(
            f"has width {dim}, depth {depth}, hidden width {hidden}, {patch}-pixel patches and a "
            f"{stem} stem, which fits no known architecture; known: {', '.join(ARCHS)}"
        )
    return fits


def _format_of(config: ArchConfig, adaptive: bool) -> str:
    if adaptive:
        return "as-vit"
    return "deit" if config.family == "deit" else "lv-vit"


# --- the state itself ---------------------------------------------------------------------------


def _checked(
    state: Mapping[str, Tensor], config: ArchConfig, adaptive: bool, refuse: Refuse
) -> dict[str, Tensor]:
    """The state in float32, once its keys, shapes, types and values are right."""
    thresholds = {key for key in state if _THRESHOLD.match(key)}
    expected_thresholds = {f"thresholds.{i}" for i in range(len(config.stages))}
    if adaptive and thresholds != expected_thresholds:
        refuse(
            f"has {len(thresholds)} thresholds ({_list(sorted(thresholds))}); {config.name} "
            f"has {len(config.stages)} stages and needs one for each"
        )
    with torch.device("meta"):
        expected = build(config, adaptive).state_dict()
    if extra := [key for key in state if key not in expected]:
        refuse(
            f"has keys that {config.name} does not know: {_list(extra)}; pass a plain checkpoint"
        )
    if missing := [key for key in expected if key not in state]:
        refuse(f"lacks {_list(missing)}; pass a complete checkpoint of {config.name}")
    clean = {}
    for key, like in expected.items():
        value = (
            state[key].reshape(()) if key in thresholds and state[key].numel() == 1 else state[key]
        )
        clean[key] = _converted(key, value, like, refuse)
    for key in sorted(thresholds):
        if not 0 < clean[key].item() < float("inf"):
            refuse(
                f"has threshold {key} = {clean[key].item():g}; thresholds are finite and above 0: "
                "calibrate the dense weights, or train again"
            )
    for key, value in clean.items():
        if not value.isfinite().all():
            refuse(f"has NaN or infinite values in {key}; pass a checkpoint that did not diverge")
        if key.endswith(".running_var") and value.min() < 0:
            refuse(f"has negative variances in {key}; pass an unmodified checkpoint")
    return clean


def _converted(key: str, value: Tensor, like: Tensor, refuse: Refuse) -> Tensor:
    """A weight in the type and shape of the model's own."""
    if value.shape != like.shape:
        refuse(
            f"has {key} of shape {list(value.shape)} where {list(like.shape)} is needed; "
            "pass an unmodified checkpoint"
        )
    if value.is_floating_point() != like.is_floating_point() or value.is_complex():
        refuse(f"has {key} as {value.dtype}; save the weights in plain float32")
    return value.to(like.dtype).contiguous()


def _resize(pos_embed: Tensor, grid: int, target: int) -> Tensor:
    """float32 [1, 1+grid^2, D] -> [1, 1+target^2, D], bicubic; the class token's row is kept."""
    cls_row, rows = pos_embed[:, :1], pos_embed[:, 1:]
    plane = rows.transpose(1, 2).unflatten(2, (grid, grid))  # (1, D, grid, grid)
    plane = F.interpolate(plane, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat([cls_row, plane.flatten(2).transpose(1, 2)], 1)


def _list(keys: Any) -> str:
    """The first few names, and how many more there are."""
    names = list(keys)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
