"""A Triton model repository: clients send a picture's file, and get what the network says of it.

    DIR/NAME/config.pbtxt       what clients call; `--backend python`: the only one
    DIR/NAME/1/model.py         of `--backend python`, beside model.onnx and its sidecar
    DIR/NAME_input/             of the others: a Python step that makes the network's input
    DIR/NAME_network/           and the network itself, both joined by NAME, an ensemble

A folder of ours holds `asvit.json`: the sidecar's fields and NAME, signed. The input is made by
this package, which the server's Python must have.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asvit_deploy import sidecar
from asvit_deploy.artefacts.artefact import Artefact
from asvit_deploy.artefacts.engine_file import BundleArtefact, EngineArtefact
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.errors import UserError, shortened
from asvit_deploy.files import atomic_folder, put
from asvit_deploy.ops import onnx_op
from asvit_deploy.serving.pbtxt import Config, Step, Tensor

ONNXRUNTIME, TENSORRT, PYTHON = "onnxruntime", "tensorrt", "python"
BACKENDS = (ONNXRUNTIME, TENSORRT, PYTHON)
ABOUT = "asvit.json"
PICTURE = "picture"  # the input: bytes of a file
_USUAL_BATCH = 8
_PARTS = ("", "_input", "_network")  # behind NAME
_TYPES = {"FLOAT": "TYPE_FP32", "INT32": "TYPE_INT32", "INT64": "TYPE_INT64", "BOOL": "TYPE_BOOL"}
_AUTOREG = "libasvit_trt_autoreg.so"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_MODEL = """# Written by `asvit-deploy package`; the server's Python must have asvit_deploy.
from asvit_deploy.serving.in_triton import {kind} as TritonPythonModel  # noqa: F401
"""


@dataclass(frozen=True)
class Model:
    """A model's folder in the repository: its configuration and files, in the folder, by name, and
    what the server is to be started with."""

    config: Config
    texts: dict[str, str]
    copies: dict[str, Path]
    flags: tuple[str, ...] = ()


def default_name(path: Path) -> str:
    """`as_deit_s.fp16.engine` -> `as_deit_s.fp16`, as far as Triton takes it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem) or "model"


def usual_backend(artefact: Artefact) -> str:
    """The backend for the kind of file."""
    return TENSORRT if isinstance(artefact, EngineArtefact) else ONNXRUNTIME


def models_of(
    artefact: Artefact, name: str, backend: str, most: int | None, repository: Path,
    library: Path | None, plugin: Path | None,
) -> list[Model]:  # fmt: skip
    """What goes into the repository, in the order in which it is written: what clients call last.

    Args:
        most: pictures in a batch; None stands for 8, or for as many as an engine takes.
        library: the op's, for ONNX Runtime: it is taken along where it is given.
        plugin: the op's for TensorRT, which registers itself.

    Raises:
        UserError: the backend does not run such a file, or not in batches or none so large; the
            library or plugin that it needs is missing; the repository's path cannot stand where it
            must.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a model of Triton's; give letters, digits, '_', '-' and '.' "
            "with --name"
        )
    onnx = isinstance(artefact, OnnxArtefact)
    if onnx == (backend == TENSORRT):
        kind = "ONNX files, and" if backend != TENSORRT else "engines, and"
        raise UserError(f"--backend {backend} runs {kind} {artefact.path} is none; leave it out")
    if isinstance(artefact, OnnxArtefact):
        if backend == PYTHON:
            return [_python(artefact, name, most or _USUAL_BATCH, library)]
        network = _onnx(artefact, name, most or _USUAL_BATCH, repository, library)
    else:
        network = _engine(artefact, name, most, repository, plugin)
    return [network, *_around(artefact, name, network.config)]


def _about(artefact: Artefact, name: str, backend: str) -> str:
    fields = {key: value for key, value in artefact.fields.items() if key != "digest"}
    return sidecar.signed({**fields, "triton": backend, "name": name})


def _outputs(artefact: Artefact) -> list[Tensor]:
    """The network's own, and how many rows each stage keeps, prefix included."""
    config, stages = artefact.config, len(artefact.boundaries) if artefact.adaptive else 0
    counts = [Tensor(f"length_{s}", "TYPE_INT64", ()) for s in range(stages)]
    return [Tensor(config.output, "TYPE_FP32", (config.num_classes,)), *counts]


