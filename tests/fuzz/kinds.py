"""Every kind of file that the tool reads: good ones, ways to spoil them, and how they are used."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.damage import BYTES, Files, changed_json, odd_values, resigned, spoiled


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        good: makes a folder of files that the tool takes.
        spoil: changes one of them, and says how.
        use: does with the folder what commands do; what it returns must be equal for a file that
            loads and for the good one, where `promised` says so.
        promised: ways of spoiling after which a file that loads must mean the same as before.
    """

    name: str
    good: Callable[[Path], None]
    spoil: Callable[[random.Random, Files], tuple[str, Files]]
    use: Callable[[Path], Any]
    promised: frozenset[str] = frozenset()


def files_of(folder: Path) -> Files:
    """All files of a folder, by their paths from it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def put_files(folder: Path, files: Files) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def by_bytes(rng: random.Random, files: Files) -> tuple[str, Files]:
    """One file of several, changed in one way."""
    name = rng.choice(sorted(files))
    way = rng.choice(BYTES)
    return f"{way.__name__} {name}", {**files, name: way(rng, files[name] or b"\0")}


# --- checkpoints --------------------------------------------------------------------------------


def good_checkpoint(folder: Path) -> None:
    """One of ours."""
    import torch

    from asvit_deploy.checkpoints.load import save_checkpoint
    from asvit_deploy.models import build
    from asvit_deploy.models.archs import arch

    torch.manual_seed(0)
    config = dataclasses.replace(arch("as_deit_mini"), image_size=32)
    model = build(config).eval()
    for stage, threshold in enumerate(model.thresholds):
        threshold.data.fill_(0.01 * (stage + 1))
    classes = json.dumps([f"class {i}" for i in range(config.num_classes)])
    save_checkpoint(folder / "x.safetensors", model, {"classes": classes})


def good_foreign(folder: Path) -> None:
    """timm's, with what lies beside it; and the AS-ViT release's, by torch.save."""
    import argparse

    import torch
    from checkpoint_files import TIMM, dense_state, hub_folder

    hub_folder(folder / "hub", config=TIMM)
    torch.save({"model": dense_state(), "args": argparse.Namespace(lr=1e-3, model="deit", ema=True),
                "epoch": 3}, folder / "x.pt")  # fmt: skip


def _resaved(rng: random.Random, files: Files) -> tuple[str, Files]:
    """Other objects in the place of those that scripts save, by torch.save itself."""
    import argparse

    import torch

    content = torch.load(io.BytesIO(files["x.pt"]), weights_only=False)
    odd = rng.choice((
        torch.ones(3), torch.ones(()), torch.ones(0, dtype=torch.complex64), torch.ones(2).half(),
        10**5000, float("nan"), None, [torch.ones(2)], {"a": torch.ones(2)}, {1, 2}, ("a",) * 3,
        "\x1b]0;x\a", torch.ones(3).to_sparse(), torch.tensor(True), "x" * 10_000,
    ))  # fmt: skip
    key = rng.choice(("args", "hyper_parameters", "config", "opt", "epoch", "model", "weight"))
    if key == "weight":
        content["model"][rng.choice(sorted(content["model"]))] = odd
    elif key in ("epoch", "model"):
        content[key] = odd
    else:
        name = rng.choice(("model", "arch", "ema", "mean", "std", "img_size", "heads", "crop_pct",
                           "num_classes", "global_pool", "distilled", "data", "dense"))  # fmt: skip
        content[key] = rng.choice((argparse.Namespace, dict))(**{name: odd})
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return f"resaved {key}", {**files, "x.pt": buffer.getvalue()}


def spoil_foreign(rng: random.Random, files: Files) -> tuple[str, Files]:
    if rng.random() < 0.35:
        return _resaved(rng, files)
    if rng.random() < 0.35:
        data = json.dumps(changed_json(rng, json.loads(files["hub/config.json"])))
        return "config", {**files, "hub/config.json": data.encode()}
    return by_bytes(rng, files)


def _metadata(rng: random.Random, files: Files) -> tuple[str, Files]:
    """Metadata of our own format, changed and sealed again."""
    import safetensors.torch

    from asvit_deploy.checkpoints.damage import sealed, unsealed

    state = safetensors.torch.load(files["x.safetensors"])
    size = int.from_bytes(files["x.safetensors"][:8], "little")
    kept = json.loads(files["x.safetensors"][8 : 8 + size])["__metadata__"]
    metadata = dict(unsealed(kept))
    key = rng.choice([*sorted(metadata), "reduction", "stages", "architecture", "budget"])
    value = odd_values(rng)
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode()
    else:
        from fuzz.damage import as_json

        text = as_json(value).decode()
    metadata[key] = rng.choice((text, json.dumps("x"), "9" * 5000, "²", "[" * 100_000))
    data = safetensors.torch.save(state, sealed(state, metadata))
    return f"metadata {key}", {"x.safetensors": data}  # without the sidecar, which knows better


def spoil_checkpoint(rng: random.Random, files: Files) -> tuple[str, Files]:
    chance = rng.random()
    if chance < 0.3:
        return _metadata(rng, files)
    if chance < 0.45:
        name = "x.safetensors.json"
        return "sidecar", {**files, name: resigned(rng, files[name])}
    if chance < 0.6:  # the weights alone: a copy without its sidecar
        way = rng.choice(BYTES)
        data = way(rng, files["x.safetensors"])
        return f"{way.__name__} alone", {"x.safetensors": data}
    return by_bytes(rng, files)


def use_checkpoint(folder: Path) -> Any:
    from asvit_deploy.checkpoints.damage import digest
    from asvit_deploy.checkpoints.load import build_model, load_checkpoint
    from asvit_deploy.classes.network import of_checkpoint

    found = []
    for path in (folder / "x.safetensors", folder / "x.pt", folder / "hub"):
        if path.exists():
            checkpoint = load_checkpoint(path)
            of_checkpoint(checkpoint, None, lambda line: None)
            found.append(digest(build_model(checkpoint).state_dict()))
    return found


# --- ONNX files ---------------------------------------------------------------------------------


def good_onnx(folder: Path) -> None:
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.data.images import open_images
    from asvit_deploy.exporting.export import export

    good_checkpoint(folder)
    checkpoint = load_checkpoint(folder / "x.safetensors")
    export(checkpoint, folder / "m.onnx", open_images(None, checkpoint.config, limit=2))


def _graph(rng: random.Random, files: Files) -> tuple[str, Files]:
    """A graph with other inputs, outputs, weights or nodes, and a sidecar that belongs to it."""
    import onnx

    model = onnx.load_model_from_string(files["m.onnx"])
    graph = model.graph
    way = rng.choice(("input", "output", "shape", "node", "weight", "opset", "rename", "props"))
    if way == "input":
        graph.input.append(graph.input[0]) if rng.random() < 0.5 else graph.ClearField("input")
    elif way == "output":
        del graph.output[rng.randrange(len(graph.output))]
    elif way == "shape":
        dims = graph.input[0].type.tensor_type.shape.dim
        if rng.random() < 0.4:
            del dims[rng.randrange(len(dims)) :]
        else:
            dims[rng.randrange(len(dims))].dim_value = rng.choice((0, 1, 7, 10**6, -1, 2**62))
    elif way == "node":
        node = graph.node[rng.randrange(len(graph.node))]
        if rng.random() < 0.5:
            node.op_type = rng.choice(("Relu", "Loop", "Nothing", "If", "Gather", ""))
        elif node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(("", "nowhere"))
    elif way == "weight":
        tensor = graph.initializer[rng.randrange(len(graph.initializer))]
        tensor.data_type = rng.randrange(0, 25)
    elif way == "opset":
        model.opset_import[0].version = rng.choice((0, 1, 99, 2**62))
    elif way == "rename":
        rng.choice((graph.input, graph.output))[0].name = rng.choice(("", "x\x1b[31m", "logits "))
    else:
        entry = model.metadata_props.add()
        entry.key, entry.value = "asvit_prefix", rng.choice(("9" * 5000, "-1", "²", "0", "4"))
    data = model.SerializeToString()
    kept = json.loads(files["m.onnx.json"])
    from fuzz.damage import signed

    kept["sha256"] = hashlib.sha256(data).hexdigest()
    return f"graph {way}", {**files, "m.onnx": data, "m.onnx.json": signed(kept)}


def spoil_onnx(rng: random.Random, files: Files) -> tuple[str, Files]:
    chance = rng.random()
    if chance < 0.3:
        return _graph(rng, files)
    if chance < 0.6:
        own = hashlib.sha256(files["m.onnx"]).hexdigest()
        kept = {"sha256": own} if rng.random() < 0.9 else {}
        return "sidecar", {**files, "m.onnx.json": resigned(rng, files["m.onnx.json"], **kept)}
    return by_bytes(rng, {name: files[name] for name in ("m.onnx", "m.onnx.json")})


def use_onnx(folder: Path) -> Any:
    """Opens it, names its classes, and runs it on a picture."""
    import numpy as np

    from asvit_deploy.artefacts.onnx_file import OnnxArtefact
    from asvit_deploy.classes.network import of_fields

    artefact = OnnxArtefact(folder / "m.onnx")
    of_fields(artefact.path, artefact.fields, None, lambda line: None)
    artefact.model  # noqa: B018
    size = artefact.config.image_size
    runner = next(iter(artefact.ways(runtimes=("onnxruntime",)).values()))
    return runner(np.zeros((1, 3, size, size), np.float32)).output.tolist()


# --- pictures -----------------------------------------------------------------------------------


def good_pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    picture = Image.fromarray(noise).resize((64, 48))
    exif = Image.Exif()
    exif[274] = 6
    for ending, more in (
        ("jpg", {"exif": exif}), ("png", {"exif": exif}), ("gif", {}), ("bmp", {}), ("webp", {}),
        ("tiff", {"compression": "tiff_lzw"}), ("tga", {}), ("ico", {}), ("ppm", {}), ("jp2", {}),
    ):  # fmt: skip
        with contextlib.suppress(OSError, KeyError):
            picture.save(folder / f"a.{ending}", **more)
    picture.save(folder / "p.jpg", progressive=True)
    picture.convert("P").save(folder / "p.png", transparency=3)


def spoil_picture(rng: random.Random, files: Files) -> tuple[str, Files]:
    name = rng.choice(sorted(files))
    data = files[name]
    for _ in range(rng.randint(1, 3)):
        data = spoiled(rng, data)
    return name, {name: data}


def use_pictures(folder: Path) -> Any:
    from asvit_deploy.data.decode import load_picture

    return [load_picture(path).size for path in sorted(folder.iterdir())]


# --- shards -------------------------------------------------------------------------------------


def good_shards(folder: Path) -> None:
    from shard_files import png, samples, write_tar

    forms = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    for number, form in enumerate(forms):
        long = "d" * 130 + "/k" if form != tarfile.USTAR_FORMAT else "k"
        entries = [(f"{long}{i}", png(i, (20, 16)), i % 2) for i in range(3)]
        write_tar(folder / f"{number}.tar", [*samples(entries), ("note.txt", b"text")], form)
    (folder / "classes.txt").write_text("cat\ndog\n")


def _header(rng: random.Random, data: bytes) -> bytes:
    """A header with another type, size or name, and a sum that fits."""
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return data
    at = rng.choice(starts)
    block = bytearray(data[at : at + 512])
    way = rng.randrange(4)
    if way == 0:
        block[156:157] = rng.choice((b"0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"\0"))
    elif way == 1:
        block[124:136] = b"\x80" + rng.choice((2**62, 2**63, 2**80, 512, 0)).to_bytes(11, "big")
    elif way == 2:
        block[0:20] = rng.choice((b"\x1b[31m.png", b"\xff\xfe.png", b".png", b"/../x.png")).ljust(
            20, b"\0"
        )
    else:
        block[345:350] = b"\xe2\x80\xaea\0"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return data[:at] + bytes(block) + data[at + 512 :]


def spoil_shards(rng: random.Random, files: Files) -> tuple[str, Files]:
    name = rng.choice([one for one in sorted(files) if one.endswith(".tar")])
    chance, data = rng.random(), files[name]
    if chance < 0.4:
        return "header", {**files, name: _header(rng, data)}
    if chance < 0.5:
        pax = rng.choice((b"8 path=a\n", b"99999999 size=3\n", b"30 size=" + b"9" * 20 + b"\n",
                          b"22 GNU.sparse.major=1\n"))  # fmt: skip
        info = tarfile.TarInfo("p")
        info.size, info.type = len(pax), rng.choice((b"x", b"g"))
        block = info.tobuf(tarfile.GNU_FORMAT) + pax + bytes(-len(pax) % 512)
        return "pax", {**files, name: block * rng.choice((1, 50, 5000)) + data}
    if chance < 0.6:
        return "joined", {**files, name: data + rng.choice((data, spoiled(rng, data), b"x" * 99))}
    return by_bytes(rng, files)


def use_shards(folder: Path) -> Any:
    from asvit_deploy.data.shards import ShardPictures

    pictures = ShardPictures(folder)
    return [(pictures.load(i).size, pictures.label(i), pictures.name(i))
            for i in range(len(pictures))]  # fmt: skip


# --- indices ------------------------------------------------------------------------------------


def good_index(folder: Path) -> None:
    """An index is called by its shard's path: those of another folder lie beside the shards."""
    from asvit_deploy.data.shards import ShardPictures

    good_shards(folder)
    with _cache(folder):
        made = ShardPictures(folder)._shards
    for number, shard in enumerate(made):
        (folder / f"{number}.npy").write_bytes(shard.index.read_bytes())
    shutil.rmtree(folder / "cache")


