"""Where the time of a transformer goes: one table over all contenders, and the processor's floor.

Nodes are put into classes by op and shapes, so that the same rules hold for every runtime.  A fused
node is where its costliest part is.  "between nodes" is what a run takes beyond its nodes, which is
the runtime itself; nodes take longer when profiled, so that it may fall below zero.

The floor is what the arithmetic and the weights would take at measured limits: int8 multiply-adds
of everything with weights at the rate of vpdpbusd (of vpmaddubsw without VNNI), those of attention
at that of float32 FMA, and each weight once, as one byte, from memory.  Nothing overlaps in it;
norms, softmax, quantization and embeddings count as nothing.  Who rounds attention to bfloat16 or
int8 may go below it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from contenders import Contender, Feeds
from limits import limits
from profiles import Node
from timing import interleave

CLASSES = ("projections", "feed forward", "attention", "norms, residuals", "quantize",
           "embedding, head, rest")  # fmt: skip
PROJECTIONS, FEED_FORWARD, ATTENTION, NORMS, QUANTIZE, REST = CLASSES
BETWEEN, WEIGHTS, ALL = "between nodes", "weights from memory", "all"

_PRODUCTS = ("MatMul", "FullyConnected", "Gemm")
_QUANTIZE = ("Quantize", "DynamicQuantize", "FakeQuantize", "Dequantize")
_REST = ("Conv", "QLinearConv", "Gather", "Cast", "Shape", "Range", "Tile")


@dataclasses.dataclass(frozen=True)
class Widths:
    """The sizes that tell a transformer's matrix products apart."""

    hidden: int
    feed_forward: int


def region_class(node: Node, widths: Widths) -> str:
    """The class of a node."""
    shape = node.outputs[0] if node.outputs else ()
    if "Attention" in node.op:
        return ATTENTION
    if any(word in node.op for word in _PRODUCTS):
        return _product_class(node, shape, widths)
    if node.op.startswith(_QUANTIZE) or "smooth_quant" in node.name:
        return QUANTIZE
    if node.op.startswith(_REST):
        return REST
    if node.op == "Transpose":  # of heads, or after convolutions
        return REST if widths.hidden in node.inputs[0] else ATTENTION
    if len(shape) >= 4:
        return ATTENTION
    width = shape[-1] if len(shape) > 1 else 0
    if width == widths.feed_forward:
        return FEED_FORWARD
    if node.op == "Add" and (widths.hidden,) in node.inputs:  # a bias
        return PROJECTIONS
    is_norm = width == widths.hidden or (width == 1 and len(shape) == 3)  # a mean of each token
    return NORMS if is_norm else REST


def _product_class(node: Node, shape: tuple[int, ...], widths: Widths) -> str:
    if len(shape) >= 4:
        return ATTENTION
    sizes = node.inputs[0][-1], shape[-1]
    if any(size in (widths.feed_forward, 2 * widths.feed_forward) for size in sizes):
        return FEED_FORWARD
    return PROJECTIONS if max(sizes) <= 3 * widths.hidden else REST


def floor(fp32: Sequence[Node], widths: Widths, machine: Mapping[str, float],
          convolutions: tuple[int, int] = (0, 0)) -> dict[str, float]:  # fmt: skip
    """Milliseconds at the processor's limits, by class.

    Args:
        fp32: The nodes of the model as exported, every product a node of its own.
        widths: The model's.
        machine: What `limits.limits` measured.
        convolutions: Their multiply-adds and weights, which no profile tells.
    """
    macs: collections.Counter[str] = collections.Counter({REST: convolutions[0]})
    weights = convolutions[1]
    for node in fp32:
        if any(word in node.op for word in _PRODUCTS):
            kind, k = region_class(node, widths), node.inputs[0][-1]
            macs[kind] += k * math.prod(node.outputs[0])
            weights += k * node.outputs[0][-1] if kind != ATTENTION else 0
    rates = {ATTENTION: machine["float_macs_per_s"]}
    result = {k: 1e3 * n / rates.get(k, machine["int8_macs_per_s"]) for k, n in macs.items() if n}
    return result | {WEIGHTS: 1e3 * weights / machine["bytes_per_s"]}


def measure_profile(
    contenders: Mapping[str, Contender], feeds: Feeds, widths: Widths, *, shape: str,
    seconds: float, convolutions: tuple[int, int] = (0, 0),
) -> dict[str, Any]:  # fmt: skip
    """Profiles contenders on one thread and prints the table; the first has to be FP32 in ORT.

    Sessions that do not profile run in turn with those that do: what a run takes is theirs.
    """
    sessions = {name: contender.open(1) for name, contender in contenders.items()}
    profiled = {name: contender.open_profiled(1) for name, contender in contenders.items()}
    traced = {f"{name}, profiled": session for name, session in profiled.items()}
    times = interleave(sessions | traced, feeds, seconds)
    nodes = {name: session.nodes() for name, session in profiled.items()}
    machine = limits(1)
    columns: dict[str, dict[str, float]] = {}
    for name, profile in nodes.items():
        column = dict.fromkeys(CLASSES, 0.0)
        for node in profile:
            column[region_class(node, widths)] += node.ms
        total = times[name]["median"]
        columns[name] = column | {BETWEEN: total - sum(column.values()), ALL: total}
    lowest = floor(next(iter(nodes.values())), widths, machine, convolutions)
    columns["floor"] = lowest | {ALL: sum(lowest.values())}
    _print(columns, f"{shape}, 1 thread, ms")
    for name, value in machine.items():
        print(f"  {name} {value / 1e9:.1f} G")
    return {"shape": shape, "threads": 1, "limits": machine, "ms": columns}


def _print(columns: Mapping[str, Mapping[str, float]], title: str) -> None:
    widest = 14
    print(f"\nWhere the time goes, {title}")
    for line in range(2):  # a name is two words or two lines
        parts = (name.partition(" ")[2 * line] for name in columns)
        print(" " * 24 + "".join(f"{part:>{widest}}" for part in parts))
    for row in (*CLASSES, WEIGHTS, BETWEEN, ALL):
        cells = (f"{column[row]:.3f}" if row in column else "" for column in columns.values())
        print(f"  {row:22}" + "".join(f"{cell:>{widest}}" for cell in cells))
    lowest = columns["floor"][ALL]
    ratios = (f"{column[ALL] / lowest:.2f}" for column in columns.values())
    print(f"  {'times the floor':22}" + "".join(f"{ratio:>{widest}}" for ratio in ratios))
