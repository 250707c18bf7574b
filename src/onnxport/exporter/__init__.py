"""From a module to an ONNX graph: borrowing the module, the cores, the ladder, the writer."""
