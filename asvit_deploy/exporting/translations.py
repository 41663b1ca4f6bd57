"""What stands in our graphs for PyTorch's operators where the exporter's own choice will not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from asvit_deploy.exporting import ragged
from asvit_deploy.ops import onnx_op


def translations(dynamic: bool, opset: int) -> dict[Any, Callable]:
    """The exporter's `custom_translation_table` for a graph of any batch or one image."""
    return {
        torch.ops.asvit.threshold_compact.default: _compact(dynamic, opset),
        torch.ops.asvit.ragged_attention.default: ragged.translation(opset),
        torch.ops.aten.scaled_dot_product_attention.default: _attention(opset),
        torch.ops.aten.linalg_vector_norm.default: _norm(opset),
    }


def _compact(dynamic: bool, opset: int) -> Callable:
    op = onnxscript.values.Opset("", opset)
    domain = onnxscript.values.Opset(onnx_op.DOMAIN, onnx_op.VERSION)
    node = onnxscript.values.Op(domain, onnx_op.OP_TYPE, op_schema=onnx_op.schema())

    def compact(tokens: Any, scores: Any, threshold: Any) -> Any:
        outputs = node(tokens, scores, threshold, **onnx_op.PLUGIN_ATTRIBUTES)
        if not dynamic:
            return outputs
        # Shape inference gives every output images and rows of its own. Where tokens, mask and
        # batch meet again, ONNX Runtime's asks for one name, which only a shape taken over gives.
        compact, index, length, size = outputs
        images, rows = op.Shape(tokens, start=0, end=1), op.Shape(compact, start=1, end=3)
        compact = op.Reshape(compact, op.Concat(images, rows, axis=0))
        index = op.Reshape(index, op.Shape(compact, start=0, end=2))
        return compact, index, length, size

    return compact


def _attention(opset: int) -> Callable:
    op = onnxscript.values.Opset("", opset)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """softmax(Q K^T / sqrt(Dh)) V in five nodes; the exporter's form reshapes twice as well."""
        factor = query.shape[3] ** -0.5 if scale is None else scale
        scaled = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
        logits = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
        if attn_mask is not None and attn_mask.dtype != ir.DataType.BOOL:
            logits = op.Add(logits, attn_mask)  # what sizes of rows add
        elif attn_mask is not None:
            minus_inf = op.CastLike(op.Constant(value_float=float("-inf")), query)
            logits = op.Where(attn_mask, logits, minus_inf)
        return op.MatMul(op.Softmax(logits, axis=3), value)

    return attention


def _norm(opset: int) -> Callable:
    op = onnxscript.values.Opset("", opset)

    def norm(
        value: Any, ord: float = 2.0, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Any:
        """The 2-norm without ReduceL2, whose axes ONNX Runtime's shape inference cannot read."""
        assert (ord, dtype) == (2, None)
        squares = op.Mul(value, value)
        return op.Sqrt(op.ReduceSum(squares, op.Constant(value_ints=dim), keepdims=int(keepdim)))

    return norm
