"""The op's CUDA kernels and a whole model in ONNX Runtime's CUDA provider."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from gpu_parts import calls as plugin_calls
from gpu_parts.kit import FailPart, Kit, Report, SkipPart

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def onnxruntime_cuda(kit: Kit) -> Report:
    """Every case bit for bit, then the default model on both providers."""
    ort = _import(kit)
    provider = CPU if kit.rehearse else CUDA
    if provider not in ort.get_available_providers():
        raise SkipPart(f"onnxruntime {ort.__version__} has no CUDA provider (onnxruntime-gpu has)")
    library, model = kit.file("onnxruntime"), kit.file("model")
    result: Report = {"onnxruntime": ort.__version__}
    result["calls"] = _op_calls(kit, ort, library, provider)
    kit.save(result)
    result |= _whole_model(kit, model, library, provider)
    return result


def _import(kit: Kit) -> Any:
    if util.find_spec("onnxruntime") is None:
        raise SkipPart("onnxruntime is not installed")
    try:
        import onnxruntime
    except ImportError as error:
        raise SkipPart(f"onnxruntime cannot be imported ({error})") from None
    # Its CUDA libraries come with torch's wheels; importing torch loads them.
    if not kit.rehearse and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    return onnxruntime


def _one_node(kind: int) -> bytes:
    """tokens, scores, threshold -> the op's outputs. Half types enter and leave as float, exactly
    for what fits: numpy knows no bfloat16.
    """
    import onnx
    from onnx import TensorProto, helper

    from asvit_deploy.ops import onnx_op

    inside = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)[kind]
    node = helper.make_node(
        onnx_op.OP_TYPE, ["narrow", "scores", "threshold"], ["kept", *onnx_op.OUTPUTS[1:]],
        domain=onnx_op.DOMAIN, **onnx_op.PLUGIN_ATTRIBUTES,
    )  # fmt: skip
    nodes = [helper.make_node("Cast", ["tokens"], ["narrow"], to=inside), node,
             helper.make_node("Cast", ["kept"], ["compact"], to=TensorProto.FLOAT)]  # fmt: skip

    def info(name: str, type_: int, shape: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, type_, shape)

    inputs = [info("tokens", TensorProto.FLOAT, ["B", "M", "D"]),
              info("scores", TensorProto.FLOAT, ["B", "N"]),
              info("threshold", TensorProto.FLOAT, [])]  # fmt: skip
    outputs = [info("compact", TensorProto.FLOAT, None)]
    outputs += [info(name, TensorProto.INT64, None) for name in onnx_op.OUTPUTS[1:]]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(onnx_op.DOMAIN, 1)]
    graph = helper.make_graph(nodes, "op", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _op_calls(kit: Kit, ort: Any, library: Path, provider: str) -> int:
    """Each case in each type; the profile says where the node ran."""
    from asvit_deploy.ops.reference import threshold_compact

    count = 0
    for kind, name in enumerate(plugin_calls.TYPES):
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(kit.scratch / name)
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library))
        providers = list(dict.fromkeys([provider, CPU]))
        session = ort.InferenceSession(_one_node(kind), options, providers)
        for call in plugin_calls.stored_calls(kit.root, kind):
            # Whole numbers up to 128 are the same in all three types.
            tokens = (call.tokens % 129).astype(np.float32)
            given = {"tokens": tokens, "scores": call.scores,
                     "threshold": np.array(call.threshold, np.float32)}  # fmt: skip
            wanted = threshold_compact(tokens, call.scores, call.threshold)
            for mine, right in zip(session.run(list(wanted._fields), given), wanted, strict=True):
                if not np.array_equal(mine, right):
                    raise FailPart(f"{call} differs on {provider}")
            count += 1
        where = _where_it_ran(Path(session.end_profiling()))
        if provider not in where:
            raise FailPart(f"the op ran on {where or 'nothing'}, not on {provider}")
    return count


def _where_it_ran(profile: Path) -> set[str]:
    events = json.loads(profile.read_text())
    return {event["args"].get("provider", "") for event in events
            if event.get("args", {}).get("op_name") == "ThresholdCompact"}  # fmt: skip


def _whole_model(kit: Kit, path: Path, library: Path, provider: str) -> Report:
    from asvit_deploy.models.archs import arch
    from asvit_deploy.parity import compare
    from asvit_deploy.runners.onnx_runtime import OrtRunner
    from gpu_parts.networks import normalised

    pixels = np.load(kit.file("model_pictures"), allow_pickle=False)
    images = list(normalised(pixels, arch("as_deit_mini")))
    model, mine = OrtRunner(path), OrtRunner(path, library, provider=provider)
    if mine.session.get_providers()[0] != provider:
        raise FailPart("onnxruntime fell back to the CPU; its CUDA or cuDNN is missing")
    thresholds = json.loads(Path(f"{path}.json").read_text())["thresholds"]
    parity = compare(model, mine, images, [str(i) for i in range(len(images))], thresholds)
    if not parity.passed:
        raise FailPart("; ".join(parity.failures), parity.as_dict())
    return {"images": parity.images, "logit_error": parity.logit_error}
