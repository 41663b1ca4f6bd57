"""Engines, and bundles of stage engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from asvit_deploy import precision, sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.artefact import Artefact, Opener, Ways
from asvit_deploy.artefacts.reference import check_fields, source_file
from asvit_deploy.errors import UserError
from asvit_deploy.reduction.methods import method_of
from asvit_deploy.runners.trt_plan import NOTHING, Allowed, require_allowed, require_gpu
from asvit_deploy.runtimes import of_kind

if TYPE_CHECKING:
    from asvit_deploy.runners.bucketed import BucketedRunner
    from asvit_deploy.runners.tensorrt import TensorRTRunner

_KINDS: dict[str, type] = {
    "flavour": str, "flavour_version": str, "mode": str, "target_sms": list,
}  # fmt: skip


def way_of(graph: bool) -> str:
    """What `ways` calls running an engine."""
    return "engine, CUDA graph" if graph else "engine"


@dataclass
class EngineArtefact(Artefact):
    """An engine of ours.

    Attributes:
        path: the plan.
        allowed: the code that it may run beside its own kernels.
        fields: the sidecar.

    Raises:
        UserError: it is not whole, or was built from a file that is not ours.
    """

    path: Path
    allowed: Allowed = NOTHING
    fields: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.fields = self._read()
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

    def _read(self) -> dict[str, Any]:
        return sidecar.read(self.path)

    def _refuse(self, name: str) -> NoReturn:
        found = repr(self.fields.get(name))[:60]
        raise UserError(f"{self.path} says {name} {found}; make {self.path} again")

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
        return self.fields["source"]["sha256"] == sidecar.read(onnx)["sha256"]

    @property
    def onnx(self) -> Path:
        """The ONNX artefact that it was built from."""
        return source_file(self.path, self.fields["source"], "ONNX file", "build-engine")

    @property
    def checkpoint_fields(self) -> dict[str, Any]:
        """The fields, with the checkpoint of its ONNX artefact as their `source`."""
        return {**self.fields, "source": self.fields["source"]["checkpoint"]}

    def require_runnable(self) -> None:
        """Raise UserError for code that is not allowed, or where PyTorch sees no GPU."""
        require_allowed(self.fields, str(self.path), self.allowed)
        require_gpu(str(self.path))

    def runner(self, graph: bool = False) -> TensorRTRunner | BucketedRunner:
        """It on this machine's GPU; `graph` replays CUDA graphs."""
        self.require_runnable()
        return self._open(graph)

    def _open(self, graph: bool) -> TensorRTRunner | BucketedRunner:
        from asvit_deploy.runners.tensorrt import TensorRTRunner

        return TensorRTRunner(self.path, self.fields, graph, allowed=self.allowed)

    def ways(
        self, threads: int = 1, record: bool = True, runtimes: Sequence[str] = ()
    ) -> Ways:  # fmt: skip
        """With and without CUDA graphs where the mode allows both; threads are the GPU's own."""
        of_kind(self.path, "engine", runtimes)
        self.require_runnable()
        openers: dict[str, Opener] = {way_of(graph=False): self.runner}
        if self.graphs:
            openers[way_of(graph=True)] = lambda: self.runner(graph=True)
        return Ways(openers, dict.fromkeys(openers, self.fields["flavour"]))


@dataclass
class BundleArtefact(EngineArtefact):
    """Stage engines in one folder, in bucketed mode: `path` is the folder, `fields` its manifest.

    Raises:
        UserError: as `EngineArtefact`.
    """

    def __post_init__(self) -> None:
        from asvit_deploy.runners.bucketed import side_rows_of

        super().__post_init__()
        buckets, config = self.fields.get("buckets"), self.config
        if (
            type(buckets) is not list
            or not all(type(rows) is int for rows in buckets)
            or not all(a < b for a, b in pairwise([config.prefix, *buckets]))
            or buckets[-1:] != [config.rows]
        ):
            self._refuse("buckets")
        # A method that adds rows has no bundles, and one whose rows carry sizes hands these on.
        if self.fields.get("appended"):
            self._refuse("appended")
        if self.fields.get("side_rows", []) != list(side_rows_of(method_of(self.fields))):
            self._refuse("side_rows")

    def _read(self) -> dict[str, Any]:
        return bundle.read(self.path)

    def _open(self, graph: bool) -> BucketedRunner:
        from asvit_deploy.runners.bucketed import BucketedRunner
        from asvit_deploy.runners.tensorrt import TensorRTStages

        stages = TensorRTStages(self.path, self.fields, graph, allowed=self.allowed)
        return BucketedRunner(stages, len(self.fields["thresholds"]), self.fields["buckets"])
