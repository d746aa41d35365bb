"""Widen a model of 16-bit floats to float32, in which it is quantized.

    y = MatMul(x, w)    =>    wide = MatMul(Cast <to = FLOAT> (x), w_float32)
                              y = Cast <to = FLOAT16> (wide)

Exact as far as constants go; what is computed is rounded less.  Inputs and outputs of the model
keep their types, by Casts at its border; a Cast between floats inside it is gone.  Ops of other
domains keep theirs, between Casts, but for those that are lifted into float ops
(`lift_qoperators`).  Where the target computes in float16, `convert_float16` ends in it again: from
float32, so that what leaves its range is found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import constant, drop_if_unread, every_node, new_initializer, place_after
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.lift_few_bits import multiplies_floats

__all__ = ["SOURCE_BORDER", "WidenFloats", "border_cast", "drop_idle_casts"]

SOURCE_BORDER = "a border between the source's 16-bit floats and float32"
"""Why there is a Cast that the source does not have."""

_WIDE = ir.DataType.FLOAT
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_TAKE_ANY = frozenset({
    "DequantizeLinear", "DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulIntegerToFloat",
    "MatMulNBits", "QuantizeLinear",
})  # fmt: skip
"""Ops of com.microsoft that are lifted, in float32 only."""

_TYPES = (
    "dtype", "output_datatype", "output_dtype", "precision", "softmax_precision", "stash_type",
    "to",
)  # fmt: skip
"""Attributes that name the type of a result, or of what is summed."""


class WidenFloats(ir.passes.InPlacePass):
    """Widen what computes in float16 or bfloat16.

    Attributes:
        back: Whether what is not quantized becomes float16 again.
        products: Whether every MatMulNBits is lifted; otherwise those that multiply floats stay
            ORT's, and keep their type where the rest comes back to it.
        notes: What the user should know of the last run.
    """

    rounds = True
    """The source rounds each result, and the widened model does not."""

    def __init__(self, back: bool = False, products: bool = True) -> None:
        super().__init__()
        self.back, self.products = back, products
        self.notes: tuple[str, ...] = ()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen in place."""
        self.notes = ()
        nodes = list(every_node(model.graph))
        narrow = {v.dtype for v in _values(model) if v.dtype in _NARROW}
        kept = {node for node in nodes if self._keeps_type(node)}
        computing = [node for node in nodes if node not in kept and _computes_narrow(node)]
        if not computing:
            return ir.passes.PassResult(model, False)
        names = " and ".join(sorted(dtype.name.lower() for dtype in narrow if dtype))
        _Widening(model, kept).run(nodes)
        drop_idle_casts(model)
        common.RemoveUnusedNodesPass()(model)
        FixNames()(model)
        self.notes = (_told(names, len(computing), back=self.back),)
        return ir.passes.PassResult(model, True)

    def _keeps_type(self, node: ir.Node) -> bool:
        if (node.domain, node.op_type in _TAKE_ANY) != ("com.microsoft", True):
            return node.domain != ""
        return self.back and not self.products and multiplies_floats(node) is not None


def _told(names: str, count: int, *, back: bool) -> str:
    nodes = "1 node" if count == 1 else f"{count} nodes"
    end = (
        "what is not quantized computes in float16 in the end, where its range allows"
        if back
        else "what is not quantized stays float32, which is twice the bytes"
    )
    return (
        f"the source computes in {names} ({nodes}): widened to float32 to be quantized, inputs and "
        f"outputs keep their types; {end}"
    )


