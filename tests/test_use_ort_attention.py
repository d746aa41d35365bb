"""use-ort-attention: attention becomes ONNX Runtime's op, in each order of heads and tokens."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, sqnr, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.use_ort_attention import UseOrtAttention
from qcompiler.pipeline import Pipeline

RNG = np.random.default_rng(0)
HEADS, D = 4, 16
CONSTANTS = {
    "scale": np.float32(0.25), "zero": np.float32(0),
    "split": np.asarray([0, 0, HEADS, D]), "join": np.asarray([0, 0, HEADS * D]),
}  # fmt: skip
ROWS = f"m,s,{HEADS * D}"
CACHE = f"m,{HEADS},t,{D}"


def text(kind="float", mask="", cached=False, end="", guarded=False):
    """Queries of a projection; keys and values too, or of a cache."""
    kv = (
        f"{kind}[{CACHE}] k, {kind}[{CACHE}] v" if cached else f"{kind}[{ROWS}] k, {kind}[{ROWS}] v"
    )
    body = "qr = Reshape(q, split) qt = Transpose<perm=[0,2,1,3]>(qr) "
    if cached:
        body += "kt = Transpose<perm=[0,1,3,2]>(k) vt = Identity(v) "
    else:
        body += ("kr = Reshape(k, split) kt = Transpose<perm=[0,2,3,1]>(kr) "
                 "vr = Reshape(v, split) vt = Transpose<perm=[0,2,1,3]>(vr) ")  # fmt: skip
    body += "p = MatMul(qt, kt) s = Mul(p, scale) "
    body += "a = Add(s, mask) w = Softmax(a) " if mask else "w = Softmax(s) "
    body += "nan = IsNaN(w) u = Where(nan, zero, w) " if guarded else ""
    body += f"c = MatMul({'u' if guarded else 'w'}, {'v' if cached else 'vt'}) "
    body += end or "ct = Transpose<perm=[0,2,1,3]>(c) y = Reshape(ct, join) "
    shape = f"m,{HEADS},s,{D}" if end else ROWS
    mask = f", {kind}[{mask}] mask" if mask else ""
    return f"g ({kind}[{ROWS}] q, {kv}{mask}) => ({kind}[{shape}] y) {{ {body} }}"


def feeds(dtype=np.float32, mask=None, cached=False):
    rows, cache = (2, 3, HEADS * D), (2, HEADS, 5, D)
    found = {"q": RNG.standard_normal(rows)}
    found |= {name: RNG.standard_normal(cache if cached else rows) for name in "kv"}
    found |= {} if mask is None else {"mask": np.where(RNG.random(mask) < 0.4, -30000, 0)}
    return {name: array.astype(dtype) for name, array in found.items()}


def replaced(source, given):
    dtype = given["q"].dtype
    model = model_of(source, {n: v.astype(dtype) if v.dtype == np.float32 else v
                              for n, v in CONSTANTS.items()})  # fmt: skip
    for node in model.graph:
        node.name = node.outputs[0].name
    before, rewrite = run(model, given, plainly=True), UseOrtAttention()
    assert rewrite(model).modified
    verify(model, Stage.KERNEL, "use-ort-attention")
    printed = text_of(model)
    assert not rewrite(model).modified
    assert text_of(model) == printed
    floor = 110 if dtype == np.float32 else 50
    for got, want in zip(run(model, given, plainly=True), before, strict=True):
        assert got.dtype == want.dtype
        assert sqnr(want, got) > floor
    return model


def ops(model):
    return [node.op_type for node in model.graph]


def test_golden():
    model = model_of(text(mask="m,1,s,s"), CONSTANTS)
    after = """inputs q, k, v, mask
        v6 = Max  (mask, v5)
        v7 = Shape {'end': '2', 'start': '1'} (q)
        v8 = Shape {'end': '2', 'start': '1'} (k)
        v10 = Concat {'axis': '0'} (v9, v7, v8)
        v11 = Expand  (v6, v10)
        v12 = com.microsoft.MultiHeadAttention {'num_heads': '4', 'scale': '0.25'} \
