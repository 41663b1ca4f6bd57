"""An engine or a bucketed bundle under test: what it says of itself, its reference, its runners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from asvit_deploy import precision
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts import sidecar as artifact
from asvit_deploy.artefacts.reference import check_fields, config_of, reference_model, source_file
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import AdaptiveViT
from asvit_deploy.runners.trt_plan import NOTHING, Allowed, require_allowed

if TYPE_CHECKING:
    from asvit_deploy.runners.bucketed import BucketedRunner
    from asvit_deploy.runners.tensorrt import TensorRTRunner

_KINDS: dict[str, type] = {
    "flavour": str, "flavour_version": str, "mode": str, "target_sms": list,
}  # fmt: skip


def is_engine(path: Path) -> bool:
    """Whether a path names an engine or a bundle of stage engines, by its ending."""
    return artifact.KINDS.get(path.suffix) == "engine" or path.suffix in bundle.KINDS


def engines_of(folder: Path, onnx: Path, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """The engines of a folder that were built from an ONNX file there, in name order.

    Args:
        say: is told, in one line, why one that is there could not be read.
    """
    bundles = [path for path in folder.iterdir() if path.suffix in bundle.KINDS and path.is_dir()]
    found = [*artifact.find(folder, "engine"), *sorted(bundles)]
    artifact.read(onnx)  # one that cannot be read is no engine's fault
    engines = []
    for path in found:
        try:
            if EngineSession(path).built_from(onnx):
                engines.append(path)
        except UserError as error:
            say(str(error))
    return engines


@dataclass
class EngineSession:
    """An engine of ours.

    Attributes:
        path: the plan, or the folder of a bucketed one.
        allowed: the code that it may run beside its own kernels.
        fields: the sidecar or manifest.

    Raises:
        UserError: it is not whole, or was built from a file that is not ours.
    """

    path: Path
    allowed: Allowed = NOTHING
    fields: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.bucketed = self.path.suffix in bundle.KINDS
        self.fields = (bundle if self.bucketed else artifact).read(self.path)
        if self.fields.get("mode") == "foreign":
            raise UserError(
                f"{self.path} was built from a foreign ONNX file, of which nothing is known; "
                "trtexec can run it"
            )
        check_fields(self.path, self.fields)
        for name, kind in _KINDS.items():
            if type(self.fields.get(name)) is not kind:
                self._refuse(name)
        if self.fields["precision"] not in precision.NAMES:
            self._refuse("precision")

    def _refuse(self, name: str) -> NoReturn:
        told = repr(self.fields.get(name))[:60]
        raise UserError(f"{self.path} says {name} {told}; make {self.path} again")

    @property
    def config(self) -> ArchConfig:
        return config_of(self.fields)

    @property
    def adaptive(self) -> bool:
        return bool(self.fields["adaptive"])

    @property
    def parity(self) -> str:
        """Which of `parity.LIMITS` holds."""
        return self.precision.option

    @property
    def precision(self) -> precision.Precision:
        return precision.of_name(self.fields["precision"])

    @property
    def graphs(self) -> bool:
        """Whether CUDA graphs can hold it: no shape depends on the data."""
        return self.fields["mode"] != "dynamic"

    def built_from(self, onnx: Path) -> bool:
        """Whether that ONNX artefact, as it is now, is its source."""
        return self.fields["source"]["sha256"] == artifact.read(onnx)["sha256"]

    @property
    def onnx(self) -> Path:
        """The ONNX artefact that it was built from."""
        return source_file(self.path, self.fields["source"], "ONNX file", "build-engine")

    @cached_property
    def reference(self) -> AdaptiveViT:
        """The PyTorch model at the start of the chain."""
        return self._model(dense=not self.adaptive)

    def _model(self, dense: bool) -> AdaptiveViT:
        fields = {**self.fields, "source": self.fields["source"]["checkpoint"]}
        return reference_model(self.path, fields, dense)

    def runner(self, graph: bool = False) -> TensorRTRunner | BucketedRunner:
        """The engine on this machine's GPU; `graph` replays CUDA graphs."""
        from asvit_deploy.runners.bucketed import BucketedRunner
        from asvit_deploy.runners.tensorrt import TensorRTRunner, TensorRTStages, require_gpu

        require_allowed(self.fields, str(self.path), self.allowed)
        require_gpu(str(self.path))
        if not self.bucketed:
            return TensorRTRunner(self.path, self.fields, graph, allowed=self.allowed)
        stages = TensorRTStages(self.path, self.fields, graph, allowed=self.allowed)
        return BucketedRunner(stages, len(self.fields["thresholds"]), self.fields["buckets"])
