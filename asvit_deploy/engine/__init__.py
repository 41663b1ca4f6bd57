"""TensorRT engines: TensorRT 10 and 11 and TensorRT-RTX behind one small flavour object.

Executed by our tests: everything on TensorRT-RTX, whose builder needs no GPU. What is marked
"enterprise" is written from NVIDIA's headers and documentation and has not been run yet.
"""