def _python(artefact: OnnxArtefact, name: str, most: int, library: Path | None) -> Model:
    artefact.libraries()  # what the file needs is there
    outputs = [Tensor(one.name, one.kind, one.dims or (1,)) for one in _outputs(artefact)]
    config = Config(
        name, PYTHON, most, [Tensor(PICTURE, "TYPE_STRING", (1,))], outputs, on_cpu=True
    )
    needed = library or (None if artefact.model.functions else artefact.library)
    copies = {"1/model.onnx": artefact.path,
              "1/model.onnx.json": sidecar.sidecar_path(artefact.path)}  # fmt: skip
    if needed is not None and onnx_op.nodes_of(artefact.model.graph):
        copies["libasvit_ort.so"] = needed
    texts = {"1/model.py": _MODEL.format(kind="Whole"), ABOUT: _about(artefact, name, PYTHON)}
    return Model(config, texts, copies)


def _require_batches(artefact: Artefact) -> None:
    if not artefact.dynamic_batch:
        raise UserError(
            f"{artefact.path} takes one picture at a time, and Triton makes batches; export it "
            "with --batch packed or dynamic, or pass --backend python"
        )


def _onnx(
    artefact: OnnxArtefact, name: str, most: int, repository: Path, library: Path | None
) -> Model:
    _require_batches(artefact)
    artefact.libraries()
    needed = library or (None if artefact.model.functions else artefact.library)
    copies, place = {"1/model.onnx": artefact.path}, None
    if needed is not None and onnx_op.nodes_of(artefact.model.graph):
        copies["libasvit_ort.so"] = needed
        # The backend hands the name to the loader as it stands.
        place = str(repository.resolve() / f"{name}_network" / "libasvit_ort.so")
        try:
            place.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{repository} is no UTF-8, which Triton's configuration takes alone; name another "
                "folder"
            ) from None
    config = Config(
        f"{name}_network", ONNXRUNTIME, most, [_images(artefact)], _outputs(artefact), library=place
    )
    return Model(config, {ABOUT: _about(artefact, name, ONNXRUNTIME)}, copies)


def _engine(
    artefact: Artefact, name: str, most: int | None, repository: Path, plugin: Path | None
) -> Model:
    if isinstance(artefact, BundleArtefact):
        raise UserError(
            f"{artefact.path} is a folder of stage engines, which Triton does not join; package "
            "the engine of another mode"
        )
    if artefact.fields["flavour"] != TENSORRT:
        raise UserError(
            f"{artefact.path} was built for {artefact.fields['flavour']}, and Triton has no "
            "backend for that; build it with --flavour tensorrt"
        )
    _require_batches(artefact)
    largest, outputs = _said_by_engine(artefact)
    if most is not None and most > largest:
        raise UserError(
            f"--max-batch {most} is more than {artefact.path} takes, {largest}; give no more, or "
            "build it with a larger --batch"
        )
    copies, flags = {"1/model.plan": artefact.path}, list[str]()
    carried = (artefact.fields.get("plugin") or {}).get("embedded")
    if carried or artefact.fields.get("version_compatible"):  # it brings code of its own
        flags.append("--backend-config=tensorrt,version-compatible=true")
    if artefact.fields.get("plugin_layers") and not carried:
        if plugin is None:
            raise UserError(
                f"{artefact.path} needs the op's TensorRT library, and it is not built; run "
                "`asvit-deploy build-plugins trt`, or name it with --plugin"
            )
        copies[_AUTOREG] = plugin
        there = repository / f"{name}_network" / _AUTOREG
        if ";" in str(there):
            raise UserError(
                f"{repository} has a ';', which parts plugins for Triton; name another folder"
            )
        flags.append(f"--backend-config=tensorrt,plugins={there}")
    config = Config(f"{name}_network", TENSORRT, most or largest, [_images(artefact)], outputs)
    return Model(config, {ABOUT: _about(artefact, name, TENSORRT)}, copies, tuple(flags))


