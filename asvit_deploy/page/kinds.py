"""The kinds of report that a page shows: a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asvit_deploy.page import bench, calibrate, check, engine, evaluate, tune, visualize
from asvit_deploy.page.facts import Facts
from asvit_deploy.page.schema import Reader

VISUALIZE = "visualize"


@dataclass(frozen=True)
class Kind:
    """Its schema, what makes its facts, and the command that writes it."""

    schema: Reader
    tell: Callable[[dict[str, Any]], Facts]
    command: str


KINDS = {
    "model": Kind(bench.SCHEMA, bench.tell, "bench"),
    "engine": Kind(engine.SCHEMA, engine.tell, "bench"),
    "check": Kind(check.SCHEMA, check.tell, "check"),
    "evaluate": Kind(evaluate.SCHEMA, evaluate.tell, "evaluate"),
    "calibrate": Kind(calibrate.SCHEMA, calibrate.tell, "calibrate"),
    "tune": Kind(tune.SCHEMA, tune.tell, "tune"),
    VISUALIZE: Kind(visualize.SCHEMA, visualize.tell, "visualize"),
}
