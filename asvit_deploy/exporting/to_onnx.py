"""PyTorch to ONNX: one file with `asvit::ThresholdCompact` at every stage."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields

import onnx
import onnx.inliner
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor, nn

from asvit_deploy import graph
from asvit_deploy.disk import require_temporary_folder
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.naming import name_traced
from asvit_deploy.exporting.translations import translations
from asvit_deploy.models.folding import folded
from asvit_deploy.models.vit import BatchRule, Trace, ViT

OPSET = 20
# The op's body needs 18; PyTorch writes up to 25.
OPSETS = range(18, 26)


class _Traced(nn.Module):
    """What is traced: images -> its output, and what is to have a name in the graph, by that
    name."""

    def __init__(self, model: ViT, batch: str) -> None:
        super().__init__()
        self.model, self.padded = model, batch != "1"
        self.rule: BatchRule = "packed" if batch == "packed" else "exact"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        output, trace = self.model(images, self.rule, padded=self.padded)
        method = self.model.reduction
        boundaries = [] if method is None else method.boundaries()
        return {self.model.config.output: output, **_named(trace, boundaries)}


def _named(trace: Trace, thresholds: Iterable[Tensor]) -> dict[str, Tensor]:
    """All that a trace holds for each stage by its name in the graph, such as `scores_0`."""
    lists = {part.name: getattr(trace, part.name) for part in fields(trace)}
    lists = {name: values for name, values in lists.items() if isinstance(values, list)}
    lists["threshold"] = list(thresholds)
    return {f"{name}_{s}": v for name, values in lists.items() for s, v in enumerate(values)}


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector: the exporter makes millions of objects that stay, and looking
    through them again and again is a sixth of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


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
    model: ViT,
    batch: str = "1",
    ops: str = "auto",
    opset: int = OPSET,
    stage_outputs: bool = False,
) -> onnx.ModelProto:
    """Export a model in eval mode.

    Args:
        model: adaptive, or dense for the dense twin.
        batch: "1" (static), "dynamic" (any number, padded), or "packed" (any number, linear layers
            on the rows of all pictures).
        ops: "auto" (node and model-local function), "custom" (node only) or "standard" (function
            inlined, no custom node).
        opset: version of the standard ops, one of `OPSETS`.
        stage_outputs: make `index_s` int64 [B, P+K] outputs too.

    Returns:
        The model in the lowest IR version that its opset allows. Input `images` float32
        [B, 3, H, W]; outputs `logits` [B, C] (or `embedding`) and per stage `length_s` int64 [B],
        prefix included.
        Inside, each stage's values carry the names `tokens_s`, `scores_s`, `threshold_s`,
        `compact_s` and `index_s`.

    Raises:
        UserError: this opset cannot be written here, or no folder takes temporary files.
    """
    check_opset(opset)
    require_temporary_folder()  # PyTorch's tracer wants one, and hides that it found none
    program = _traced(model, batch, opset)
    _refuse_other_opset(program, opset)
    _refuse_zero_placeholders(program.graph)
    program.ir_version = ir_version(opset)
    proto = graph.closed(program)
    if ops != "custom":
        proto = graph.with_function(proto)
    onnx.checker.check_model(proto, full_check=True)
    proto = onnx.inliner.inline_local_functions(proto) if ops == "standard" else proto
    if batch == "packed":
        graph.mark_packed(proto)
    return _with_index(proto) if stage_outputs else proto


def _traced(model: ViT, batch: str, opset: int) -> ir.Model:
    """The graph of a model, its stages' values named and its LayerScale folded."""
    size = model.config.image_size
    dynamic = batch != "1"
    # A batch of one would be baked into the graph, so a dynamic one is traced with two.
    example = torch.zeros(2 if dynamic else 1, 3, size, size)
    with _quiet(), _uncollected(), torch.no_grad():
        program = torch.onnx.export(
            _Traced(folded(model), batch).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},) if dynamic else None,
            input_names=["images"],
            custom_translation_table=translations(dynamic, opset),
        )
    assert program is not None  # with dynamo=True there always are both
    assert program.exported_program is not None
    whole, spec = program.model.graph, program.exported_program.call_spec.out_spec
    name_traced(whole, list(spec.unflatten(range(len(whole.outputs)))))
    graph.forget_notes(program.model)
    return program.model


def _refuse_other_opset(model: ir.Model, opset: int) -> None:
    """Raise UserError where the exporter left the opset that it starts from."""
    made = model.opset_imports[""]
    if made != opset:
        raise UserError(
            f"torch {torch.__version__} with onnxscript {onnxscript.__version__} writes opset "
            f"{made} where {opset} was asked for; take another --opset, or newer packages"
        )


def _refuse_zero_placeholders(whole: ir.Graph) -> None:
    """Make every Reshape take its shape literally; a 0 as "copy that dim" makes TensorRT warn.

    Raises:
        RuntimeError: a constant shape does hold a placeholder.
    """
    for node in whole:
        if node.op_type != "Reshape":
            continue
        shape = node.inputs[1]
        constant = shape.const_value if shape is not None else None
        if constant is not None and (constant.numpy() == 0).any():
            raise RuntimeError(f"the exporter left a zero placeholder in {node.name}")
        node.attributes.pop("allowzero", None)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)


def _with_index(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with its `index_s` and, where there are some, `into_s` as outputs."""
    for name in (*graph.stage_values(proto, "index"), *graph.stage_values(proto, "into")):
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [None, None])
        proto.graph.output.append(info)
    return proto
