"""The quantized forms that an op has, and which of them a node gets.

    op       weights                      activations
    MatMul   int8 per channel             dynamic int8 per token      (W8A8)
    MatMul   int8 per channel             static uint8 per tensor     by a rule
    MatMul   int4 in groups along K       dynamic int8 per token      (W4A8)
    MatMul   int4 in groups along K       float                       (W4A16)
    MatMul   int8 in groups along K       float                       ORT's MatMulNBits, by a rule
    MatMul   int3, int2: as int4, with fewer steps
    Groups may have zero points: whole ones, or int4 ones floats too.
    MatMul   fp8 per channel              dynamic fp8 per token       where the target has fp8
    Conv     int8 per channel             static uint8 per tensor

The scheme of the target chooses; a rule of the recipe may choose another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import onnx_ir as ir

from qcompiler.ir.errors import OptionError
from qcompiler.passes.node_rules import FEWER_BITS, PRECISIONS, NodeRule
from qcompiler.targets.target import Scheme

__all__ = ["Form", "Usual", "check_usual", "form_of"]

_INT8, _INT4, _FP8 = ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN

_GROUPS = (32, 64, 128)
"""Of weights in groups where the scheme has none: rounded to nearest, small groups lose least."""

_MATMULS = {
    (_INT8, "dynamic"),
    (_INT8, "static"),
    (_INT8, "float"),
    (_INT4, "dynamic"),
    (_INT4, "float"),
    (_FP8, "dynamic"),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What a node is quantized to.

    Attributes:
        weight: Storage of its weights.
        activation: Scales of its activations: "dynamic", "static" or "float".
        group_sizes: Weights per scale, in order of preference; of weights in groups 0 stands for a
            scale per channel, of others nothing does.
        calibration: Where static ranges are cut off; None as for all.
        rounding: How the weights are rounded.
        requested: Whether a rule asked for this precision.
        zero_points: Of weights in groups: "none", "integer" or "float".
        bits: Of weights that use fewer than their storage has.
        two_level: Whether scales of groups are int8 times a float per channel.
    """

    weight: ir.DataType
    activation: str
    group_sizes: tuple[int, ...] = ()
    calibration: str | None = None
    rounding: str = "nearest"
    requested: bool = False
    zero_points: str = "none"
    bits: int | None = None
    two_level: bool = False


@dataclasses.dataclass(frozen=True)
class Usual:
    """What the weights of products are where no rule says otherwise.

    Attributes:
        group_sizes: Weights per scale, in order of preference, of weights in groups.
        rounding: How they are rounded.
        zero_points: Of groups: "none", "integer" or "float".
        scales: Of groups, and their float zero points: "float" or "int8".
    """

    group_sizes: tuple[int, ...] = ()
    rounding: str = "nearest"
    zero_points: str = "none"
    scales: str = "float"


def check_usual(
    scheme: Scheme,
    asked: Iterable[ir.DataType | None],
    group_size: int | None,
    zero_points: str | None,
    scales: str,
    rounding: str,
) -> None:
    """Refuse for all products what none of a target's can be.

    Args:
        scheme: The target's number formats.
        asked: What rules store weights in.
        group_size: As for the recipe, and so are the others.
        zero_points: None for the target's choice.
        scales: Of groups.
        rounding: Of weights.

    Raises:
        OptionError: Names the key and the value.
    """
    storages = {scheme.weight, *asked} - {None}
    way_out = f"{scheme.name} weights {{}}; leave it out, or choose an int4 target"
    if not scheme.group_sizes and _INT4 not in storages:
        if group_size is not None:
            why = way_out.format("have one scale per channel")
            raise OptionError(f"group_size {group_size}: {why}")
        for key, value, usual in (
            ("zero_points", zero_points, "none"),
            ("scales", scales, "float"),
        ):
            if value not in (None, usual):
                raise OptionError(f"{key} {value!r}: {way_out.format('have no groups')}")
    if rounding != "nearest" and not storages & {_INT8, _INT4}:
        why = way_out.format("are floats, and rounded to nearest")
        raise OptionError(f"rounding {rounding!r}: {why}")


