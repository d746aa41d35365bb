"""Arrays on a kernel's stack."""

from __future__ import annotations

import numpy as np
import pytest
from instruction_sets import needs
from raw_kernels import load, pointer

from qcompiler.targets.x86.isa import AVX2

_ADDRESS = """
define i64 @qc_address(ptr %pointer) alwaysinline {
    %address = ptrtoint ptr %pointer to i64
    ret i64 %address
}
"""


@pytest.mark.parametrize("dtype", ["float32", "int32", "int8", "uint16"])
@needs("avx2")
def test_lies_on_cache_lines_of_its_own(dtype, tmp_path):
    """Vectors that lie across two lines take twice as long to read."""
    from tvm import tirx

    from qcompiler.targets import tir

    def body(found):
        with tir.imported(_ADDRESS):
            for i, size in enumerate((64, 72, 200, 64)):
                array = tir.scratch(dtype, size)
                address = tir.inlined("int64", "qc_address", tirx.address_of(array[0]))
                tir.store(found, address, i)

    kernel = load({"f": tir.function([tir.Parameter("found", "int64")], body)}, tmp_path, AVX2).f
    addresses = np.zeros(4, np.int64)
    kernel(pointer(addresses))
    assert len(set(addresses)) == 4
    assert (addresses % 64 == 0).all()
