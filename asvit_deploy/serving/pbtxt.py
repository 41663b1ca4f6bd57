"""Triton's model configurations, as text that its own protobuf (`inference.ModelConfig`) parses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """An input or output: its dimensions without the batch; none where there is one number a
    picture, of which clients see [1]."""

    name: str
    kind: str
    dims: tuple[int, ...]

    def text(self) -> str:
        dims = ", ".join(map(str, self.dims or (1,)))
        reshape = "" if self.dims else " reshape { shape: [ ] }"
        return f"{{ name: {_quoted(self.name)} data_type: {self.kind} dims: [ {dims} ]{reshape} }}"


@dataclass(frozen=True)
class Step:
    """A model of an ensemble, and what its inputs and outputs are called in the ensemble."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def text(self) -> str:
        maps = [
            f"{kind}_map {{ key: {_quoted(own)} value: {_quoted(name)} }}"
            for kind, names in (("input", self.inputs), ("output", self.outputs))
            for own, name in names.items()
        ]
        return f"{{ model_name: {_quoted(self.model)} model_version: -1 {' '.join(maps)} }}"


@dataclass(frozen=True)
class Config:
    """A model's `config.pbtxt`.

    Attributes:
        backend: one of Triton's; None for an ensemble of `steps`, which its models batch for.
        most: pictures in a batch; the server makes batches of requests that wait.
        library: of operators, as the server finds it.
        on_cpu: its one instance runs there, whatever else the server has.
        file: the model's, where it is not the backend's own name for it.
    """

    name: str
    backend: str | None
    most: int
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    steps: Sequence[Step] = ()
    library: str | None = None
    on_cpu: bool = False
    file: str | None = None

    def text(self) -> str:
        lines = [f"name: {_quoted(self.name)}"]
        lines.append(
            f"backend: {_quoted(self.backend)}" if self.backend else 'platform: "ensemble"'
        )
        lines.append(f"max_batch_size: {self.most}")
        lines += [f"input {one.text()}" for one in self.inputs]
        lines += [f"output {one.text()}" for one in self.outputs]
        if self.backend:
            lines.append("dynamic_batching { }")
        if self.file:
            lines.append(f"default_model_filename: {_quoted(self.file)}")
        if self.on_cpu:
            lines.append("instance_group { kind: KIND_CPU count: 1 }")
        if self.library:
            lines.append(f"model_operations {{ op_library_filename: {_quoted(self.library)} }}")
        if self.steps:
            lines.append("ensemble_scheduling {")
            lines += [f"  step {step.text()}" for step in self.steps]
            lines.append("}")
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """JSON's escapes of ASCII are among those that the text form knows."""
    return json.dumps(text, ensure_ascii=False)
