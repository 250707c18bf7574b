"""The proof: the graph is valid, and ONNX Runtime computes what PyTorch computes."""
