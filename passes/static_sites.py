"""Which tensors are stored with static scales, and whose scale each takes.

1. What planned ops read, for those readers alone; what they make, for every reader.
2. What a link moves has the scale of what it was, times a factor for links that scale.
3. What only a Concat reads has the scale of its result: bytes are copied, and rounded once.  Not
   what a Relu or Clip makes, unless all that is joined is: it is saturation that does their work.
4. HardSigmoid makes 0 to 1, whatever calibration saw.

Part of `insert_qdq`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qcompiler.ir.decisions import operand_plan_of, plan_of
from qcompiler.ir.graph import dequantize_of, only_consumer, rectified
from qcompiler.ir.types import QuantSpec, TensorStats
from qcompiler.passes.integer_links import Link, link_of

__all__ = ["StaticSite", "static_sites"]

_GATE = TensorStats(0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class StaticSite:
    """A tensor that gets a static pair.

    Attributes:
        value: The tensor.
        spec: What it is stored as.
        readers: Who reads the pair; None for all its readers.
        like: The tensor whose scale it takes; None: one of its own.
        factor: By what it multiplies that.
        stats: Its range, where calibration need not be asked.
        calibration: Where its range is cut off; None as for all others.
        link: What makes it, if that is a link that moves.
    """

    value: ir.Value
    spec: QuantSpec
    readers: frozenset[ir.Node] | None
    like: ir.Value | None = None
    factor: float = 1.0
    stats: TensorStats | None = None
    calibration: str | None = None
    link: Link | None = None


def static_sites(nodes: Iterable[ir.Node]) -> dict[ir.Value, StaticSite]:
    """One site per tensor of the planned ones among `nodes`; in the order of their makers."""
    read: dict[ir.Value, set[ir.Node]] = {}
    made: dict[ir.Value, StaticSite] = {}
    specs: dict[ir.Value, QuantSpec] = {}
    methods: dict[ir.Value, str | None] = {}
    concats: list[Link] = []
    for node in nodes:
        plan, operands = plan_of(node), operand_plan_of(node)
        if plan is not None and dequantize_of(node.inputs[0]) is None:
            data = node.inputs[0]
            if data is not None and plan.activation and plan.activation.scale == "static":
                read.setdefault(data, set()).add(node)
                specs[data] = plan.activation
                methods[data] = methods.get(data) or plan.calibration
            if plan.output is not None:
                result = rectified(node.outputs[0])
                made[result] = StaticSite(result, plan.output, None, calibration=plan.calibration)
        if operands is None or any(dequantize_of(value) is not None for value in node.inputs):
            continue
        link = link_of(node)
        for value in _read_by(node) if link is None else link.operands:
            read.setdefault(value, set()).add(node)
            specs[value] = operands.operands
        if link is not None and operands.output is not None:
            made |= _made_by(link, operands.output)
            concats += [link] if node.op_type == "Concat" else []
    _share_scales(made, concats)
    inputs = {
        value: StaticSite(value, specs[value], frozenset(readers), calibration=methods.get(value))
        for value, readers in read.items()
        if value not in made
    }
    made = {
        value: dataclasses.replace(site, calibration=site.calibration or methods.get(value))
        for value, site in made.items()
    }
    return inputs | made


def _share_scales(made: dict[ir.Value, StaticSite], concats: Iterable[Link]) -> None:
    """Give what is only joined the scale of the whole."""
    for link in concats:
        rectified_all = all(_maker(value) == "Relu" for value in link.operands)
        for value in link.operands:
            site, clamped = made.get(value), _maker(value) in ("Relu", "Clip")
            if site is None or site.like is not None or (clamped and not rectified_all):
                continue
            if only_consumer(value) is link.node:
                made[value] = dataclasses.replace(site, like=link.results[0])


def _read_by(node: ir.Node) -> list[ir.Value]:
    """What a product of two activations reads."""
    return [value for value in dict.fromkeys(node.inputs) if value is not None]


def _made_by(link: Link, spec: QuantSpec) -> Mapping[ir.Value, StaticSite]:
    if link.moves:
        data = link.operands[0]
        return {
            value: StaticSite(value, spec, None, data, link.factor, link=link)
            for value in link.results
        }
    stats = _GATE if link.node.op_type == "HardSigmoid" else None
    return {value: StaticSite(value, spec, None, stats=stats) for value in link.results}


def _maker(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type
