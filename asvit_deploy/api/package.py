"""`asvit_deploy.package`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Literal

from asvit_deploy.api.inputs import (
    PathLike,
    optional_path,
    path_of,
    require_at_least,
    require_one_of,
)
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, silent

LARGEST_BATCH = 2**31 - 1  # an int32 in Triton's configuration


def package(
    model: PathLike, *, triton: PathLike,
    backend: Literal["onnxruntime", "tensorrt", "python"] | None = None,
    name: str | None = None, max_batch: int | None = None, library: PathLike | None = None,
    plugin: PathLike | None = None, force: bool = False, say: Say = silent,
) -> Path:  # fmt: skip
    """Write an ONNX file or an engine into a Triton model repository.

    The options are those of `asvit-deploy package`.

    Args:
        model: an ONNX artefact, or an engine.
        triton: the repository, a folder; it is made where it is missing.
        backend: by default that of the file's kind; python runs ONNX files by our own runner.
        name: what clients call the model, by default the file's.
        max_batch: pictures in a batch that the server makes of requests that wait, by default 8,
            or as many as the engine takes.
        library: the op's for ONNX Runtime, which goes along; without it the function in the file
            runs, where it has one.
        plugin: the op's for TensorRT, for an engine that needs it: the one that registers itself,
            or what `build-plugins trt` made beside it, which is the default.
        force: replace a model of that name that was written so.
        say: gets a line on how the server is started.

    Returns:
        the folder of the model that clients call.

    Raises:
        UserError: bad input; the name is taken; the backend does not run such a file; the library
            that it needs is missing.
    """
    if max_batch is not None:
        require_at_least(1, max_batch=max_batch)
        if max_batch > LARGEST_BATCH:
            raise UserError(f"max_batch is {max_batch:,}; Triton takes {LARGEST_BATCH:,} at most")
    path, repository = path_of(model), path_of(triton)
    if backend is not None:
        require_one_of("backend", backend, ("onnxruntime", "tensorrt", "python"))
    from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
    from asvit_deploy.artefacts.opening import open_artefact
    from asvit_deploy.ops.trt_library import find_trt_plugin, self_registering
    from asvit_deploy.serving import triton as repositories

    given, named = optional_path(library), optional_path(plugin)
    artefact = open_artefact(path, find_op_library(given, silent))
    onnx = isinstance(artefact, OnnxArtefact)
    for option, value, fits in (("library", given, onnx), ("plugin", named, not onnx)):
        if value is not None and not fits:
            raise UserError(f"--{option} has no use for {path}; leave it out")
    if named is not None and not named.is_file():
        raise UserError(f"{named} does not exist; `asvit-deploy build-plugins trt` makes one")
    if not onnx and (found := named or find_trt_plugin(say)) is not None:
        named = self_registering(found)
    called = repositories.default_name(path) if name is None else name
    chosen = backend or repositories.usual_backend(artefact)
    if not repository.is_dir() and (os.path.lexists(repository) or not repository.parent.is_dir()):
        raise UserError(f"{repository} cannot be made a folder; name one in a folder that exists")
    taken = given.resolve() if given is not None else None
    models = repositories.models_of(artefact, called, chosen, max_batch, repository, taken, named)
    repositories.require_free(repository, called, models, force, artefact.fields["sha256"])
    repositories.write(repository, called, models)
    start = shlex.join(["tritonserver", f"--model-repository={repository}", *models[0].flags])
    say(f"{called}: start it with {start}; its Python must have asvit_deploy installed")
    return repository / called
