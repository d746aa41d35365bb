"""One rewrite per file, each usable alone from Python on any `onnx_ir.Model`."""