def form_of(
    op: str,
    scheme: Scheme,
    asked: NodeRule | None,
    usual: Usual,
    refuse: Callable[[str, str], None],
) -> Form:
    """The form of a node.

    Args:
        op: "MatMul", "Conv" or "ConvTranspose".
        scheme: The target's number formats; of convolutions it has some.
        asked: What the recipe says of the node.
        usual: What it is, where the rule says nothing of it.
        refuse: Told each key of `asked` that cannot be, and why; it is then as if not asked for.
    """
    asked = _possible(op, scheme, asked, usual, refuse)
    weight, activation = _storage(op, scheme, asked), _activation(op, scheme, asked)
    rounding = usual.rounding if _misfit_of_rounding(op, weight) is None else "nearest"
    in_groups = _is_in_groups(op, weight, activation)
    groups = (usual.group_sizes or _GROUPS) if in_groups else ()
    zeros = usual.zero_points if weight is _INT4 else "none"
    two_level = weight is _INT4 and usual.scales == "int8"
    if asked is None:
        return Form(weight, activation, groups, None, rounding, False, zeros, None, two_level)
    return Form(
        weight,
        activation,
        groups if asked.group_size is None or not in_groups else (asked.group_size,),
        asked.calibration,
        asked.rounding or rounding,
        asked.precision is not None,
        asked.zero_points or zeros,
        FEWER_BITS.get(asked.precision or ""),
        two_level if asked.scales is None else asked.scales == "int8",
    )


def _possible(
    op: str,
    scheme: Scheme,
    asked: NodeRule | None,
    usual: Usual,
    refuse: Callable[[str, str], None],
) -> NodeRule | None:
    """What can be of what is asked for."""
    while asked is not None and (misfit := _misfit(op, scheme, asked, usual)) is not None:
        key, why = misfit
        refuse(key, why)
        left = asked.to_dict()
        del left[key]
        asked = NodeRule(**left) if left else None
    return asked


def _storage(op: str, scheme: Scheme, asked: NodeRule | None) -> ir.DataType:
    wanted = PRECISIONS[asked.precision] if asked is not None and asked.precision else None
    if wanted is not None:
        return wanted
    usual = scheme.weight if op == "MatMul" else scheme.conv_weight
    assert usual is not None
    return usual


def _activation(op: str, scheme: Scheme, asked: NodeRule | None) -> str:
    if asked is not None and asked.activation is not None:
        return asked.activation
    if op != "MatMul":
        return "static"
    return "float" if scheme.activation is None else "dynamic"


def _is_in_groups(op: str, weight: ir.DataType, activation: str) -> bool:
    """Whether there is a scale per group: int8 weights of integer products have one per channel."""
    return weight is _INT4 or (op == "MatMul" and (weight, activation) == (_INT8, "float"))


def _misfit(op: str, scheme: Scheme, asked: NodeRule, usual: Usual) -> tuple[str, str] | None:
    """A key that cannot be, and why."""
    weight, activation = _storage(op, scheme, asked), _activation(op, scheme, asked)
    if op != "MatMul":
        if weight is not _INT8:
            return "precision", "convolutions are int8 or float"
        if activation != "static":
            return "activation", "convolutions have static activations"
    elif weight is _FP8 and scheme.weight is not _FP8:
        return "precision", f"{scheme.name} targets do not multiply fp8"
    elif (weight, activation) not in _MATMULS:
        stored = next(name for name, storage in PRECISIONS.items() if storage is weight)
        why = f"{scheme.name} targets multiply no {stored} weights by {activation} activations"
        if asked.activation is None:
            return "precision", f'{why}; activation = "dynamic" beside it would do'
        return "activation", why
    if asked.group_size is not None and not _is_in_groups(op, weight, activation):
        why = "these weights have a scale per channel; int4 ones have groups, and int8 ones beside "
        return "group_size", f'{why}activation = "float"'
    if asked.calibration is not None and activation != "static":
        return "calibration", f"its activations are {activation}, nothing of them is calibrated"
    unrounded = _misfit_of_rounding(op, weight)
    if asked.rounding not in (None, "nearest") and unrounded is not None:
        return "rounding", unrounded
    zeros = asked.zero_points or usual.zero_points
    if zeros == "integer" and asked.zero_points and usual.scales == "int8" and not asked.scales:
        return "zero_points", "scales of 8 bits have no integer zero points beside them"
    if asked.scales == "int8" and (weight is not _INT4 or zeros == "integer"):
        why = "only scales of int4 groups without integer zero points are stored in 8 bits"
        return "scales", why
    if asked.zero_points == "float" and weight is not _INT4:
        return "zero_points", "only groups of int4 weights may have float zero points"
    if asked.zero_points == "integer" and not _is_in_groups(op, weight, activation):
        why = "only groups of weights may have zero points: int4 ones, and int8 ones beside "
        return "zero_points", f'{why}activation = "float"'
    return None


def _misfit_of_rounding(op: str, weight: ir.DataType) -> str | None:
    """Why weights can only be rounded to nearest."""
    if op != "MatMul":
        return "only weights of products are rounded otherwise than to nearest"
    if weight.is_floating_point():
        return "only integers are rounded otherwise than to nearest"
    return None
