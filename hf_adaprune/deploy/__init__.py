"""Models for inference: plain checkpoints, ONNX, and measurements of speed."""
