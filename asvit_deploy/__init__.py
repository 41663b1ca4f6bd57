"""Adaptive ViTs from checkpoint to checked ONNX and TensorRT. Importing this imports no torch."""

import os

__version__ = "0.1.0"

# ONNX Runtime's telemetry keeps an identifier and a database in the home folder. It looks at this
# when it is loaded, so it must be said before any part of the package, or a child, loads it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
