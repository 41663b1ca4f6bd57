"""`asvit::ThresholdCompact` in ONNX: its schema, and its body in standard ops.

The body makes one file run everywhere: a runtime that has no kernel for the node inlines it.
"""

from __future__ import annotations

import onnx

DOMAIN, OP_TYPE, VERSION = "asvit", "ThresholdCompact", 1
INPUTS = ("tokens", "scores", "threshold")
OUTPUTS = ("compact", "index", "length", "size")
# What TensorRT's parser reads to find the plugin creator; every other runtime ignores it.
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}
MAX_ROWS = 4096  # the most rows of an image that the CUDA kernel numbers

_PAYLOAD = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def schema() -> onnx.defs.OpSchema:
    """The op's schema: T payload, float32 scores and threshold, int64 bookkeeping."""
    parameter = onnx.defs.OpSchema.FormalParameter
    types = dict.fromkeys(INPUTS[1:], "tensor(float)") | dict.fromkeys(OUTPUTS[1:], "tensor(int64)")
    return onnx.defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc="Keep the prefix rows and the image tokens whose score exceeds the threshold.",
        inputs=[parameter(name, types.get(name, "T")) for name in INPUTS],
        outputs=[parameter(name, types.get(name, "T")) for name in OUTPUTS],
        type_constraints=[("T", _PAYLOAD, "token payload")],
        attributes=[
            onnx.defs.OpSchema.Attribute(
                name, onnx.defs.OpSchema.AttrType.STRING, "", required=False
            )
            for name in PLUGIN_ATTRIBUTES
        ],
    )


# keep: bool [B, M], the prefix's columns True. The best score is the first highest in the order
# number > NaN > -inf: a NaN becomes the lowest finite number, and what equals the top is raised
# above all, which a NaN never does: it loses against a true lowest number too. TopK, not ReduceMax:
# ONNX Runtime's symbolic shape inference, which its quantiser begins with, knows no axes that are
# an input. Less, not Greater: to OpenVINO NaN is greater than anything, and not less.
_KEEP = """
    lowest = Constant <value = float {-3.4028234663852886e38}> ()
    is_nan = IsNaN (scores)
    number = Where (is_nan, lowest, scores)
    axis_1 = Constant <value = int64[1] {1}> ()
    top, top_place = TopK <axis = 1> (number, axis_1)
    is_top = Equal (scores, top)
    above_all = Constant <value = float {inf}> ()
    rank = Where (is_top, above_all, number)
    best = ArgMax <axis = 1, keepdims = 1, select_last_index = 0> (rank)
    above = Less (threshold, scores)
    yes = Constant <value = bool[1] {1}> ()
    shape = Shape (best)
    every = Expand (yes, shape)
    image_keep = ScatterElements <axis = 1> (above, best, every)
    keep = Concat <axis = 1> (PREFIX, image_keep)
"""

# One image: the rows that stay are simply listed.
_SINGLE = """
    found = NonZero (keep)
    zero_1d = Constant <value = int64[1] {0}> ()
    index = Gather <axis = 0> (found, axis_1)
    rows = Squeeze (index, zero_1d)
    compact = Gather <axis = 1> (tokens, rows)
    length = Shape (rows)
    size = Squeeze (length, zero_1d)
"""

# Any batch: TopK over a key that falls along the row brings the kept rows to the front in order.
_BATCHED = """
    keep_int = Cast <to = 7> (keep)
    length = ReduceSum <keepdims = 0> (keep_int, axis_1)
    size = ReduceMax <keepdims = 0> (length)
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    zero_1d = Constant <value = int64[1] {0}> ()
    rows_1d = Shape <start = 1, end = 2> (tokens)
    rows = Squeeze (rows_1d, zero_1d)
    place = Range (zero, rows, one)
    falling = Sub (rows, place)
    key = Mul (keep_int, falling)
    size_1d = Unsqueeze (size, zero_1d)
    value, order = TopK <axis = 1, largest = 1, sorted = 1> (key, size_1d)
    valid = Greater (value, zero)
    absent = Constant <value = int64 {-1}> ()
    index = Where (valid, order, absent)
    axis_2 = Constant <value = int64[1] {2}> ()
    order_3d = Unsqueeze (order, axis_2)
    valid_3d = Unsqueeze (valid, axis_2)
    images_1d = Shape <start = 0, end = 1> (tokens)
    images = Squeeze (images_1d, zero_1d)
    image = Range (zero, images, one)
    axes_1_2 = Constant <value = int64[2] {1, 2}> ()
    image_3d = Unsqueeze (image, axes_1_2)
    image_of = Where (valid_3d, image_3d, image_3d)
    source = Concat <axis = 2> (image_of, order_3d)
    gathered = GatherND (tokens, source)
    zero_float = Constant <value = float {0.0}> ()
    nothing = CastLike (zero_float, tokens)
    compact = Where (valid_3d, gathered, nothing)
"""


def function_body(batched: bool, opset: int, prefix: int = 1) -> onnx.FunctionProto:
    """The op as a model-local function in standard ops.

    Args:
        batched: False gives the shorter body that is right for B = 1 only.
        opset: version of the standard ops; 18 or later.
        prefix: P, a constant of the body: tokens [B, M, D] take scores [B, M-P].

    Raises:
        ValueError: P is below 1, or above what a kernel takes.
    """
    if not 1 <= prefix < MAX_ROWS:
        raise ValueError(f"a prefix of {prefix} rows; it has 1 to {MAX_ROWS - 1}")
    keep = _KEEP.replace("PREFIX", ", ".join(["every"] * prefix))
    names = ", ".join(INPUTS), ", ".join(OUTPUTS)
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{OP_TYPE} <{', '.join(PLUGIN_ATTRIBUTES)}> ({names[0]}) => ({names[1]})\n"
        f"{{{keep}{_BATCHED if batched else _SINGLE}}}"
    )
    for node in function.node:
        node.name = f"{OP_TYPE}/{node.output[0]}"  # so that profilers can tell these nodes apart
    return function


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The op's nodes, in stage order."""
    return [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
