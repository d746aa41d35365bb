"""normalize-qdq on random chains of pairs, moves and clamps: equal bit for bit in stock ORT."""

import numpy as np
from golden import model_of, run
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.normalize_qdq import NormalizeQDQ

SHAPE = (2, 3, 4)
CONSTANTS = {
    "s": np.float32(0.05), "t": np.float32(0.02), "zu": np.uint8(7), "zl": np.uint8(0),
    "zi": np.int8(-5), "sa": np.linspace(0.01, 0.03, 3).astype(np.float32),
    "za": np.array([0, 3, -9], np.int8), "flat": np.array([6, 4]), "back": np.array(SHAPE),
    "one": np.array([1]), "from1": np.array([1]), "to3": np.array([3]),
    "pads": np.array([0, 0, 1, 0, 0, 1]), "low": np.float32(-0.2), "high": np.float32(0.3),
    "table": np.arange(-12, 12).reshape(SHAPE).astype(np.int8),
}  # fmt: skip

PAIR = "{o}_q = QuantizeLinear {a} ({i}, {p}) {o} = DequantizeLinear {a} ({o}_q, {p}) "
STEPS = {
    **{
        f"pair {p}": PAIR.replace("{p}", p).replace("{a}", "")
        for p in ("s, zu", "t, zu", "s, zi", "s, zl", "t, zl")
    },
    "pair per axis": PAIR.replace("{p}", "sa, za").replace("{a}", "<axis = 1>"),
    "quantize alone": "{o}_q = QuantizeLinear ({i}, s, zi) {o}_t = Identity ({o}_q) "
    "{o} = DequantizeLinear ({o}_t, s, zi) ",
    "turn": "{o} = Transpose <perm = [0, 2, 1]> ({i}) ",
    "there and back": "{o}_f = Reshape ({i}, flat) {o} = Reshape ({o}_f, back) ",
    "unsqueeze": "{o}_u = Unsqueeze ({i}, one) {o} = Squeeze ({o}_u, one) ",
    "halves": "{o}_a, {o}_b = Split <axis = 0, num_outputs = 2> ({i}) "
    "{o} = Concat <axis = 0> ({o}_b, {o}_a) ",
    "with a constant": "{o}_c = DequantizeLinear (table, s, zi) "
    "{o}_d = Concat <axis = 0> ({i}, {o}_c) {o} = Slice ({o}_d, from1, to3) ",
    "pad": "{o}_p = Pad ({i}, pads) {o} = MaxPool <kernel_shape = [3]> ({o}_p) ",
    "relu": "{o} = Relu ({i}) ",
    "clip": "{o} = Clip ({i}, low, high) ",
    "twice": "{o}_m = Neg ({i}) {o}_n = Add ({o}_m, {i}) {o} = Sub ({i}, {o}_n) ",
}
AXES_MATTER = {name for name in STEPS if name not in ("turn", "relu", "clip", "twice")} - {
    name for name in STEPS if name.startswith("pair ") and "axis" not in name
}


def chain(names: list[str]) -> str:
    """A graph of the steps, less those that need the axes in order where they are turned."""
    lines: list[str] = []
    turned = False
    for name in names:
        if turned and name in AXES_MATTER:
            continue
        turned ^= name == "turn"
        ends = {"{i}": f"v{len(lines)}", "{o}": f"v{len(lines) + 1}"}
        lines.append(STEPS[name].replace("{i}", ends["{i}"]).replace("{o}", ends["{o}"]))
    body = "".join(lines)
    return (
        f"g (float[2,3,4] x) => (float[a,b,c] y) {{ v0 = Neg (x) {body} y = Sin (v{len(lines)}) }}"
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=9), st.integers(0, 99))
def test_normalizing_changes_no_bit(names, seed):
    model = model_of(chain(names), CONSTANTS)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    feeds = {"x": np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)}
    expected = run(model, feeds, plainly=True)[0]
    NormalizeQDQ()(model)
    verify(model, Stage.FLOAT, "normalize-qdq")
    np.testing.assert_array_equal(run(model, feeds, plainly=True)[0], expected)
    assert not NormalizeQDQ()(model).modified
