"""From a region to the CUDA C text of its kernels."""

from __future__ import annotations

import re
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets.cuda import device
from qcompiler.targets.cuda.conv_finish import conv_combine_kernel
from qcompiler.targets.cuda.depthwise import depthwise_kernel
from qcompiler.targets.cuda.finish import combine_kernel
from qcompiler.targets.cuda.image import image_kernel
from qcompiler.targets.cuda.norm import norm_kernel
from qcompiler.targets.cuda.norm_plan import NORMS
from qcompiler.targets.cuda.packing import CONVS, IMAGE
from qcompiler.targets.cuda.plan import launches, shapes_of
from qcompiler.targets.cuda.products import product_of
from qcompiler.targets.cuda.quantize import quantize_kernel
from qcompiler.targets.cuda.roles import roles_kernel
from qcompiler.targets.cuda.shapes import Channels, Roles, Stream
from qcompiler.targets.cuda.stream import stream_kernel
from qcompiler.targets.cuda.tile import Sums, tile_kernel
from qcompiler.targets.cuda.warpgroup import WarpgroupSums

__all__ = ["kernels", "source_of"]

_SUFFIX = "_kernel"
"""TVM's, on every name."""
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')


def kernels(region: Region, arch: str) -> dict[str, Any]:
    """The TIR of the kernels of a region, by the symbols they get."""
    found: dict[str, Any] = {}
    if region.anchor == IMAGE:
        return {launch.symbol: image_kernel(region) for launch in launches(region, arch)}
    if "N" not in dict(region.sizes):
        make = norm_kernel if region.anchor in NORMS else quantize_kernel
        return {
            launch.symbol: make(region, launch.threads, launch.block_rows)
            for launch in launches(region, arch)
        }
    by_warpgroup = arch == "sm_90a"
    sums = WarpgroupSums if by_warpgroup else Sums
    for launch, (_, shape) in zip(launches(region, arch), shapes_of(region, arch), strict=True):
        if isinstance(shape, Stream):
            found[launch.symbol] = stream_kernel(region, shape, product_of(region, arch))
            continue
        if isinstance(shape, Channels):
            found[launch.symbol] = depthwise_kernel(region, shape)
            continue
        product = product_of(region, arch, by_warpgroup)
        if isinstance(shape, Roles):
            found[launch.symbol] = roles_kernel(region, shape, product)
            continue
        found[launch.symbol] = tile_kernel(region, shape, product, sums)
        if launch.combine is not None:
            combine = conv_combine_kernel if region.anchor in CONVS else combine_kernel
            found[launch.combine] = combine(region, shape.splits, launch.threads)
    return found


def source_of(region: Region, arch: str) -> str:
    """The CUDA C text; the same for the same region, architecture and version of TVM."""
    functions = kernels(region, arch).items()
    text = device.source({name.removesuffix(_SUFFIX): body for name, body in functions}, arch)
    found = {name: _names(parameters) for name, parameters in _SIGNATURE.findall(text)}
    assert found == _expected(region, arch), f"TVM changed the parameters: {found}"
    return text


def _names(parameters: str) -> tuple[str, ...]:
    return tuple(p.split()[-1].removesuffix("_ptr") for p in parameters.split(","))


def _expected(region: Region, arch: str) -> dict[str, tuple[str, ...]]:
    expected = {launch.symbol: launch.parameters for launch in launches(region, arch)}
    return expected | {
        launch.combine: launch.combine_parameters
        for launch in launches(region, arch)
        if launch.combine is not None
    }
