"""Edits of graphs that several passes make."""

from __future__ import annotations

import numpy as np
from golden import model_of
from onnx_ir.passes import common

from qcompiler.ir.graph import every_node, remove_unread

TEXT = """g (float[2,4] x, bool c) => (float[2,4] y) {
    a = Neg (x)  b = Abs (a)  unread = Add (b, w)
    first, second = Split <num_outputs = 2> (x)
    y = If (c) <then_branch = t () => (p) { dead = Exp (a) p = Add (a, v) },
                else_branch = e () => (q) { q = Tanh (x) }>
    z = Identity (first)
}"""


def test_what_nothing_reads_goes() -> None:
    constants = {name: np.ones(4, np.float32) for name in "wv"}
    ours, theirs = model_of(TEXT, constants), model_of(TEXT, constants)
    remove_unread(ours.graph)
    common.RemoveUnusedNodesPass()(theirs)
    kept = [node.op_type for node in every_node(ours.graph)]
    assert (
        kept == [node.op_type for node in every_node(theirs.graph)] == ["Neg", "If", "Add", "Tanh"]
    )
    assert list(ours.graph.initializers) == list(theirs.graph.initializers) == ["v"]
