"""Graphs of many small nodes, as large as one likes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["GraphBuilder"]

CHANNELS = 32
FAN_EVERY, BRANCH_EVERY = 4, 64
"""Layers between wide fan-outs, and between branches."""


class GraphBuilder:
    """A graph of many small nodes: products with norms between them, wide fan-outs, branches."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.initializers: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.inner = 0
        self.x = ir.val("x", ir.DataType.FLOAT, ["n", CHANNELS])
        self.condition = ir.val("condition", ir.DataType.BOOL, [])
        self.two = self.constant("two", np.float32(2))
        self.small = self.constant("small", np.float32(1e-5))
        self.axis = self.constant("axis", np.array([-1]))

    def constant(self, name: str, array: Any) -> ir.Value:
        """An initializer."""
        tensor = ir.tensor(array, name=name)
        shape = ir.Shape(tensor.shape.numpy())
        type = ir.TensorType(tensor.dtype)
        self.initializers.append(ir.Value(name=name, type=type, shape=shape, const_value=tensor))
        return self.initializers[-1]

    def weight(self, name: str) -> ir.Value:
        """A square initializer."""
        array = self.random.standard_normal((CHANNELS, CHANNELS), dtype=np.float32)
        return self.constant(name, array / 8)

    def node(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The result of a new node of the main graph."""
        self.nodes.append(ir.node(op, list(inputs), attributes))
        return self.nodes[-1].outputs[0]

    def layer(self, x: ir.Value, i: int) -> ir.Value:
        """MatMul, bias, Relu, residual, and a LayerNormalization in small ops."""
        bias = self.constant(f"bias_{i}", np.zeros(CHANNELS, np.float32))
        product = self.node("MatMul", x, self.weight(f"weight_{i}"))
        total = self.node("Add", self.node("Relu", self.node("Add", product, bias)), x)
        centred = self.node("Sub", total, self.node("ReduceMean", total, self.axis))
        variance = self.node("ReduceMean", self.node("Pow", centred, self.two), self.axis)
        root = self.node("Sqrt", self.node("Add", variance, self.small))
        gamma = self.constant(f"gamma_{i}", np.ones(CHANNELS, np.float32))
        return self.node("Mul", self.node("Div", centred, root), gamma)

    def fan(self, x: ir.Value) -> ir.Value:
        """Six readers of one value."""
        parts = [self.node(op, x) for op in ("Neg", "Abs", "Sigmoid", "Tanh", "Exp", "Relu")]
        return self.node("Tanh", self.node("Sum", *parts))

    def branch(self, x: ir.Value, i: int) -> ir.Value:
        """An If whose bodies read what is around them."""
        product = ir.node("MatMul", [x, self.weight(f"branch_{i}")])
        bodies = {}
        for name, nodes in (
            ("then_branch", [product, ir.node("Tanh", product.outputs)]),
            ("else_branch", [ir.node("Neg", [x])]),
        ):
            result = nodes[-1].outputs[0]
            result.name = f"{name}_{i}"
            result.type, result.shape = self.x.type, self.x.shape
            bodies[name] = ir.Graph([], [result], nodes=nodes, name=f"{name}_{i}_graph")
            self.inner += len(nodes)
        return self.node("If", self.condition, **bodies)

    def build(self, nodes: int) -> ir.Model:
        """A model of at least so many nodes."""
        value, layers = self.x, 0
        while len(self.nodes) + self.inner < nodes:
            layers += 1
            value = self.layer(value, layers)
            if layers % FAN_EVERY == 0:
                value = self.fan(value)
            if layers % BRANCH_EVERY == 0:
                value = self.branch(value, layers)
        value.type, value.shape = self.x.type, self.x.shape
        graph = ir.Graph(
            [self.x, self.condition],
            [value],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": 21},
            name="scale",
        )
        return ir.Model(graph, ir_version=10)
