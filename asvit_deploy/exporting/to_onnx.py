"""PyTorch to ONNX: one file with `asvit::ThresholdCompact` at every stage."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.inliner
import onnxscript
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from asvit_deploy.errors import UserError
from asvit_deploy.exporting.translations import translations
from asvit_deploy.models.vit import AdaptiveViT
from asvit_deploy.ops import onnx_op

OPSET = 20
# The op's body needs 18; PyTorch writes up to 25.
OPSETS = range(18, 26)


class _Graph(nn.Module):
    """What the ONNX graph computes: images -> logits, length_0, length_1, ..."""

    def __init__(self, model: AdaptiveViT, dynamic: bool) -> None:
        super().__init__()
        self.model, self.dynamic = model, dynamic

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, trace = self.model(images, padded=self.dynamic)
        return (logits, *trace.length)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress as warnings; ours goes to the caller."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def ir_version(opset: int) -> int:
    """The lowest that goes with the opset: readers refuse what is newer than they are."""
    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def check_opset(opset: int) -> None:
    """Find out before the work whether a graph of that opset can be written here.

    Raises:
        UserError: it cannot.
    """
    if opset not in OPSETS:
        raise UserError(f"opset {opset} cannot be written; {OPSETS[0]} to {OPSETS[-1]} can")
    known = onnx.defs.onnx_opset_version()
    if opset > known:
        raise UserError(
            f"onnx {onnx.__version__} knows no opset {opset}; take {known} or less, or a newer onnx"
        )


def to_onnx(
    model: AdaptiveViT, batch: str = "1", ops: str = "auto", opset: int = OPSET
) -> onnx.ModelProto:
    """Export a model in eval mode.

    Args:
        model: adaptive, or dense for the dense twin.
        batch: "1" (static) or "dynamic".
        ops: "auto" (node and model-local function), "custom" (node only) or "standard" (function
            inlined, no custom node).
        opset: version of the standard ops, one of `OPSETS`.

    Returns:
        The model in the lowest IR version that its opset allows. Input `images` float32
        [B, 3, H, W]; outputs `logits` [B, C] and per stage `length_s` int64 [B], class token
        included. Inside, each stage's values carry the names `tokens_s`, `scores_s`,
        `threshold_s`, `compact_s` and `index_s`.

    Raises:
        UserError: this opset cannot be written here.
    """
    check_opset(opset)
    dynamic = batch == "dynamic"
    size = model.config.image_size
    # A batch of one would be baked into the graph, so a dynamic one is traced with two.
    example = torch.zeros(2 if dynamic else 1, 3, size, size)
    stages = len(model.config.stages) if model.adaptive else 0
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Graph(model, dynamic).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},) if dynamic else None,
            input_names=["images"],
            output_names=["logits", *(f"length_{s}" for s in range(stages))],
            custom_translation_table=translations(dynamic, opset),
        )
    assert program is not None  # with dynamo=True there always is one
    proto = program.model_proto
    _refuse_other_opset(proto, opset)
    proto.ir_version = ir_version(opset)
    _name_stages(proto.graph)
    _refuse_zero_placeholders(proto.graph)
    if stages and ops != "custom":
        proto.functions.append(onnx_op.function_body(dynamic, opset))
    onnx.checker.check_model(proto, full_check=True)
    return onnx.inliner.inline_local_functions(proto) if ops == "standard" else proto


def _refuse_other_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Raise UserError where the exporter left the opset that it starts from."""
    made = next(entry.version for entry in proto.opset_import if not entry.domain)
    if made != opset:
        raise UserError(
            f"torch {torch.__version__} with onnxscript {onnxscript.__version__} writes opset "
            f"{made} where {opset} was asked for; take another --opset, or newer packages"
        )


def _name_stages(graph: onnx.GraphProto) -> None:
    """Give every stage's values their names, and every stage a threshold of its own.

    The exporter merges equal initialisers; thresholds must stay apart to be re-tuned apart.
    """
    rename: dict[str, str] = {}
    values = {tensor.name: tensor for tensor in graph.initializer}
    for stage, node in enumerate(onnx_op.nodes_of(graph)):
        threshold = numpy_helper.to_array(values[node.input[2]])
        name = f"threshold_{stage}"
        graph.initializer.append(numpy_helper.from_array(threshold.astype(np.float32), name))
        node.input[2] = name
        node.name = f"stage_{stage}/{onnx_op.OP_TYPE}"
        rename |= {node.input[0]: f"tokens_{stage}", node.input[1]: f"scores_{stage}"}
        rename |= {old: f"{new}_{stage}" for old, new in zip(node.output, onnx_op.OUTPUTS)}
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
    for node in graph.node:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
    for info in [*graph.value_info, *graph.output]:
        info.name = rename.get(info.name, info.name)


def _refuse_zero_placeholders(graph: onnx.GraphProto) -> None:
    """Make every Reshape take its shape literally; a 0 as "copy that dim" makes TensorRT warn.

    Raises:
        RuntimeError: a constant shape does hold a placeholder.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        shape = constants.get(node.input[1])
        if shape is not None and (numpy_helper.to_array(shape) == 0).any():
            raise RuntimeError(f"the exporter left a zero placeholder in {node.name}")
        others = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend([*others, onnx.helper.make_attribute("allowzero", 1)])
