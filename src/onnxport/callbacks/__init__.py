"""One thin adapter per training framework: they translate hooks and hold no line about ONNX."""
