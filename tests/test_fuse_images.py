"""fuse-images: chains of convolutions for GPUs that stay in 8 bits."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from calibrated import facts
from golden import assert_rewrites, assert_step, model_of, run, sqnr, steps_through

from qcompiler.ir.decisions import decision_of, note_of
from qcompiler.ir.region import HALF, Region
from qcompiler.model_runs import ModelRuns
from qcompiler.pipeline import Pipeline
from qcompiler.targets import cuda

RNG = np.random.default_rng(0)
IMAGES = {"x": RNG.standard_normal((2, 16, 10, 9)).astype(np.float32)}


def weight(*shape: int) -> Any:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


LAYERS = {
    "w1": weight(24, 16, 3, 3), "b": weight(24), "w2": weight(24, 24, 3, 3),
    "w3": weight(24, 24, 1, 1), "deep": weight(24, 1, 3, 3), "groups": weight(24, 12, 3, 3),
    "six": np.float32(6), "none": np.float32(0),
}  # fmt: skip
HEAD = "g (float[m,16,10,9] x) => (float[m,24,1,1] y) { "
LAST = " y = GlobalAveragePool (z) }"


def supports(region: Region) -> str | None:
    return cuda.supports(region) if HALF in region.flags else "float"


def for_gpus(supports: Any = supports) -> Pipeline:
    """That of cuda-int8."""
    _, observer = facts([IMAGES])
    return Pipeline.default("cuda-int8", runs=ModelRuns(observe=observer), supports=supports)


def compiled(text: str, supports: Any = supports) -> ir.Model:
    """For cuda-int8; checked to answer as the network does, and as without this pass."""
    subject = model_of(text, LAYERS)
    exact = run(subject, IMAGES, plainly=True)[0]
    results = []
    for stop in (None, "fuse-images"):
        pipeline = for_gpus(supports)
        if stop is not None:
            pipeline.remove(stop)
        results.append(pipeline.run(model_of(text, LAYERS)))
    fused, plain = (run(result, IMAGES, plainly=True)[0] for result in results)
    assert sqnr(exact, fused) > 30
    np.testing.assert_array_equal(fused, plain)
    return results[0]


def ops(model: ir.Model) -> list[str]:
    ours = [node for node in model.graph if node.domain.startswith("qcompiler")]
    return [re.sub("_[0-9a-f]{6}$", "", node.op_type) for node in ours]


def test_a_chain_stays_in_8_bits() -> None:
    model = compiled(
        HEAD + "c = Conv <pads = [1,1,1,1]> (x, w1, b) r = Relu (c) "
        "d = Conv <group = 24, pads = [1,1,1,1], strides = [2,2]> (r, deep) "
        "e = Clip (d, none, six) f = Conv <group = 2> (e, groups) z = Conv (f, w3)" + LAST
    )
    assert ops(model) == [
        "QuantizeImage_K16_f16",
        "QConvImageW8A8_K16_N24_R3_S3_f16_AddC_Relu_made",
        "QConvImageW8A8_K24_N24_R3_S3_f16_Clip_made",
        "QConvImageW8A8_K24_N24_R3_S3_f16_made",
        "QConvW8A8_K24_N24_R1_S1_f16",
    ]
    node = next(node for node in model.graph if "AddC_Relu" in node.op_type)
    assert decision_of(node).why.endswith("; stores its result in 8 bits")


def test_a_residual_is_read_as_floats_too() -> None:
    model = compiled(
        HEAD + "c = Conv <pads = [1,1,1,1]> (x, w1, b) r = Relu (c) "
        "d = Conv <pads = [1,1,1,1]> (r, w2) a = Add (d, r) z = Conv (a, w3)" + LAST
    )
    assert ops(model) == [
        "QuantizeImage_K16_f16",
        "QConvImageW8A8_K16_N24_R3_S3_f16_AddC_Relu_ymade",
        "QConvImageW8A8_K24_N24_R3_S3_f16_AddT_made",
        "QConvW8A8_K24_N24_R1_S1_f16",
    ]


def test_of_two_images_the_one_that_more_read() -> None:
    """Two convolutions read it with a border of one pixel, and one without."""
    model = compiled(
        HEAD + "c = Conv <pads = [1,1,1,1]> (x, w1, b) r = Relu (c) k = Conv (r, w3) "
        "d = Conv <pads = [1,1,1,1]> (r, w2) e = Conv <group = 24, pads = [1,1,1,1]> (r, deep) "
        "a = Add (d, e) z = Add (a, k)" + LAST
    )
    found = ops(model)
    assert [name for name in found if name.startswith("QuantizeImage")] == [
        "QuantizeImage_K16_f16", "QuantizeImage_K24_f16"
    ]  # fmt: skip
    (both,) = (node for node in model.graph if "ymade" in node.op_type)
    assert len(both.outputs[1].uses()) == 2


@pytest.mark.parametrize(
    "between", ["p = MaxPool <kernel_shape = [2,2]> (r)", "p = Concat <axis = 1> (r)"]
)
def test_what_stands_between_keeps_floats(between: str) -> None:
    model = compiled(
        HEAD + f"c = Conv <pads = [1,1,1,1]> (x, w1, b) r = Relu (c) {between} z = Conv (p, w3)"
        + LAST
    )  # fmt: skip
    if "Concat" in between:  # of one, which is nothing
        assert "QuantizeImage_K24_f16" not in ops(model)
        return
    assert "QuantizeImage_K24_f16" in ops(model)


def test_without_such_kernels_the_reason_is_noted() -> None:
    def without(region: Region) -> str | None:
        return "not today" if region.anchor == "QConvImageW8A8" else supports(region)

    model = compiled(
        HEAD + "c = Conv <pads = [1,1,1,1]> (x, w1, b) r = Relu (c) z = Conv (r, w3)" + LAST,
        without,
    )
    assert "QuantizeImage_K24_f16" in ops(model)
    conv = next(node for node in model.graph if "AddC_Relu" in node.op_type)
    assert "its result is not stored as an image: not today" in (note_of(conv) or "")


CHAIN = HEAD + "c = Conv <pads = [1,1,1,1]> (x, w1, b) r = Relu (c) z = Conv (r, w3)" + LAST


def assert_joins(text: str, before: str, after: str | None = None, **checks: Any) -> None:
    model = model_of(text, LAYERS)
    assert_step("fuse-images", model, before, after, IMAGES, pipeline=for_gpus(), **checks)


def test_golden_a_convolution_stores_the_image_of_the_next() -> None:
    assert_joins(
        CHAIN,
        """inputs x
        v2 = Cast {'to': '10'} (x)
        v5 = qcompiler.region.QuantizeImage_K16_f16_bbe2b0  (v2, v3, v4)
        v9 = qcompiler.region.QConvW8A8_K16_N24_R3_S3_f16_AddC_Relu_e925c2  (v5, v3, v4, v6, v7, v8)
        v12 = qcompiler.region.QuantizeImage_K24_f16_0626d9  (v9, v10, v11)
        v15 = qcompiler.region.QConvW8A8_K24_N24_R1_S1_f16_b45df7  (v12, v10, v11, v13, v14)
        v16 = GlobalAveragePool  (v15)
        y = Cast {'to': '1'} (v16)
        outputs y""",
        """inputs x
        v2 = Cast {'to': '10'} (x)
        # float: between float16 and float32
        v5 = qcompiler.region.QuantizeImage_K16_f16_bbe2b0  (v2, v3, v4)
        # body, unexpected: outlined
        v11 = qcompiler.region.QConvImageW8A8_K16_N24_R3_S3_f16_AddC_Relu_made_1445b3  """
        """(v5, v3, v4, v6, v7, v8, v9, v10)
        # body, unexpected: fused with Add + Relu; stores its result in 8 bits
        v14 = qcompiler.region.QConvW8A8_K24_N24_R1_S1_f16_b45df7  (v11, v8, v9, v12, v13)
        # body, unexpected: outlined
        v15 = GlobalAveragePool  (v14)
        y = Cast {'to': '1'} (v15)
        # float: between float16 and float32
        outputs y""",
        notes=True,
    )


def test_golden_floats_that_are_read_elsewhere_too() -> None:
    assert_joins(
        CHAIN.replace("y = ", "n = Sin (r) a = Add (n, z) y = ").replace("Pool (z)", "Pool (a)"),
        """inputs x
        v2 = Cast {'to': '10'} (x)
        v5 = qcompiler.region.QuantizeImage_K16_f16_bbe2b0  (v2, v3, v4)
        v9 = qcompiler.region.QConvW8A8_K16_N24_R3_S3_f16_AddC_Relu_e925c2  (v5, v3, v4, v6, v7, v8)
        v10 = Cast {'to': '1'} (v9)
        v13 = qcompiler.region.QuantizeImage_K24_f16_0626d9  (v9, v11, v12)
        v14 = Sin  (v10)
        v15 = Cast {'to': '10'} (v14)
        v18 = qcompiler.region.QConvW8A8_K24_N24_R1_S1_f16_AddT_1680c2  """
        """(v13, v11, v12, v16, v17, v15)
        v19 = GlobalAveragePool  (v18)
        y = Cast {'to': '1'} (v19)
        outputs y""",
        """inputs x
        v2 = Cast {'to': '10'} (x)
        v5 = qcompiler.region.QuantizeImage_K16_f16_bbe2b0  (v2, v3, v4)
        v11, v12 = qcompiler.region.QConvImageW8A8_K16_N24_R3_S3_f16_AddC_Relu_ymade_4d3d4d  """
        """(v5, v3, v4, v6, v7, v8, v9, v10)
        v13 = Cast {'to': '1'} (v11)
        v14 = Sin  (v13)
        v15 = Cast {'to': '10'} (v14)
        v18 = qcompiler.region.QConvW8A8_K24_N24_R1_S1_f16_AddT_1680c2  """
        """(v12, v8, v9, v16, v17, v15)
        v19 = GlobalAveragePool  (v18)
        y = Cast {'to': '1'} (v19)
        outputs y""",
    )


def test_golden_floats_that_leave_the_graph() -> None:
    *earlier, step = steps_through("fuse-images", pipeline=for_gpus())
    model = Pipeline(earlier).run(model_of(CHAIN, LAYERS))
    (conv,) = (node for node in model.graph if "AddC_Relu" in node.op_type)
    model.graph.outputs.append(conv.outputs[0])
    assert_rewrites(
        step.rewrite,
        model,
        """inputs x
        v3 = Cast {'to': '10'} (x)
        v6 = qcompiler.region.QuantizeImage_K16_f16_bbe2b0  (v3, v4, v5)
        r, v12 = qcompiler.region.QConvImageW8A8_K16_N24_R3_S3_f16_AddC_Relu_ymade_4d3d4d  """
        """(v6, v4, v5, v7, v8, v9, v10, v11)
        v15 = qcompiler.region.QConvW8A8_K24_N24_R1_S1_f16_b45df7  (v12, v9, v10, v13, v14)
        v16 = GlobalAveragePool  (v15)
        y = Cast {'to': '1'} (v16)
        outputs y, r""",
        IMAGES,
    )


def test_golden_an_image_of_what_is_no_convolution() -> None:
    assert_joins(
        HEAD + "c = Conv (x, w1) r = MaxPool <kernel_shape = [2,2]> (c) z = Conv (r, w3)" + LAST,
        """inputs x
        v2 = Cast {'to': '10'} (x)
        v5 = qcompiler.region.QuantizeImage_K16_f16_c42589  (v2, v3, v4)
        v8 = qcompiler.region.QConvW8A8_K16_N24_R3_S3_f16_1b7724  (v5, v3, v4, v6, v7)
        v9 = MaxPool {'kernel_shape': '(2, 2)'} (v8)
        v12 = qcompiler.region.QuantizeImage_K24_f16_0626d9  (v9, v10, v11)
        v15 = qcompiler.region.QConvW8A8_K24_N24_R1_S1_f16_b45df7  (v12, v10, v11, v13, v14)
        v16 = GlobalAveragePool  (v15)
        y = Cast {'to': '1'} (v16)
        outputs y""",
    )
