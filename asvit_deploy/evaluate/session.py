"""One artefact under test: its sidecar, its PyTorch reference, and the ways to run it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from asvit_deploy import artifact
from asvit_deploy.errors import UserError
from asvit_deploy.evaluate.reference import check_fields, config_of, reference_model
from asvit_deploy.models.registry import ArchConfig
from asvit_deploy.models.vit import AdaptiveViT
from asvit_deploy.ops import onnx_op
from asvit_deploy.runners.onnx_runtime import OrtRunner, load_model

# Sidecar fields that two artefacts share if they can be compared token by token.
_OF_THE_NETWORK = ("arch", "image_size", "num_classes", "stages", "preprocessing")


@dataclass
class Session:
    """An ONNX artefact of ours, opened.

    Attributes:
        path: the file.
        library: the op's ONNX Runtime library, or None to run the function.
        fields: the sidecar.
    """

    path: Path
    library: Path | None = None
    fields: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if self.path.is_file() and self.path.suffix != ".onnx":
            raise UserError(
                f"{self.path} is no ONNX file; name one in .onnx, or make it with "
                "`asvit-deploy export --ckpt FILE`"
            )
        self.fields = artifact.read(self.path)
        if self.fields.get("kind") != "onnx":
            raise UserError(
                f"{self.path} is no ONNX file but of kind {self.fields.get('kind')}; name an "
                ".onnx file"
            )
        check_fields(self.path, self.fields)

    def refuse_other_network(self, other: Session) -> None:
        """Raise UserError where `other` is no reference for this one, in one line that says why."""
        for key in _OF_THE_NETWORK:
            ours, theirs = self.fields[key], other.fields[key]
            if ours != theirs:
                raise UserError(
                    f"{other.path} is no reference for {self.path}: {key} is {theirs} there, "
                    f"{ours} here; name an artefact of the same network"
                )

    @cached_property
    def model(self) -> onnx.ModelProto:
        return load_model(self.path)

    @cached_property
    def config(self) -> ArchConfig:
        return config_of(self.fields)

    @cached_property
    def reference(self) -> AdaptiveViT:
        """The PyTorch model it was exported from."""
        return reference_model(self.path, self.fields, dense=not self.adaptive)

    @cached_property
    def dense_reference(self) -> AdaptiveViT:
        """The same checkpoint without its stages."""
        return reference_model(self.path, self.fields, dense=True)

    @property
    def adaptive(self) -> bool:
        return bool(self.fields["adaptive"])

    @property
    def dynamic_batch(self) -> bool:
        return self.fields["batch"] == "dynamic"

    def libraries(self) -> dict[str, Path | None]:
        """Ways to run the op by name: `function` where the file holds it, `library` if given."""
        if not self.adaptive:
            return {"dense": None}
        ways: dict[str, Path | None] = {}
        if self.model.functions or not onnx_op.nodes_of(self.model.graph):
            ways["function"] = None
        if self.library is not None and onnx_op.nodes_of(self.model.graph):
            ways["library"] = self.library
        if not ways:
            raise UserError(
                f"{self.path} was exported with --ops custom and the op's library is not built; "
                "run `asvit-deploy build-plugins ort`"
            )
        return ways

    def runner(self, library: Path | None, threads: int = 1, record: bool = True) -> OrtRunner:
        """The artefact in ONNX Runtime."""
        return OrtRunner(self.model, library, threads=threads, record=record, name=str(self.path))


def find_op_library(named: Path | None) -> Path | None:
    """The library given, or the one that `build-plugins` made, or None.

    Raises:
        UserError: the library given cannot be used.
    """
    from asvit_deploy.ops.library import check_library, find_library

    if named is None:
        try:
            return find_library()
        except (UserError, OSError) as error:
            # It is an addition: what it does, the function in the file does too.
            said = str(error)
            if isinstance(error, PermissionError):
                said = f"{error.filename} may not be read"
            print(f"no library, {said}", file=sys.stderr)
            return None
    # A library without the op would load, and the function would silently run in its place.
    if reason := check_library(named):
        raise UserError(
            f"{named} cannot be used: {reason}; `asvit-deploy build-plugins ort` makes one"
        )
    return named.resolve()
