"""ONNX folders."""
