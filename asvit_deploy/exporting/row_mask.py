"""Rows that are there and must not count: what a graph sums or compares over tokens is masked.

Padded mode keeps dropped tokens in place, bucketed mode fills a bucket up with zero rows; the same
few nodes hide both.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from asvit_deploy import graph

_INT64_MAX = np.iinfo(np.int64).max


class RowMask:
    """Puts a mask in front of a graph's nodes that mix rows.

    Attributes:
        mask: the bool value [1 or B, M] that is true for rows that count, the prefix first; None
            while all do.
        before: the node in front of which new nodes go; None: at the end.
        prefix: P, the rows in front that are no image tokens.
    """

    def __init__(self, whole: ir.Graph, prefix: int) -> None:
        self.graph, self.prefix = whole, prefix
        self.mask: ir.Value | None = None
        self.before: ir.Node | None = next(iter(whole), None)
        self._made: dict[str, ir.Value] = {}

    def insert(self, node: ir.Node) -> ir.Node:
        """A node at the place where new nodes go."""
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return node

    def constant(self, value: np.ndarray | np.generic, name: str) -> ir.Value:
        """A constant of that name, made on first use."""
        if name not in self._made:
            tensor = ir.tensor(np.asarray(value), name=name)
            self._made[name] = graph.constant(self.graph, tensor)
        return self._made[name]

    def add(self, op_type: str, inputs: list[ir.Value], output: str) -> ir.Value:
        """A node, made on first use of its only output."""
        if output not in self._made:
            self._made[output] = self.insert(graph.node(op_type, inputs, output)).outputs[0]
        return self._made[output]

    def minus_inf(self, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The constant -inf of an ONNX type."""
        return self.constant(
            np.asarray(-np.inf, kind.numpy()), f"minus_inf_{kind.name.lower()}"
        )  # fmt: skip

    def image_mask(self) -> ir.Value:
        """The mask without its prefix, bool [1 or B, N]."""
        assert self.mask is not None
        ends = {"from": self.prefix, "to": _INT64_MAX, "axis": 1}
        bounds = [self.constant(np.array([v], np.int64), f"image_{k}") for k, v in ends.items()]
        return self.add("Slice", [self.mask, *bounds], f"{self.mask.name}_image")

    def hide(self, node: ir.Node, kind: ir.DataType = ir.DataType.FLOAT) -> None:
        """Mask what `node` sums or compares over rows; other nodes are left alone.

        Args:
            kind: type of its first input.
        """
        if self.mask is None:
            return
        if node.op_type == "Softmax":  # attention [B, H, rows, M], and the class row of the scores
            mask, axes = self.mask, [1, 2]
        elif node.op_type == "ReduceMax":  # LV-ViT's votes [B, N, C]
            mask, axes = self.image_mask(), [2]
        else:
            return
        wide = f"{mask.name}_wide"
        self.add("Unsqueeze", [mask, self.constant(np.array(axes, np.int64), f"{wide}_axes")], wide)
        mixed = node.inputs[0]
        assert mixed is not None
        hidden = f"{node.outputs[0].name}_hidden"
        inputs = [self._made[wide], mixed, self.minus_inf(kind)]
        node.replace_input_with(0, self.add("Where", inputs, hidden))

    def hide_scores(self, scores: ir.Value) -> None:
        """Make float32 `scores` [B, N] -inf where its row is hidden."""
        name = str(scores.name)
        inputs = [self.image_mask(), scores, self.minus_inf()]
        hiding = self.insert(graph.node("Where", inputs, name))
        graph.take_over(scores, hiding.outputs[0], f"{name}_raw", spare=[hiding])
