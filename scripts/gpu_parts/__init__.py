"""The parts of `scripts/gpu_suite`, and what prepares and runs them.

Nothing here, and nothing of the package that a part imports, needs more than torch, numpy and onnx.
"""
