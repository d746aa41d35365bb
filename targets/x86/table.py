"""The table of a library for x86: from the C code's arguments to each kernel's parameters."""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.ir.joined_regions import dilation_of_windows, pads_of_windows
from qcompiler.ir.region import Region
from qcompiler.targets.kernel_table import kernel_table, members, op_spec
from qcompiler.targets.x86 import Isa, best_isa, has_own_kernel, isas_of, kernel_symbol
from qcompiler.targets.x86.families import FAMILIES

__all__ = ["x86_table"]


def x86_table(regions: Sequence[Region], domain: str) -> str:
    """The C text for `regions`, whose ops live in the ONNX domain `domain`."""
    wrappers = [
        _wrapper(region, isa)
        for region in regions
        if has_own_kernel(region)
        for isa in isas_of(region)
    ]
    ops = [_op(region) for region in regions]
    return kernel_table("qcompiler.h", domain, [*wrappers, *map(_variants, regions)], ops)


def _op(region: Region) -> str:
    more = {}
    if region.anchor == "WindowedQMatMulW8A8":
        begin, end = pads_of_windows(region)
        more["pads"] = f"{{{begin}, {end}}}"
        more["dilations"] = f"{{{dilation_of_windows(region)}}}"
    return op_spec(region, FAMILIES[region.anchor].anchor, len(isas_of(region)), **more)


def _variants(region: Region) -> str:
    rows = ", ".join(_variant(region, isa) for isa in isas_of(region))
    return f"static const struct qc_variant variants_{region.name}[] = {{{rows}}};"


def _wrapper(region: Region, isa: Isa) -> str:
    """From the arguments' struct to the kernel's parameters."""
    family, symbol = FAMILIES[region.anchor], kernel_symbol(region, isa)
    parameters = family.parameters(region, isa)
    types = ", ".join(c_type for c_type, _ in parameters)
    values = ", ".join(value for _, value in parameters)
    return (
        f"void {symbol}({types});\n"
        f"static void run_{symbol}(const struct qc_{family.member}_args *a) {{\n"
        f"    {symbol}({values});\n"
        "}\n"
    )


def _variant(region: Region, isa: Isa) -> str:
    family = FAMILIES[region.anchor]
    values = {"isa": f"&{isa.c_name}"}
    for part in (region,) if has_own_kernel(region) else family.parts(region):
        symbol = kernel_symbol(part, best_isa(part, isa))
        values[FAMILIES[part.anchor].member] = f"run_{symbol}"
    values |= {name: str(value) for name, value in family.constants(region, isa).items()}
    return members(values)
