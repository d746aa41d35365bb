"""bind-kernels: the domain that outlined regions move to, and that the numbers stay."""

from golden import assert_step, model_of
from test_regions import B, W, X


def assert_binds(text, before, after, **checks):
    model = model_of(text, {"w": W, "b": B, "v": -W})
    return assert_step("bind-kernels", model, before, after, X, **checks)


def test_golden_binding_renames_the_domain():
    assert_binds(
        "g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) a = Add (p, b) y = Sin (a) }",
        """inputs x
        v5 = qcompiler.region.DynamicQMatMulW8A8_K64_N8_AddC  (x, v2, v3, v4)
        y = Sin  (v5)
        outputs y""",
        """inputs x
        v5 = qcompiler.<hash>.DynamicQMatMulW8A8_K64_N8_AddC  (x, v2, v3, v4)
        # kernel: fused with Add; quantizes its input
        y = Sin  (v5)
        outputs y""",
        notes=True,
    )


def test_golden_bound_products_share_an_input_and_a_function():
    model = assert_binds(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) { y = MatMul (x, w) z = MatMul (x, v) }",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        y = qcompiler.region.QMatMulW8A8_K64_N8  (v3, v4, v5, v6)
        z = qcompiler.region.QMatMulW8A8_K64_N8  (v3, v4, v7, v8)
        outputs y, z""",
        """inputs x
        v3, v4 = qcompiler.<hash>.Quantize_K64  (x)
        y = qcompiler.<hash>.QMatMulW8A8_K64_N8  (v3, v4, v5, v6)
        z = qcompiler.<hash>.QMatMulW8A8_K64_N8  (v3, v4, v7, v8)
        outputs y, z""",
    )
    assert sorted(name for _, name, _ in model.functions) == ["QMatMulW8A8_K64_N8", "Quantize_K64"]


def test_golden_nothing_to_bind():
    assert_binds(
        "g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }",
        """inputs x
        v2, v3 = qcompiler.Quantize {'block_size': '64'} (x)
        y = qcompiler.QMatMulW4A8 {'block_size': '32'} (v2, v3, v4, v5)
        outputs y""",
        """inputs x
        v2, v3 = qcompiler.Quantize {'block_size': '64'} (x)
        # body, unexpected: no arm-int4 kernels yet
        y = qcompiler.QMatMulW4A8 {'block_size': '32'} (v2, v3, v4, v5)
        # body, unexpected: no arm-int4 kernels yet
        outputs y""",
        target="arm-int4",
        notes=True,
    )
