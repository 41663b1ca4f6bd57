"""What every artefact offers: what it says of itself, its references, the ways to run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from asvit_deploy.artefacts.reference import (
    boundaries_of,
    config_of,
    method_of,
    reference_model,
)
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.runners.base import Reference, Runner

Opener = Callable[[], Runner]


class Ways(Mapping[str, Runner]):
    """Ways to run an artefact: name -> runner, which is opened where it is first asked for.

    Args:
        openers: of each way, in the order of their rows.
        runtimes: what runs each way, by its name.
        parity: which of `parity.LIMITS` holds for a way, where it is not the artefact's own.

    Raises:
        UserError: on a look-up, where the runner cannot be opened.
    """

    def __init__(
        self,
        openers: Mapping[str, Opener],
        runtimes: Mapping[str, str],
        parity: Mapping[str, str] | None = None,
    ) -> None:
        self.runtimes, self.parity = dict(runtimes), dict(parity or {})
        self._openers, self._open = dict(openers), dict[str, Runner]()

    def __getitem__(self, way: str) -> Runner:
        if way not in self._open:
            self._open[way] = self._openers[way]()
        return self._open[way]

    def only(self, way: str) -> Ways:
        """One of them.

        Raises:
            KeyError: there is none of that name.
        """
        parity = {way: self.parity[way]} if way in self.parity else {}
        return Ways({way: self._openers[way]}, {way: self.runtimes[way]}, parity)

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)


class Artefact(ABC):
    """An artefact of ours, opened: its file was whole and its sidecar or manifest its own.

    Attributes:
        path: the file, or the folder of a bundle.
        fields: the sidecar or manifest.
    """

    path: Path
    fields: dict[str, Any]

    @cached_property
    def config(self) -> ArchConfig:
        """The network's architecture, with its own preprocessing."""
        return config_of(self.fields)

    @property
    def adaptive(self) -> bool:
        """Whether it removes tokens."""
        return bool(self.fields["adaptive"])

    @property
    def boundaries(self) -> list[float | None]:
        """What decides at each cut: a threshold, or None where the number of tokens is fixed."""
        return boundaries_of(self.fields)

    @property
    def method(self) -> Reduction | None:
        """As `reference.method_of`."""
        return method_of(self.fields)

    @property
    def cuts(self) -> tuple[int, ...] | None:
        """Halves in front of which rows leave; None: before the blocks of the stages."""
        return None if self.method is None else self.method.cuts

    @property
    def dynamic_batch(self) -> bool:
        """Whether it takes several images at once."""
        return self.fields["batch"] != "1"

    @property
    @abstractmethod
    def parity(self) -> str:
        """Which of `parity.LIMITS` holds."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever runs it should know, one line each."""
        return ()

    @property
    def checkpoint_fields(self) -> dict[str, Any]:
        """The fields, with the checkpoint at the start of the chain as their `source`."""
        return self.fields

    @cached_property
    def reference(self) -> ViT:
        """The PyTorch model at the start of the chain.

        Raises:
            UserError: its checkpoint is gone or changed.
        """
        return reference_model(self.path, self.checkpoint_fields, dense=not self.adaptive)

    @cached_property
    def dense_reference(self) -> ViT:
        """The same checkpoint without its stages.

        Raises:
            UserError: as `reference`.
        """
        return reference_model(self.path, self.checkpoint_fields, dense=True)

    def judge(self) -> Reference:
        """What it must agree with: PyTorch, where nothing else was named.

        Raises:
            UserError: as `reference`.
        """
        from asvit_deploy.runners.pytorch import TorchRunner

        return TorchRunner(self.reference)

    @abstractmethod
    def require_runnable(self) -> None:
        """Find out, before anything is loaded, whether this machine and its user let it run.

        Raises:
            UserError: they do not.
        """

    @abstractmethod
    def ways(
        self, threads: int = 1, record: bool = True, runtimes: Sequence[str] = ()
    ) -> Ways:  # fmt: skip
        """The ways to run it here, by the names that `check` and `bench` call them.

        Args:
            threads: of a runtime on the CPU; 0 leaves the choice to it.
            record: also return kept tokens and scores, where a runtime has to be asked for them.
            runtimes: only theirs, names in `runtimes.NAMES`; none stands for all that are installed
                and keep to the file's own precision.

        Raises:
            UserError: there is none; or one of the runtimes named is not installed.
        """
