"""The grid of the least error of a product, against the error written out."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.clip_search import BLOCK, diagonal_blocks, searched_grid
from qcompiler.passes.weight_grid import rounded_on, weight_grid

K, N = 160, 24
RNG = np.random.default_rng(5)
W = RNG.standard_t(3, (K, N)).astype(np.float32)
COMMON = RNG.standard_normal((400, 1)) * 3
X = (RNG.standard_normal((400, K)) * np.exp(RNG.standard_normal(K)) + COMMON).astype(np.float32)
SECOND = X.T @ X / len(X)
INT4, UINT4 = ir.DataType.INT4, ir.DataType.UINT4
TYPES = {
    "groups": QuantType(INT4, granularity=PerGroup(0, 32)),
    "a shorter group": QuantType(INT4, granularity=PerGroup(0, 64)),
    "channels": QuantType(INT4, granularity=PerAxis(1)),
    "integer zero points": QuantType(UINT4, granularity=PerGroup(0, 32), symmetric=False),
    "float zero points": QuantType(INT4, granularity=PerGroup(0, 32), offset=True),
    "8 bits": QuantType(INT4, granularity=PerGroup(0, 32), offset=True, two_level=True),
}


def errors(type, grid):
    """Of each group [groups, N], its inputs against each other, as far as they are in one block."""
    difference = rounded_on(W, type, grid).floats(type) - W
    size = type.granularity.group_size if isinstance(type.granularity, PerGroup) else K
    found = []
    for start in range(0, K, size):
        total = 0
        for block in range(0, K, BLOCK):
            rows = np.arange(max(start, block), max(start, min(start + size, block + BLOCK, K)))
            part = difference[rows]
            total = total + (part * (SECOND[np.ix_(rows, rows)] @ part)).sum(0)
        found.append(total)
    return np.stack(found)


@pytest.mark.parametrize("type", TYPES.values(), ids=TYPES)
def test_each_slice_has_the_least_error_of_those_tried(type):
    grid = searched_grid(W, type, diagonal_blocks(SECOND))
    found = errors(type, grid)
    others = [
        errors(type, weight_grid(W, type, "max")),
        errors(type, weight_grid(W, type, "mse", np.diag(SECOND))),
    ]
    best = others[1] if type.two_level else np.minimum(*others)
    assert (found.sum(0) <= 1.0001 * best.sum(0)).all()
    assert found.sum() < 0.93 * min(other.sum() for other in others)


def test_what_is_behind_the_last_input_is_0():
    blocks = diagonal_blocks(SECOND)
    assert blocks.shape == (2, BLOCK, BLOCK)
    np.testing.assert_array_equal(blocks[1, :32, :32], SECOND[BLOCK:, BLOCK:])
    assert not blocks[1, 32:].any() and not blocks[1, :, 32:].any()


@pytest.mark.parametrize("type", TYPES.values(), ids=TYPES)
def test_no_activations_at_all(type):
    """Then any grid will do, but it is one."""
    grid = searched_grid(W, type, np.zeros((2, BLOCK, BLOCK), np.float32))
    assert np.isfinite(grid.scale).all() and (grid.scale != 0).all()
    left = W - rounded_on(W, type, grid).floats(type)
    assert np.square(left).mean() < 0.2 * np.square(W).mean()
