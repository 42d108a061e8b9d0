"""The ONNX runtime."""
