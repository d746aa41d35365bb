"""Modules that torchao's `quantize_` quantized: what arrives, and what is computed of it."""

from __future__ import annotations

import numpy as np
import pytest
from golden import run, sqnr

from qcompiler.frontend import load_model
from qcompiler.pipeline import Pipeline

torch = pytest.importorskip("torch", reason="torch is not installed")
quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(128, 256), torch.nn.Linear(256, 128, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def exported(config):
    torch.manual_seed(0)
    module, x = MLP().eval(), torch.randn(4, 7, 128)
    quantization.quantize_(module, config)
    batch = torch.export.Dim("n", min=2, max=64)
    return torch.export.export(module, (x,), dynamic_shapes=({0: batch},)), module, x


CONFIGS = {
    "int8 weights": lambda: quantization.Int8WeightOnlyConfig(),
    "int8 weights in groups": lambda: quantization.Int8WeightOnlyConfig(
        granularity=quantization.PerGroup(32)
    ),
    "int8 tokens": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    "int4 weights": lambda: quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
    ),
    "int4 weights, int8 tokens": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
    ),
}


@pytest.mark.parametrize(
    ("name", "target", "op", "floor"),
    [
        # The target quantizes activations, too, or ORT does.
        ("int8 weights", "x86-int8", "DynamicQMatMulW8A8", 45),
        ("int8 weights in groups", "x86-int8", "MatMul", 45),
        # torch multiplies by 1 / s, and so rounds some ties to the other side.
        # Its scale is absmax / 127.5, which no op of ours computes, but products take any.
        ("int8 tokens", "x86-int8", "QMatMulW8A8", 55),
        ("int4 weights", "x86-int4", "QMatMulW4A16", 45),
        ("int4 weights", "cuda-int4", "QMatMulW4A16", 45),
        ("int4 weights, int8 tokens", "x86-int8", "MatMul", 100),
    ],
)
def test_a_quantized_module(name, target, op, floor):
    program, module, x = exported(CONFIGS[name]())
    model = load_model(program)
    (feed,) = model.graph.inputs
    for rows in (4, 3):
        expected = module(x[:rows]).detach().numpy()
        assert sqnr(expected, run(model, {feed.name: x[:rows].numpy()}, plainly=True)[0]) > 60
    compiled = Pipeline.default(target).run(model)
    products = [node.op_type for node in compiled.graph if "MatMul" in node.op_type]
    assert len(products) == 2
    assert all(product.split("_")[0] == op for product in products)
    got = run(compiled, {compiled.graph.inputs[0].name: x.numpy()})[0]
    assert sqnr(module(x).detach().numpy(), got) > floor
    assert np.isfinite(got).all()
