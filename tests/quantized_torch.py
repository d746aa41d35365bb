"""Torch modules of quantized ops, and what they and their models compute."""

import pytest
from golden import run

from qcompiler.frontend import load_model

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("torch.ao.quantization.fx._decomposed")  # registers the quantized ops

Q = torch.ops.quantized_decomposed


class Of(torch.nn.Module):
    """A function of an input and of constants."""

    def __init__(self, function, **constants):
        super().__init__()
        self.function, self.names = function, list(constants)
        for name, value in constants.items():
            self.register_buffer(name, torch.as_tensor(value))

    def forward(self, x):
        return self.function(x, *(getattr(self, name) for name in self.names))


def both(module, *inputs, dynamic=True):
    """The model of a module, and its results and the module's for each input."""
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    model = load_model(module.eval(), (torch.from_numpy(inputs[0]),), shapes)
    pairs = []
    for x in inputs:
        with torch.no_grad():
            expected = module(torch.from_numpy(x)).numpy()
        pairs.append((run(model, {model.graph.inputs[0].name: x})[0], expected))
    return model, pairs


def nodes(model, op):
    return [node for node in model.graph if node.op_type == op]
