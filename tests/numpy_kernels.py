"""In the place of kernels for GPUs, functions in numpy that compute what they are given alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_library import (
    TYPES,
    Array,
    anchor_result,
    memory,
    unpacked,
    unpacked_scales,
    with_epilogue,
)
from stand_in import Driver

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import (
    FOUR_BITS,
    INTEGERS,
    depth_of,
    first_channel,
    is_depthwise,
)
from qcompiler.targets.cuda.plan import results_of

__all__ = ["emulate", "emulate_conv"]


def emulate(driver: Driver, region: Region, arch: str) -> None:
    """The kernels of a product, in numpy, from what they are given alone."""
    n, k = region.size("N"), region.size("K")
    has_groups = region.anchor in FOUR_BITS
    sum_type = np.int32 if region.anchor in INTEGERS else np.float32

    def extras_of(given: dict[str, int], rows: int) -> list[Array]:
        return [
            memory(given[f"extra{i}"], np.float16, *((n,) if kind == "channel" else (rows, n)))
            for i, kind in enumerate(region.extras)
        ]

    def store(given: dict[str, int], y: Array, rows: int) -> None:
        result = with_epilogue(region, y, [e.astype(np.float64) for e in extras_of(given, rows)])
        for name, (first, width) in results_of(region).items():
            memory(given[name], np.float16, rows, width)[:] = result[:, first : first + width]

    for launch in cuda.launches(region, arch):

        def run(values: list[int], grid: tuple[int, ...], launch: cuda.Launch = launch) -> None:
            given = dict(zip(launch.parameters, values, strict=True))
            rows, columns = given["rows"], -(-n // launch.block_columns)
            assert grid == (columns, -(-rows // launch.block_rows), launch.splits)
            feed = {
                name: memory(given[name], dtype, rows, 1 if name == "s" else k)
                for name, dtype in TYPES[region.anchor].items()
                if name in given and name != "y"
            }
            constants = {"w": unpacked(region, given["w"])}
            if "ws" in given:
                constants |= unpacked_scales(region, given["ws"])
            if launch.combine is None:
                store(given, anchor_result(region, constants, feed), rows)
                return
            if not has_groups:  # sums, which combine scales
                feed["s"] = np.ones((rows, 1), np.float32)
                constants["ws"] = np.ones(n, np.float32)
            partial = memory(given["workspace"], sum_type, launch.splits, rows, n)
            for split, part in enumerate(np.array_split(np.arange(k), launch.splits)):
                name = "x" if "x" in feed else "q"
                some = np.full_like(feed[name], 128 if feed[name].dtype == np.uint8 else 0)
                some[:, part] = feed[name][:, part]
                partial[split] = anchor_result(region, constants, feed | {name: some})

        def combine(values: list[int], grid: tuple[int, ...], launch: cuda.Launch = launch) -> None:
            given = dict(zip(launch.combine_parameters, values, strict=True))
            rows = given["rows"]
            assert grid == (-(-rows * n // (4 * launch.threads)), 1, 1)
            sums = memory(given["workspace"], sum_type, launch.splits, rows, n).sum(0)
            if not has_groups:
                scales = unpacked_scales(region, given["ws"])["ws"].astype(np.float64)
                sums = sums * memory(given["s"], np.float32, rows, 1).astype(np.float64) * scales
            store(given, sums, rows)

        driver.know(launch.symbol, len(launch.parameters), run)
        if launch.combine is not None:
            driver.know(launch.combine, len(launch.combine_parameters), combine)


class _NumpyConv:
    """The kernels of a convolution; sums are `factor` times what they should be."""

    def __init__(self, conv: Any, factor: int) -> None:
        self.conv, self.factor = conv, factor
        self.padded = conv.channels + -conv.channels % 16
        self.sums: Any = None

    def store(self, launch: cuda.Launch, values: list[int]) -> None:
        """QuantizeImage."""
        given, pad = dict(zip(launch.parameters, values, strict=True)), self.conv.pad
        height, width, channels = given["height"], given["width"], self.conv.channels
        count = given["rows"] // ((height + 2 * pad) * (width + 2 * pad))
        x = memory(given["x"], np.float16, count, channels, height, width).astype(np.float32)
        zero = memory(given["z"], np.uint8, 1)[0]
        q = np.clip(np.rint(x / memory(given["s"], np.float32, 1)) + zero, 0, 255)
        widths = ((0, 0), (pad, pad), (pad, pad), (0, self.padded - channels))
        stored = np.pad(q.transpose(0, 2, 3, 1), widths, constant_values=zero)
        memory(given["q"], np.uint8, *stored.shape)[...] = stored

    def multiply(self, launch: cuda.Launch, values: list[int]) -> None:
        """QConvW8A8, or what its splits leave."""
        given, conv = dict(zip(launch.parameters, values, strict=True)), self.conv
        height, width, span = given["height"], given["width"], (conv.taps - 1) * conv.dilation + 1
        down, across = ((size - span) // conv.stride + 1 for size in (height, width))
        count = given["rows"] // (down * across)
        q = memory(given["q"], np.uint8, count, height, width, self.padded).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(q, (span, span), axis=(1, 2))
        of_rows = windows[:, :: conv.stride, :: conv.stride]
        taps = of_rows[..., :: conv.dilation, :: conv.dilation].transpose(0, 1, 2, 4, 5, 3)
        self.sums = np.zeros((count, down, across, conv.columns), np.int64)
        per_column = self.taps_of_columns(given["w"])
        for column in range(conv.columns):
            weights, channels = per_column(column)
            some = taps[..., channels : channels + weights.shape[-1]]
            self.sums[..., column] = (some * weights).sum((3, 4, 5))
        if launch.combine is None:
            self.finish(given)

    def taps_of_columns(self, address: int) -> Any:
        """What gives a column's weights [taps, taps, channels], and the first of the channels."""
        conv, region, shape = self.conv, self.conv.region, (self.conv.taps, self.conv.taps, -1)
        if is_depthwise(region):
            layout = cuda.packing(region)
            words = memory(address, np.int8, layout.depth // 4, layout.columns, 4)
            rows = words.transpose(0, 2, 1).reshape(layout.depth, -1)[: conv.taps**2]
            return lambda n: (rows[:, n].reshape(shape).astype(np.int64), n)
        matrix = unpacked(region, address)[: depth_of(region)].astype(np.int64)
        return lambda n: (matrix[:, n].reshape(shape), first_channel(region, n // 128))

    def combine(self, launch: cuda.Launch, values: list[int]) -> None:
        """The sum of the splits."""
        self.finish(dict(zip(launch.combine_parameters, values, strict=True)))

    def finish(self, given: dict[str, int]) -> None:
        """Scales and the epilogue."""
        columns, layout = self.conv.columns, cuda.packing(self.conv.region)
        scales = memory(given["ws"], np.float32, 2 * layout.columns + 2)
        offsets = scales.view(np.int32)[layout.columns :][:columns]
        y = ((self.sums - offsets) * scales[:columns] * self.factor).transpose(0, 3, 1, 2)
        if "extra0" in given:
            y = y + memory(given["extra0"], np.float16, columns)[:, None, None]
        if "extra1" in given:
            y = y + memory(given["extra1"], np.float16, *y.shape)
        result = np.maximum(y, 0) if self.conv.steps else y
        if "y" in given:
            memory(given["y"], np.float16, *y.shape)[...] = result
            return
        step, middle = scales[-2], int(scales.view(np.int32)[-1])
        stored = np.clip(np.rint(result.astype(np.float16) / step) + middle, 0, 255)
        pad, more = self.conv.made, -columns % 16
        widths = ((0, 0), (pad, pad), (pad, pad), (0, more))
        image = np.pad(stored.transpose(0, 2, 3, 1), widths, constant_values=middle)
        memory(given["made"], np.uint8, *image.shape)[...] = image


def emulate_conv(driver: Driver, conv: Any, factor: int = 1) -> None:
    """Both kernels of a convolution of `benchmarks/cuda_convs.py`, in numpy."""
    kernels = _NumpyConv(conv, factor)

    def call(run: Any, launch: cuda.Launch) -> Any:
        return lambda values, grid: run(launch, values)

    (image,) = cuda.launches(conv.image, "sm_90a")
    driver.know_all(conv.image, "sm_90a", {image.symbol: call(kernels.store, image)})
    runs = {}
    for launch in cuda.launches(conv.region, "sm_90a"):
        runs[launch.symbol] = call(kernels.multiply, launch)
        if launch.combine is not None:
            runs[launch.combine] = call(kernels.combine, launch)
    driver.know_all(conv.region, "sm_90a", runs)
