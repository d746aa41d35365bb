"""The quantized IR: `onnx_ir` plus quantized types, our op dialect, and the rules of each stage."""