(q, k, v, -, -, v11)
        v14 = Reshape  (v12, v13)
        y = Reshape  (v14, v15)
        outputs y"""
    given = feeds(mask=(2, 1, 3, 3))
    assert_rewrites(UseOrtAttention(), model, after, given, exact=False, floor_db=110)


def test_projections_are_read_as_they_are():
    model = replaced(text(), feeds())
    assert ops(model) == ["MultiHeadAttention", "Reshape", "Reshape"]
    attention = model.graph[0]
    assert [value.name for value in attention.inputs] == ["q", "k", "v"]
    assert attention.attributes.get_int("num_heads") == HEADS
    assert attention.attributes.get_float("scale") == 0.25
    assert decision_of(attention).why.startswith("ONNX Runtime's own attention")


def test_a_cache_is_read_as_it_is():
    model = replaced(text(cached=True), feeds(cached=True))
    (attention,) = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
    assert [value.name for value in attention.inputs] == ["q", "k", "v"]
    assert "Transpose" not in ops(model)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("mask", ["m,1,1,{t}", "1,1,s,{t}", "{t}"])
def test_a_mask_gets_its_full_size(mask, cached):
    t = "t" if cached else "s"
    sizes = {"m": 2, "1": 1, "s": 3, "t": 5}
    mask = mask.format(t=t)
    given = feeds(mask=tuple(sizes[dim] for dim in mask.split(",")), cached=cached)
    model = replaced(text(mask=mask, cached=cached), given)
    assert "Expand" in ops(model)


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("mask", ["m,1,s,s", "1,4,s,s", "s,s"])
def test_rows_that_are_masked_throughout_are_zeros(mask, kind):
    sizes = {"m": 2, "1": 1, "4": HEADS, "s": 3}
    given = feeds(np.float32 if kind == "float" else np.float16)
    added = np.zeros([sizes[dim] for dim in mask.split(",")])
    added[..., 0, 1] = added[..., 1, :] = -np.inf
    given["mask"] = added.astype(given["q"].dtype)
    model = replaced(text(kind, mask=mask, guarded=True), given)
    (y,) = run(model, given, plainly=True)
    assert not y[:, 1].any()
    assert y[:, 0].any()
    assert "Where" in ops(model)


def test_a_guard_without_a_mask_has_nothing_to_do():
    assert ops(replaced(text(guarded=True), feeds())) == [
        "MultiHeadAttention",
        "Reshape",
        "Reshape",
    ]


def test_float16():
    replaced(text("float16", mask="m,1,1,s"), feeds(np.float16, mask=(2, 1, 1, 3)))


def test_a_result_with_heads_first_and_an_output_of_the_graph():
    model = replaced(text(end="y = Identity(c) "), feeds())
    assert "Transpose" in ops(model)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (text().replace(f"float[{ROWS}] k", f"float[n,s,{HEADS * D}] k"),
         "q, k and v are not known to be of one batch"),
        (text().replace("y = Reshape(ct, join)", "z = Reshape(ct, join) e = ReduceSum(w) "
                        "y = Add(z, e)"), "w is read elsewhere"),
    ],
)  # fmt: skip
def test_stays_with_a_reason(source, reason):
    model = model_of(source, CONSTANTS)
    before = text_of(model)
    assert not UseOrtAttention()(model).modified
    assert text_of(model) == before
    (softmax,) = [node for node in model.graph if node.op_type == "Softmax"]
    assert decision_of(softmax).why == f"not com.microsoft.MultiHeadAttention: {reason}"


def test_only_where_it_is_wanted():
    model = model_of(text(), CONSTANTS)
    assert not UseOrtAttention(wanted=False)(model).modified
    for target, wanted in (("cuda-int8", True), ("x86-int8", False), ("arm-int8", False)):
        steps = {step.name: step.rewrite for step in Pipeline.default(target)}
        assert steps["use-ort-attention"].wanted == wanted


def test_in_the_pipeline_for_gpus_it_is_in_float16():
    model = Pipeline.default("cuda-int4").run(model_of(text(mask="m,1,1,s"), CONSTANTS))
    (attention,) = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
    assert attention.outputs[0].dtype is ir.DataType.FLOAT16
