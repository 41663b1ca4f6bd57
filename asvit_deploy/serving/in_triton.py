"""What runs inside Triton's Python backend: `model.py` of a repository names a class of these.

A request has pictures as files, bytes [B, 1] under the name `picture`. One that cannot be read
makes an error of its request alone, and so does whatever fails a batch: its requests are then
run one by one.
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
from asvit_deploy.serving.triton import ABOUT, PICTURE, PYTHON
from asvit_deploy.text import one_line


class Input:
    """The step before a network: pictures in, `images` float32 [B, 3, H, W] out."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Called once by the server, which says where the model's folder is."""
        self.folder = Path(args["model_repository"])
        about = self.folder / ABOUT
        fields = sidecar.read_signed(about, "description", self.folder.name, "sha256", "name")
        self.config = config_of(fields)
        # Not where the server copies each model to a place of its own.
        network = self.folder.with_name(f"{fields['name']}_network") / ABOUT
        if fields["triton"] != PYTHON and network.exists():
            other = sidecar.read_signed(network, "description", network.parent.name, "sha256")
            if other["sha256"] != fields["sha256"]:
                raise UserError(
                    f"{self.folder} is of another model than {network.parent} (sha256 differs); "
                    "run `asvit-deploy package --force` again"
                )

    def read(self, request: Any) -> NDArray[np.float32]:
        """The network's input.

        Raises:
            UserError: a picture cannot be read, or there is none.
        """
        import triton_python_backend_utils as pb

        files = pb.get_input_tensor_by_name(request, PICTURE).as_numpy().reshape(-1)
        if not len(files):
            raise UserError("a request of no pictures; send one or more")
        pictures = (decode_picture(io.BytesIO(file), "the picture sent") for file in files)
        return np.stack([preprocess(picture, self.config) for picture in pictures])

    def said(self, images: NDArray[np.float32]) -> dict[str, NDArray]:
        """The outputs for a batch, by their names."""
        return {"images": images}

    def execute(self, requests: list[Any]) -> list[Any]:
        """An answer or an error for each request; all that can be read make one batch."""
        answers: list[Any] = [None] * len(requests)
        batches: dict[int, NDArray[np.float32]] = {}
        for place, request in enumerate(requests):
            try:
                batches[place] = self.read(request)
            except Exception as error:
                answers[place] = _refused(error)
        for place, answer in zip(batches, self._answered(list(batches.values()))):
            answers[place] = answer
        return answers

    def _answered(self, batches: list[NDArray[np.float32]]) -> list[Any]:
        import triton_python_backend_utils as pb

        if not batches:
            return []
        try:
            said = self.said(np.concatenate(batches))
        except Exception as error:
            if len(batches) == 1:
                return [_refused(error)]
            return [answer for images in batches for answer in self._answered([images])]
        answers, start = [], 0
        for images in batches:
            end = start + len(images)
            own = [pb.Tensor(name, values[start:end]) for name, values in said.items()]
            answers.append(pb.InferenceResponse(output_tensors=own))
            start = end
        return answers


def _refused(error: Exception) -> Any:
    import triton_python_backend_utils as pb

    said = one_line(str(error)) or type(error).__name__
    return pb.InferenceResponse(error=pb.TritonError(said))


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