@contextlib.contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """The folder's own cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def spoil_index(rng: random.Random, files: Files) -> tuple[str, Files]:
    import numpy as np

    name = rng.choice([one for one in sorted(files) if one.endswith(".npy")])
    data = files[name][:-32]
    way = rng.choice(("bytes", "records", "account"))
    if way == "bytes":
        data = spoiled(rng, data)
    else:
        file = io.BytesIO(data)
        found = np.load(file)
        rest = file.read()
        if way == "account":
            rest = json.dumps(rng.choice((odd_values(rng), [odd_values(rng), {}]))).encode()[:9000]
        else:
            found = found.copy()
            key = rng.choice(("offset", "size", "label"))
            value = rng.choice((-1, 0, 511, 2**40, 2**63 - 1, 1))
            found[key][rng.randrange(len(found))] = value % 2**16 if key == "label" else value
            found = rng.choice((found, found, found[None], found["size"], found[:0]))
        file = io.BytesIO()
        np.save(file, found)
        data = file.getvalue() + rest
    seal = hashlib.sha256(data).digest()
    return f"index {way}", {**files, name: data + (seal if rng.random() < 0.8 else bytes(32))}


def use_index(folder: Path) -> Any:
    from asvit_deploy.data import shards

    with _cache(folder):
        for number, shard in enumerate(shards.ShardPictures(folder)._shards):
            shard.index.write_bytes((folder / f"{number}.npy").read_bytes())
            shard.index.chmod(0o644)
        shards._mapped.cache_clear()
        return use_shards(folder)


# --- small files --------------------------------------------------------------------------------


def good_recipe(folder: Path) -> None:
    (folder / "r.toml").write_text(
        'steps = 100\nbatch-size = 16\nlr = 1e-3\nbudget = 0.6\nthresholds = [0.1, 0.2]\n'
        'amp = "no"\nseed = 3\nema-decay = 0.99\n'
    )  # fmt: skip


def spoil_recipe(rng: random.Random, files: Files) -> tuple[str, Files]:
    if rng.random() < 0.4:
        return by_bytes(rng, files)
    lines = files["r.toml"].decode().splitlines()
    value = rng.choice(("nan", "inf", "-1", "9" * 5000, "[" * 5000, '"x"', "true", "1e400", "[]",
                        "{a=1}", "1979-05-27", '"\\u001b[2J"', "0", '"' + "x" * 5000 + '"',
                        ".".join("a" * 3000)))  # fmt: skip
    place = rng.randrange(len(lines))
    name = lines[place].split(" = ")[0] if rng.random() < 0.8 else rng.choice(("x", "a.b", '""'))
    lines[place] = f"{name} = {value}"
    return "value", {"r.toml": "\n".join(lines).encode()}


def use_recipe(folder: Path) -> Any:
    from asvit_deploy.models.archs import arch
    from asvit_deploy.training.presets import read_recipe, recipe_for

    given = read_recipe(folder / "r.toml")
    return repr(recipe_for(arch("as_deit_mini"), False, False, 1000, {}, given))


def _rows() -> int:
    from asvit_deploy.models.archs import arch

    return dataclasses.replace(arch("as_deit_mini"), image_size=32).rows


def good_bundle(folder: Path) -> None:
    from asvit_deploy.artefacts import bundle

    good_onnx(folder)
    kept = json.loads((folder / "m.onnx.json").read_text())
    fields = {key: value for key, value in kept.items() if key not in ("digest", "sha256")}
    more = {"kind": "bucketed", "flavour": "tensorrt-rtx", "flavour_version": "1.0", "plugin": None,
            "mode": "bucketed", "target_sms": [], "buckets": [_rows()], "precision": "float32",
            "source": {"path": "m.onnx", "sha256": "0", "checkpoint": kept["source"]}}  # fmt: skip
    bundle.write(folder / "b.bucketed", {f"stage_{i}.engine": b"plan" * 9 for i in range(4)},
                 {**fields, **more})  # fmt: skip
    for path in folder.glob("[mx].*"):
        path.unlink()


def spoil_bundle(rng: random.Random, files: Files) -> tuple[str, Files]:
    name = "b.bucketed/manifest.json"
    if rng.random() < 0.75:
        return "manifest", {**files, name: resigned(rng, files[name])}
    return by_bytes(rng, files)


def use_bundle(folder: Path) -> Any:
    from asvit_deploy.artefacts import bundle
    from asvit_deploy.artefacts.opening import open_artefact

    found = open_artefact(folder / "b.bucketed")
    bundle.check_target(folder / "b.bucketed", "bucketed", True)
    return found.config.name


def good_state(folder: Path) -> None:
    """By another process: autograd's threads do not outlive a fork."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from fuzz.kinds import trainer; import torch\n"
        "from asvit_deploy.data.batches import Batch\n"
        "from asvit_deploy.training.state import save_state\n"
        "one = trainer(); torch.manual_seed(1)\n"
        "one.step(0, Batch(torch.randn(4, 3, 20, 20), torch.tensor([0, 1, 2, 3])))\n"
        "save_state(Path(sys.argv[1]), 1, one, {'seed': 1})\n"
    )
    tests = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, "-c", code, str(folder / "s.pt")],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def trainer() -> Any:
    """A small one, which has not stepped."""
    import torch

    from asvit_deploy.models import build
    from asvit_deploy.models.archs import arch
    from asvit_deploy.training.recipe import Recipe
    from asvit_deploy.training.trainer import Trainer

    torch.manual_seed(0)
    config = dataclasses.replace(
        arch("as_deit_mini"), dim=32, heads=2, depth=5, stages=(1, 2, 3), image_size=20
    )
    model, teacher = build(config.at(num_classes=10)), build(config.at(num_classes=10), False)
    recipe = Recipe(steps=10, budget=0.65, ema=0.9)
    return Trainer(model, teacher.requires_grad_(False).eval(), recipe)


