"""Adaptive ViTs from checkpoint to checked ONNX and TensorRT. Importing this imports no torch."""

__version__ = "0.1.0"
