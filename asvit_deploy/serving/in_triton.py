"""What runs inside Triton's Python backend: `model.py` of a repository names a class of these.

A request has pictures as files, bytes [B, 1] under the name `picture`. One that cannot be read
makes an error of its request alone.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy import sidecar
from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
from asvit_deploy.artefacts.reference import config_of
from asvit_deploy.data.decode import decode_picture
from asvit_deploy.data.images import preprocess
from asvit_deploy.errors import UserError
from asvit_deploy.serving.triton import ABOUT, PICTURE


class Input:
    """The step before a network: pictures in, `images` float32 [B, 3, H, W] out."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Called once by the server, which says where the model's folder is."""
        self.folder = Path(args["model_repository"])
        about = self.folder / ABOUT
        self.config = config_of(
            sidecar.read_signed(about, "description", self.folder.name, "sha256")
        )

    def read(self, request: Any) -> NDArray[np.float32]:
        """The network's input.

        Raises:
            UserError: a picture cannot be read.
        """
        import triton_python_backend_utils as pb

        files = pb.get_input_tensor_by_name(request, PICTURE).as_numpy().reshape(-1)
        pictures = (decode_picture(io.BytesIO(file), "the picture sent") for file in files)
        return np.stack([preprocess(picture, self.config) for picture in pictures])

    def said(self, images: NDArray[np.float32]) -> dict[str, NDArray]:
        """The outputs for a batch, by their names."""
        return {"images": images}

    def execute(self, requests: list[Any]) -> list[Any]:
        """An answer or an error for each request; all that can be read make one batch."""
        import triton_python_backend_utils as pb

        answers: list[Any] = [None] * len(requests)
        batches: dict[int, NDArray[np.float32]] = {}
        for place, request in enumerate(requests):
            try:
                batches[place] = self.read(request)
            except UserError as error:
                answers[place] = pb.InferenceResponse(error=pb.TritonError(str(error)))
        if batches:
            said, start = self.said(np.concatenate(list(batches.values()))), 0
            for place, images in batches.items():
                end = start + len(images)
                own = [pb.Tensor(name, values[start:end]) for name, values in said.items()]
                answers[place], start = pb.InferenceResponse(output_tensors=own), end
        return answers


class Whole(Input):
    """A network with what comes before it: pictures in, `logits` or `embedding` float32 [B, C] and
    `length_s` int64 [B, 1] out."""

    def initialize(self, args: dict[str, Any]) -> None:
        super().initialize(args)
        library = self.folder / "libasvit_ort.so"
        artefact = OnnxArtefact(
            self.folder / args["model_version"] / "model.onnx",
            find_op_library(library) if library.exists() else None,
        )
        self.runner = artefact.runner(list(artefact.libraries().values())[-1], record=False)

    def said(self, images: NDArray[np.float32]) -> dict[str, NDArray]:
        found = self.runner(images)
        counts = {f"length_{s}": rows[:, None] for s, rows in enumerate(found.lengths)}
        return {self.config.output: found.output, **counts}
