"""The parts in order of value: where each one's code and result are, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        code: module and function.
        group: the file of its result, which other parts may share.
        limit: seconds after which it is ended.
        least: seconds without which it is not begun.
    """

    name: str
    code: str
    group: str
    limit: float
    least: float = 15


# Seven groups and a summary: no more than eight files.
PARTS = {
    part.name: part
    for part in (
        Part("stage_curve", "stage_curve:stage_curve", "01_stage_curve", 130, 30),
        Part("cut_cost", "cut_cost:cut_cost", "01_stage_curve", 60),
        Part("scale", "scale:scale", "01_stage_curve", 120, 30),
        Part("oracle", "plugin:oracle", "02_correctness", 90),
        Part("graph_capture", "plugin:graph_capture", "02_correctness", 40),
        Part("contexts", "plugin:contexts", "02_correctness", 40),
        Part("agreement", "agreement:agreement", "02_correctness", 90, 25),
        Part("bucketed", "bucketed:bucketed", "03_bucketed", 110, 30),
        Part("methods_agreement", "methods_agreement:methods_agreement", "02_correctness", 90, 20),
        Part("methods_bucketed", "methods_agreement:methods_bucketed", "02_correctness", 90, 20),
        Part("methods", "methods:methods", "04_networks", 150, 30),
        Part("packed", "packed:packed", "04_networks", 50),
        Part("memcheck", "sanitizers:memcheck", "05_kernel", 45),
        Part("racecheck", "sanitizers:racecheck", "05_kernel", 45),
        Part("synccheck", "sanitizers:synccheck", "05_kernel", 45),
        Part("speed", "speed:speed", "05_kernel", 30, 10),
        Part("switch", "switch:switch", "03_bucketed", 60, 20),
        Part("training", "training:training", "06_training", 150, 40),
        Part("compiled", "scale:compiled", "01_stage_curve", 180, 60),
        Part("methods_compiled", "methods:methods_compiled", "04_networks", 300, 60),
        Part("onnxruntime_cuda", "onnxruntime_cuda:onnxruntime_cuda", "07_runtimes", 60),
        Part("tensorrt", "tensorrt:tensorrt", "07_runtimes", 150, 30),
    )
}
SUMMARY = "summary.json"
