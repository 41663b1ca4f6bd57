"""What a build needs to know: one JSON file, from the command's process to the builder's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asvit_deploy.files import put

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        module: the binding to import.
        enterprise: as `Flavour.enterprise`.
        onnx: the graph, precision and all.
        plan: where the engine's bytes go.
        plugin: library of the op's plugin, or None.
        creator: the plugin's name, version and namespace.
        embed_plugin: put the library into the plan.
        stages: plugin layers that the network must hold.
        profiles: where shapes vary: input name -> smallest, best and largest shape.
        target_sms: compute capabilities such as "86" (RTX); none leaves the builder's default.
        workspace: bytes, or None.
        level: builder optimisation level 0-5, or None.
        timing_cache: folder of timing caches (enterprise), or None.
        layers: where the inspector's JSON goes (enterprise), or None.
        version_compatible, hardware_compatible: enterprise only.
    """

    module: str
    enterprise: bool
    onnx: str
    plan: str
    plugin: str | None = None
    creator: tuple[str, str, str] = ("", "", "")
    embed_plugin: bool = False
    stages: int = 0
    profiles: Sequence[Profile] = ()
    target_sms: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    timing_cache: str | None = None
    layers: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def save(self, path: Path) -> None:
        """Write it for the builder's process."""
        put(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "creator": tuple(fields["creator"])})
