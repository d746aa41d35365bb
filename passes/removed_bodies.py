"""Let go of what the bodies of removed nodes read.

A node that is removed no longer reads anything, but the nodes in its body still do: those of the
branch of an If that is never taken, once its condition was found to be constant.  They would count
as readers of values of the main graph.

Part of `canonicalize`.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import every_graph

__all__ = ["release_outer_values"]


def release_outer_values(model: ir.Model) -> None:
    """Detach every reader that lies in no graph of the model."""
    graphs = list(every_graph(model.graph))
    living = set(graphs)
    for graph in graphs:
        made = (value for node in graph for value in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *made):
            for node, index in list(value.uses()):
                if node.graph not in living:
                    node.replace_input_with(index, None)
