"""One process's place among those of `torchrun`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from accelerate import Accelerator

_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """This process among those of `torchrun` or `accelerate launch`, or alone."""

    rank: int
    world: int
    device: str
    accelerator: Accelerator | None = None

    @staticmethod
    def here() -> Place:
        """Raises UserError where there are several and accelerate is not installed."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            import torch

            return Place(0, 1, "cuda" if torch.cuda.is_available() else "cpu")
        try:
            from asvit_deploy.training.processes import accelerator_for
        except ModuleNotFoundError as error:
            if error.name != "accelerate":
                raise
            raise UserError(
                f"several processes need accelerate; {pip_install('accelerate')}"
            ) from error
        found = accelerator_for()
        return Place(found.process_index, found.num_processes, str(found.device), found)

    def first(self, say: Say) -> Say:
        """`say`, once and not in every process."""
        return silent if self.rank else say

    def gathered(self, own: _T) -> list[_T]:
        """What every process has, in each of them."""
        if self.accelerator is None:
            return [own]
        from accelerate.utils import gather_object

        from asvit_deploy.training.processes import lost_peers

        with lost_peers(self.accelerator):
            return gather_object([own])