def spoil_state(rng: random.Random, files: Files) -> tuple[str, Files]:
    import torch

    from asvit_deploy.checkpoints.damage import digest

    if rng.random() < 0.4:
        return by_bytes(rng, files)
    content = torch.load(io.BytesIO(files["s.pt"]), weights_only=True)
    there = [place for place in places_of(content) if place[0] != "digest"]
    place = rng.choice(there)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    odd = (None, [], {}, "x", 3, -1, float("nan"), True, (1, 2), torch.ones(3), torch.ones(()),
           torch.ones(0), torch.ones(2, dtype=torch.complex64), torch.ones(3).half())  # fmt: skip
    if rng.random() < 0.15:
        del inner[place[-1]]
    else:
        inner[place[-1]] = rng.choice(odd)
    content.pop("digest", None)
    content["digest"] = digest(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return "edited " + ".".join(map(str, place)), {"s.pt": buffer.getvalue()}


def places_of(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = []
    inner: Any = ()
    if isinstance(value, dict):
        inner = [(key, value[key]) for key in list(value)[:4]]
    elif isinstance(value, list):
        inner = list(enumerate(value[:2]))
    for key, part in inner:
        found += [(*above, key), *places_of(part, (*above, key))]
    return found


def use_state(folder: Path) -> Any:
    import torch

    from asvit_deploy.checkpoints.damage import digest
    from asvit_deploy.training.state import load_state

    one = trainer()
    step = load_state(folder / "s.pt", one, {"seed": 1})
    assert one.average is not None
    for weight in one.optimizer.param_groups[0]["params"]:
        weight.grad = torch.zeros_like(weight)
    parts = [part.state_dict() for part in (one.model, one.optimizer, one.average)]
    found = digest([step, torch.get_rng_state(), *parts])
    one.optimizer.step()  # what does not fit shows now
    return found


def good_choice(folder: Path) -> None:
    from asvit_deploy import sidecar
    from asvit_deploy.processor import cpu_name, usable_cores

    good_onnx(folder)
    own = sidecar.read(folder / "m.onnx")
    fields = {
        "kind": "choice", "model": "m.onnx", "sha256": own["sha256"], "models": ["m.onnx"],
        "lost": {}, "runtime": "onnxruntime", "way": "function", "threads": 1,
        "precision": own["precision"], "batch": 1, "p50_ms": 1.25, "backend": "onnxruntime 1",
        "cpu": cpu_name(), "cores": usable_cores(),
    }  # fmt: skip
    (folder / "m.onnx.choice.json").write_text(sidecar.signed(fields))


def spoil_choice(rng: random.Random, files: Files) -> tuple[str, Files]:
    name = "m.onnx.choice.json"
    if rng.random() < 0.75:
        return "fields", {**files, name: resigned(rng, files[name])}
    return by_bytes(rng, {name: files[name]})[0], {**files, name: spoiled(rng, files[name])}


def use_choice(folder: Path) -> Any:
    from asvit_deploy.artefacts.onnx_file import OnnxArtefact
    from asvit_deploy.artefacts.runtime_choice import read_choice

    artefact = OnnxArtefact(folder / "m.onnx")
    choice = read_choice(artefact)
    return choice.line(artefact.path)


def good_kept(folder: Path) -> None:
    from asvit_deploy import sidecar
    from asvit_deploy.drawing.album import KEPT, KIND

    (folder / "d").mkdir()
    for name in ("0001-a.png", "gallery.png"):
        (folder / "d" / name).write_bytes(b"picture")
    (folder / "d" / KEPT).write_text(
        sidecar.signed({"kind": KIND, "files": ["0001-a.png", "gallery.png"], "pictures": []})
    )


def spoil_kept(rng: random.Random, files: Files) -> tuple[str, Files]:
    name = "d/kept.json"
    if rng.random() < 0.7:
        return "fields", {**files, name: resigned(rng, files[name])}
    return "bytes", {**files, name: spoiled(rng, files[name])}


def use_kept(folder: Path) -> Any:
    from asvit_deploy.drawing.album import check_target

    check_target(folder / "d", True)
    return True


def good_library(folder: Path) -> None:
    """Bytes with their sha256: what is in them shows only where that fits."""
    folder.chmod(0o700)
    data = b"\x7fELF" + bytes(range(256)) * 40
    (folder / "l.so").write_bytes(data)
    (folder / "l.so.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  l.so\n")


def use_library(folder: Path) -> Any:
    """Whether it would be loaded, which a changed one never is."""
    from asvit_deploy.errors import UserError
    from asvit_deploy.ops.prebuilt import usable

    said: list[str] = []
    if not usable(folder / "l.so", "build it again", said.append):
        raise UserError(said[0] if said else "it is not there; build it")
    return hashlib.sha256((folder / "l.so").read_bytes()).hexdigest()


def good_names(folder: Path) -> None:
    (folder / "c.json").write_text(json.dumps({"id2label": {str(i): f"n{i}" for i in range(9)}}))
    (folder / "c.txt").write_text("".join(f"name {i}\n" for i in range(9)))


def spoil_names(rng: random.Random, files: Files) -> tuple[str, Files]:
    if rng.random() < 0.5:
        from fuzz.damage import as_json

        return "json", {"c.json": as_json(changed_json(rng, json.loads(files["c.json"])))}
    return by_bytes(rng, {(name := rng.choice(sorted(files))): files[name]})


def use_names(folder: Path) -> Any:
    from asvit_deploy.classes.name_files import read_names

    return [read_names(path) for path in sorted(folder.iterdir())]


def good_log(folder: Path) -> None:
    from asvit_deploy.training.log import Log

    log = Log(folder / "x.log.jsonl", {"seed": 1}, None, False)
    for step in range(4):
        log.write({"step": step, "loss": 1.5})


def use_log(folder: Path) -> Any:
    """A run goes on after step 2, and replaces nothing that is not its own."""
    from asvit_deploy.training.log import Log

    Log(folder / "x.log.jsonl", {"seed": 1}, 2, False).write({"step": 3, "loss": 1.0})
    return True


_SEALED = frozenset(way.__name__ for way in BYTES)
KINDS = {kind.name: kind for kind in (
    Kind("checkpoint", good_checkpoint, spoil_checkpoint, use_checkpoint, _SEALED | {"sidecar"}),
    Kind("foreign checkpoint", good_foreign, spoil_foreign, use_checkpoint),
    Kind("onnx", good_onnx, spoil_onnx, use_onnx, _SEALED),
    Kind("picture", good_pictures, spoil_picture, use_pictures),
    Kind("shards", good_shards, spoil_shards, use_shards),
    Kind("index", good_index, spoil_index, use_index),
    Kind("recipe", good_recipe, spoil_recipe, use_recipe),
    Kind("bundle", good_bundle, spoil_bundle, use_bundle, _SEALED),
    Kind("state", good_state, spoil_state, use_state, _SEALED),
    Kind("choice", good_choice, spoil_choice, use_choice),
    Kind("drawings", good_kept, spoil_kept, use_kept),
    Kind("library", good_library, by_bytes, use_library, _SEALED),
    Kind("class names", good_names, spoil_names, use_names),
    Kind("log", good_log, by_bytes, use_log),
)}  # fmt: skip


def fresh(folder: Path) -> Path:
    """An empty folder in its place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    return folder
