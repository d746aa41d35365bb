"""The factor of a Hessian that gptq rounds by: exact enough, refused, and in little memory."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.gptq import GPTQ, _inverse_factor, _to_lower_factor, gptq

INT4 = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 128))


def moments(depth, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((depth // 2 + 3, depth), dtype=np.float32)
    return rows.T @ rows / np.float32(len(rows))


@pytest.mark.parametrize("depth", [1, 64, 256, 300, 700])
def test_a_factor_in_place_is_that_of_numpy(depth):
    matrix = moments(depth).astype(np.float64) + 0.01 * np.eye(depth)
    expected, found = np.linalg.cholesky(matrix), matrix.copy()
    _to_lower_factor(found)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at", [3, 290, 512])
def test_a_matrix_that_is_not_positive_has_none(at):
    matrix = np.eye(600)
    matrix[at, at] = -1
    with pytest.raises(np.linalg.LinAlgError):
        _to_lower_factor(matrix)


def test_it_is_that_of_the_inverse_in_order():
    hessian, order = moments(300), np.random.default_rng(1).permutation(300)
    factor, damping = _inverse_factor(hessian, order, 0.01, 0.25)
    believed = hessian[order][:, order].astype(np.float64) * 0.75
    diagonal = np.diag(hessian)[order]
    believed[np.diag_indices(300)] = diagonal + 0.01 * diagonal.mean()
    assert damping == 0.01 and not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor @ believed, np.eye(300), atol=1e-3)


def memory(key):
    return int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


def test_it_takes_little_more_than_three_times_the_hessian_beside_it():
    """As the documentation says of memory: numpy's own factor would take eight times as much."""
    depth = 1536
    hessian = moments(depth)
    weight = np.random.default_rng(2).standard_normal((depth, 16), dtype=np.float32)
    gptq(weight[:512], hessian[:512, :512], INT4, GPTQ.Options())  # threads take their buffers
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    except OSError:
        pytest.skip("this system does not tell of peaks")
    before = memory("VmRSS")
    gptq(weight, hessian, INT4, GPTQ.Options())
    assert memory("VmHWM") - before < 5 * hessian.nbytes
