"""Rows that are there and must not count: what a graph sums or compares over tokens is masked.

Padded mode keeps dropped tokens in place, bucketed mode fills a bucket up with zero rows; the same
few nodes hide both.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_INT64_MAX = np.iinfo(np.int64).max


class RowMask:
    """Collects a graph's nodes and puts the mask in front of those that mix rows.

    Attributes:
        mask: name of the bool value [1 or B, M] that is true for rows that count, class token
            first; None while all do.
        nodes: the nodes so far, in order; constants go straight into the graph.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.mask: str | None = None
        self._made: set[str] = set()

    def constant(self, value: np.ndarray | np.generic, name: str) -> str:
        """A constant of that name, made on first use."""
        if name not in self._made:
            self._made.add(name)
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op_type: str, inputs: list[str], output: str) -> str:
        """A node, made on first use of its only output."""
        if output not in self._made:
            self._made.add(output)
            self.nodes.append(helper.make_node(op_type, inputs, [output], name=output))
        return output

    def minus_inf(self, kind: int = TensorProto.FLOAT) -> str:
        """The constant -inf of an ONNX type."""
        name = f"minus_inf_{TensorProto.DataType.Name(kind).lower()}"
        if name not in self._made:
            self._made.add(name)
            self.graph.initializer.append(helper.make_tensor(name, kind, [], [-np.inf]))
        return name

    def image_mask(self) -> str:
        """The mask without its class row, bool [1 or B, N]."""
        assert self.mask is not None
        ends = {"from": 1, "to": _INT64_MAX, "axis": 1}
        names = [self.constant(np.array([v], np.int64), f"image_{k}") for k, v in ends.items()]
        return self.add("Slice", [self.mask, *names], f"{self.mask}_image")

    def hide(self, node: onnx.NodeProto, kind: int = TensorProto.FLOAT) -> None:
        """Mask what `node` sums or compares over rows; other nodes are left alone.

        Args:
            kind: ONNX type of its first input.
        """
        if self.mask is None:
            return
        if node.op_type == "Softmax":  # attention [B, H, rows, M], and the class row of the scores
            mask, axes = self.mask, [1, 2]
        elif node.op_type == "ReduceMax":  # LV-ViT's votes [B, N, C]
            mask, axes = self.image_mask(), [2]
        else:
            return
        wide = f"{mask}_wide"
        self.add("Unsqueeze", [mask, self.constant(np.array(axes, np.int64), f"{wide}_axes")], wide)
        hidden = f"{node.output[0]}_hidden"
        node.input[0] = self.add("Where", [wide, node.input[0], self.minus_inf(kind)], hidden)

    def hide_scores(self, scores: str) -> None:
        """Make float32 `scores` [B, N], already among the nodes, -inf where its row is hidden."""
        producer = next(node for node in self.nodes if scores in node.output)
        raw = f"{scores}_raw"
        producer.output[:] = [raw if value == scores else value for value in producer.output]
        self.add("Where", [self.image_mask(), raw, self.minus_inf()], scores)