def _values(model: ir.Model) -> Iterable[ir.Value]:
    """All values of all graphs."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _computes_narrow(node: ir.Node) -> bool:
    """Whether the pass would change anything about a node that does not keep its type."""
    values = [v for v in [*node.inputs, *node.outputs] if v is not None]
    border = node.op_type == "Cast" and any(
        v.is_graph_input() or v.is_graph_output() for v in values
    )
    return not border and any(v.dtype in _NARROW for v in values)


class _Widening:
    """Gives values their new type, and puts Casts where it meets the old ones."""

    def __init__(self, model: ir.Model, kept: Collection[ir.Node]) -> None:
        self.model, self.kept = model, kept
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self, nodes: Iterable[ir.Node]) -> None:
        """Widen all there is between the inputs and outputs of the model."""
        nodes, graph = list(nodes), self.model.graph
        kept = {
            (node, index): value.dtype
            for node in nodes
            if node in self.kept
            for index, value in enumerate(node.inputs)
            if value is not None and value.dtype in _NARROW
        }
        made = [v for node in nodes if node in self.kept for v in node.outputs]
        borders = dict.fromkeys(v for v in [*graph.inputs, *made] if v.dtype in _NARROW)
        results = {index: v.dtype for index, v in enumerate(graph.outputs) if v.dtype in _NARROW}
        wide = {border: self._cast_after(border) for border in borders if self._is_read(border)}
        for value in list(_values(self.model)):
            if value not in borders:
                self._widen(value)
        for node in nodes:
            if node not in self.kept:
                _widen_attributes(node)
        for (node, index), dtype in kept.items():
            operand = node.inputs[index]
            assert operand is not None and dtype is not None
            known = [old for old, new in wide.items() if new is operand and old.dtype is dtype]
            node.replace_input_with(index, known[0] if known else self._narrowed(operand, dtype))
        for index, dtype in results.items():
            self._restore(index, dtype)

    def _is_read(self, border: ir.Value) -> bool:
        """By a node, or as what a branch makes."""
        made = border.is_graph_output() and border.graph is not self.model.graph
        return made or bool(border.uses())

    def _cast_after(self, border: ir.Value) -> ir.Value:
        """The value widened, for all that reads it."""
        uses = list(border.uses())
        cast = border_cast(border, _WIDE, f"{border.name}_float32", SOURCE_BORDER)
        place_after(border, [cast])
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
        if border.graph is not self.model.graph and border.graph is not None:
            # What a branch makes has the type of what its If or Loop makes.
            outputs = border.graph.outputs
            for index, output in enumerate(outputs):
                if output is border:
                    outputs[index] = cast.outputs[0]
        return cast.outputs[0]

    def _widen(self, value: ir.Value) -> None:
        if value.type is not None:
            value.type = _widened(value.type)
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _NARROW:
            wide = np.asarray(tensor.numpy(), np.float32)
            value.const_value = ir.Tensor(wide, name=value.name)

    def _narrowed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in a type of the source, for an op that keeps that; made once."""
        if (value, dtype) not in self.made:
            stem, array = f"{value.name}_{dtype.name.lower()}", constant(value)
            if array is not None:
                made = new_initializer(self.model.graph, stem, array.astype(dtype.numpy()))
            else:
                cast = border_cast(value, dtype, stem, SOURCE_BORDER)
                place_after(value, [cast])
                made = cast.outputs[0]
            self.made[value, dtype] = made
        return self.made[value, dtype]

    def _restore(self, index: int, dtype: ir.DataType | None) -> None:
        """Let an output of the model keep its name and type."""
        outputs = self.model.graph.outputs
        value = outputs[index]
        if value.dtype in _NARROW or dtype is None:
            return  # an input, or the result of an op that keeps its type
        narrow = self._narrowed(value, dtype)
        value.name, narrow.name = f"{value.name}_float32", value.name
        outputs[index] = narrow


def _widened(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    """The type with float32 for narrower floats, whatever is wrapped around it."""
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_widened(kind.elem_type))
    narrow = isinstance(kind, ir.TensorType) and kind.dtype in _NARROW
    return ir.TensorType(_WIDE) if narrow else kind


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if name in _TYPES and attribute.type is ir.AttributeType.INT:
            if attribute.as_int() in _NARROW:
                node.attributes[name] = ir.AttrInt64(name, int(_WIDE))
        elif attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _NARROW:
            wide = np.asarray(attribute.as_tensor().numpy(), np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(wide))


def border_cast(value: ir.Value, dtype: ir.DataType, name: str, why: str) -> ir.Node:
    """A Cast of `value`, in no graph yet; it and its result are called `name`."""
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = name, dtype, value.shape
    decide(cast, "float", why)
    return cast


def drop_idle_casts(model: ir.Model) -> bool:
    """Drop Casts from a float type to itself; whether there was one."""
    dropped = False
    for node in list(every_node(model.graph)):
        if node.op_type != "Cast" or node.domain != "":
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or source.dtype is None or source.dtype is not result.dtype:
            continue
        if source.dtype not in (_WIDE, *_NARROW) or not _take_place(source, result):
            continue
        drop_if_unread(result)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        dropped = True
    return dropped


def _take_place(source: ir.Value, result: ir.Value) -> bool:
    """Let `source` be read for `result`; whether that is all of it."""
    if result.is_graph_output():
        outputs = result.graph.outputs if result.graph is not None else []
        maker = source.producer()
        inner = maker is not None and maker.graph is result.graph and not source.is_graph_output()
        if not inner:
            return False
        source.name, result.name = result.name, f"{result.name}_idle"
        for index, output in enumerate(outputs):
            if output is result:
                outputs[index] = source
    ir.convenience.replace_all_uses_with(result, source)
    return True