def _said_by_engine(artefact: Artefact) -> tuple[int, list[Tensor]]:
    """The largest batch, and every output: the server binds no other."""
    try:
        largest = artefact.fields["profile"]["images"][2][0]
        outputs = []
        for name, (kind, batch, *dims) in artefact.fields["outputs"].items():
            if batch != -1 or not all(type(one) is int for one in dims):
                raise ValueError(name)
            outputs.append(Tensor(name, _TYPES[kind], tuple(dims)))
        if type(largest) is not int or largest < 1 or not outputs:
            raise ValueError("nothing")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"the sidecar of {artefact.path} does not say its largest batch, or of each output its "
            "type and a shape by pictures; build it again, without --stage-outputs"
        ) from None
    return largest, outputs


def _images(artefact: Artefact) -> Tensor:
    side = artefact.config.image_size
    return Tensor("images", "TYPE_FP32", (3, side, side))


def _around(artefact: Artefact, name: str, network: Config) -> list[Model]:
    """The step before the network, and the ensemble of both."""
    most = network.most
    picture, images = Tensor(PICTURE, "TYPE_STRING", (1,)), _images(artefact)
    step = Config(f"{name}_input", PYTHON, most, [picture], [images], on_cpu=True)
    seen = [Tensor(one.name, one.kind, one.dims or (1,)) for one in network.outputs]
    joined = Config(name, None, most, [picture], seen, [
        Step(step.name, {PICTURE: PICTURE}, {images.name: images.name}),
        Step(network.name, {images.name: images.name}, {one.name: one.name for one in seen}),
    ])  # fmt: skip
    about = _about(artefact, name, str(network.backend))
    return [
        Model(step, {"1/model.py": _MODEL.format(kind="Input"), ABOUT: about}, {}),
        Model(joined, {ABOUT: about}, {}),
    ]


def require_free(
    repository: Path, called: str, models: Sequence[Model], force: bool, sha256: str
) -> None:
    """Find out before anything is written whether it may be.

    Args:
        called: what clients call the model.

    Raises:
        UserError: one of the names is taken, by another model or by a folder that is not ours.
    """
    for name in (model.config.name for model in models):
        there = repository / name
        if not there.exists() and not there.is_symlink():
            continue
        about = _said(there)
        if about is None:
            raise UserError(
                f"{there} was not written by `asvit-deploy package`; name this model otherwise "
                "with --name"
            )
        if (of := about.get("name")) != called:
            raise UserError(
                f"{there} is of the model {shortened(of)}; name this model otherwise with --name"
            )
        if not force:
            other = "this model already" if about.get("sha256") == sha256 else "another model"
            raise UserError(
                f"{there} holds {other}; name this one otherwise with --name, or pass --force to "
                "replace it"
            )


def _said(folder: Path) -> dict[str, Any] | None:
    try:
        return sidecar.read_signed(folder / ABOUT, "description", folder.name, "sha256")
    except UserError:
        return None


def write(repository: Path, called: str, models: Sequence[Model]) -> None:
    """Put each folder in its place, whole or not at all; what `called` had beside these goes.

    Raises:
        UserError: one cannot be written, or removed.
    """
    made = not repository.exists()
    repository.mkdir(exist_ok=True)
    try:
        for model in models:
            with atomic_folder(repository / model.config.name) as folder:
                (folder / "1").mkdir()  # an ensemble has an empty one
                for name, source in model.copies.items():
                    shutil.copyfile(source, folder / name)
                for name, text in {"config.pbtxt": model.config.text(), **model.texts}.items():
                    put(folder / name, text)
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                repository.rmdir()
    written = {model.config.name for model in models}
    for name in (f"{called}{part}" for part in _PARTS):
        left = repository / name
        if name in written or (_said(left) or {}).get("name") != called:
            continue
        try:
            shutil.rmtree(left)
        except OSError as error:
            raise UserError(
                f"{left} is of the model before and cannot be removed ({error.strerror or error}); "
                "remove it"
            ) from None
