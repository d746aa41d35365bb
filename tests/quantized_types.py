"""What is stored, and how scales are shared: types to try."""

import onnx_ir as ir

from qcompiler.ir.types import PerAxis, PerGroup, PerTensor

D = ir.DataType
STORED = [
    *(D.INT2, D.UINT2, D.INT4, D.UINT4, D.INT8, D.UINT8, D.INT16, D.UINT16),
    *(D.FLOAT8E4M3FN, D.FLOAT8E5M2),
]
GRANULARITIES = [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(0, 3), PerGroup(1, 4)]
