"""Shape inference part by part finds what inference of the whole graph finds."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from qcompiler.passes.infer_in_parts import infer_shapes

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def layers(count: int) -> onnx.ModelProto:
    """Sizes computed at the beginning and used in every layer, results of unknown size, and Ifs."""
    lines = [
        "shape = Shape(x)",
        "rows = Gather<axis=0>(shape, zero)",
        "rows_1 = Unsqueeze(rows, axis)",
        "wide = Concat<axis=0>(rows_1, sizes)",
        "v0 = Identity(x)",
    ]
    for i in range(count):
        lines += [
            f"a{i} = Reshape(v{i}, wide)",
            f"b{i} = If(condition) <"
            f"then_branch = then_{i} () => (float[?, ?, ?] t{i}) {{ t{i} = Tanh(a{i}) }}, "
            f"else_branch = else_{i} () => (float[?, ?, ?] e{i}) "
            f"{{ n{i} = Neg(a{i}) e{i} = Add(n{i}, a{i}) }}>",
            f"where{i} = NonZero(b{i})",
            f"picked{i} = GatherND(b{i}, picks)",
            f"v{i + 1} = Reshape(b{i}, shape)",
        ]
    body = "\n".join(lines)
    return onnx.parser.parse_model(
        f"{HEAD} g (float[n, 32] x, bool condition, int64[k, 3] picks) => (float[?, ?] v{count}) "
        f"<int64 zero = {{0}}, int64[1] axis = {{0}}, int64[2] sizes = {{4, 8}}> {{ {body} }}"
    )


def found(graph: onnx.GraphProto) -> dict[str, str]:
    """What is known of each value; a generated name of a dimension is only that."""
    said = {}
    for value in [*graph.value_info, *graph.output]:
        type = value.type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in type.shape.dim]
        generated = ["?" if str(dim).startswith("unk__") else dim for dim in dims]
        said[value.name] = f"{type.elem_type} {generated}"
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                said |= found(attribute.g)
    return said


def symbols(graph: onnx.GraphProto) -> list[str]:
    dims = (dim for value in graph.value_info for dim in value.type.tensor_type.shape.dim)
    return [dim.dim_param for dim in dims if dim.dim_param.startswith("unk__")]


@pytest.mark.parametrize("part", [1, 3, 16])
def test_finds_the_same_as_in_the_whole_graph(part: int) -> None:
    model = layers(8)
    before = model.SerializeToString()
    whole = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    parts = infer_shapes(model, strict=True, part=part)
    assert found(parts.graph) == found(whole.graph)
    assert "n" in found(parts.graph)["a7"], "the size of the input reaches the last layer"
    assert [node.op_type for node in parts.graph.node] == [n.op_type for n in model.graph.node]
    assert model.SerializeToString() == before


def test_dimensions_that_nobody_knows_have_names_of_their_own_in_each_part() -> None:
    whole = onnx.shape_inference.infer_shapes(layers(8), strict_mode=True, data_prop=True)
    parts = infer_shapes(layers(8), strict=True, part=3)
    count = len(set(symbols(whole.graph)))
    assert count >= 8, "NonZero gives a size that nothing tells"
    assert len(set(symbols(parts.graph))) == count


def test_names_of_an_earlier_inference_are_not_given_again() -> None:
    model = infer_shapes(layers(8), strict=True, part=3)
    before = set(symbols(model.graph))
    model.graph.input.extend(layers(8).graph.input)
    model.graph.initializer.extend(layers(8).graph.initializer)
    model.graph.node.append(onnx.helper.make_node("NonZero", ["x"], ["other"]))
    again = infer_shapes(model, strict=True, part=3).graph
    (other,) = (value for value in again.value_info if value.name == "other")
    (size,) = symbols(onnx.GraphProto(value_info=[other]))
    assert before
    assert size not in before
    assert before < set(symbols(again))


def test_sizes_that_pass_through_floats_reach_the_next_part() -> None:
    model = layers(3)
    first = model.graph.node[1:2]
    assert first[0].op_type == "Gather"
    first[0].output[0] = "rows_whole"
    cast = onnx.helper.make_node
    to_float = cast("Cast", ["rows_whole"], ["rows_float"], to=onnx.TensorProto.FLOAT)
    model.graph.node.insert(2, to_float)
    to_whole = cast("Cast", ["rows_float"], ["rows"], to=onnx.TensorProto.INT64)
    model.graph.node.insert(3, to_whole)
    whole = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert "n" in found(whole.graph)["a2"]
    assert found(infer_shapes(model, strict=True, part=3).graph) == found(whole.graph)


def test_what_contradicts_itself_is_an_error_in_any_part_only_if_strict() -> None:
    model = layers(8)
    model.graph.value_info.append(
        onnx.helper.make_tensor_value_info("a7", onnx.TensorProto.FLOAT, ["n", 5, 8])
    )
    with pytest.raises(onnx.shape_inference.InferenceError, match=r"4.*5|5.*4"):
        infer_shapes(model, strict=True, part=4)
    whole = onnx.shape_inference.infer_shapes(model, data_prop=True)
    assert found(infer_shapes(model, strict=False, part=4).graph) == found(whole.graph)


def test_a_small_graph_is_inferred_whole() -> None:
    model = layers(2)
    assert infer_shapes(model, strict=True) == onnx.shape_inference.infer_shapes(
        model, strict_mode=True, data_prop=True
    )
