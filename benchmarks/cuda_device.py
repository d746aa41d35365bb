"""A GPU through its driver alone: memory, kernels, and times; no CUDA toolkit and no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda_clock import settled
from cuda_cubins import Cubins
from cuda_tasks import CudaError
from numpy.typing import NDArray

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import CONVS, image_columns, pack, pack_scales

__all__ = ["CudaError", "Device", "Kernels"]

Array = NDArray[Any]

_MAJOR, _MINOR, _MAX_SHARED = 75, 76, 8
_PLAIN_SHARED = 48 << 10


class Device:
    """One GPU, with a stream of its own.

    Args:
        driver: The driver's library.
        ordinal: Which GPU.

    Raises:
        CudaError: No driver, or no such GPU.
    """

    def __init__(self, driver: str = "libcuda.so.1", ordinal: int = 0) -> None:
        try:
            self._driver = ctypes.CDLL(driver)
        except OSError as error:
            raise CudaError(f"there is no NVIDIA driver ({error})") from error
        self._call("cuInit", 0)
        handle, context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(handle), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self._call("cuCtxPushCurrent_v2", context)
        self._call("cuStreamCreate", ctypes.byref(self.stream), 1)
        name = ctypes.create_string_buffer(64)
        self._call("cuDeviceGetName", name, 64, handle)
        self.name = name.value.decode()
        self.capability = tuple(self._attribute(a, handle) for a in (_MAJOR, _MINOR))
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self.driver_version = f"{version.value // 1000}.{version.value % 1000 // 10}"

    @property
    def arch(self) -> str | None:
        """The best architecture of ours that it runs; None for none."""
        major, minor = self.capability
        exact = f"sm_{major}{minor}a"
        able = [exact, *(f"sm_{major}{i}" for i in range(minor, -1, -1))]
        return next((arch for arch in able if arch in cuda.ARCHS), None)

    def allocate(self, size: int) -> int:
        """Memory on the device."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 16)))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back, after all that was launched."""
        self._call("cuStreamSynchronize", self.stream)
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def upload(self, content: Array | bytes) -> int:
        """Memory on the device that holds `content`."""
        raw = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
        pointer = self.allocate(len(raw))
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), raw, ctypes.c_size_t(len(raw)))
        # It returns when the host's memory was read; ours is a stream that does not wait for the
        # default one, where the rest of the copy may still be under way.
        self._call("cuStreamSynchronize", None)
        return pointer

    def download(self, pointer: int, dtype: Any, *shape: int) -> Array:
        """What lies there now, after all that was launched."""
        self._call("cuStreamSynchronize", self.stream)
        result = np.empty(shape, dtype)
        self._call("cuMemcpyDtoH_v2", result.ctypes.data_as(ctypes.c_void_p),
                   ctypes.c_uint64(pointer), ctypes.c_size_t(result.nbytes))  # fmt: skip
        return result

    def copy(self, target: int, source: int, size: int) -> None:
        """Device memory to device memory, on the stream."""
        self._call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source),
                   ctypes.c_size_t(size), self.stream)  # fmt: skip

    def module(self, cubin: bytes) -> ctypes.c_void_p:
        """Loaded kernels."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), cubin)
        return module

    def function(self, module: ctypes.c_void_p, symbol: str, shared: int) -> ctypes.c_void_p:
        """A kernel that may be launched with so much shared memory."""
        found = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(found), module, symbol.encode())
        if shared > _PLAIN_SHARED:
            self._call("cuFuncSetAttribute", found, _MAX_SHARED, shared)
        return found

    def launch(
        self, function: ctypes.c_void_p, grid: Sequence[int], threads: int, shared: int,
        pointers: Sequence[int], numbers: Sequence[int],
    ) -> None:  # fmt: skip
        """A kernel of ours, on the stream; `numbers` are its last arguments."""
        values = [*map(ctypes.c_uint64, pointers), *map(ctypes.c_int32, numbers)]
        array = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._call(
            "cuLaunchKernel", function, *grid, threads, 1, 1, shared, self.stream, array, None
        )

    def seconds(self, enqueue: Callable[[int], None], count: int) -> float:
        """The time of one of `count` calls of `enqueue`, replayed together as a graph."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        enqueue(0)  # what is made at the first call is not captured
        self._call("cuStreamSynchronize", self.stream)
        self._call("cuStreamBeginCapture_v2", self.stream, 0)
        for i in range(count):
            enqueue(i)
        self._call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        events = [ctypes.c_void_p() for _ in range(2)]
        for event in events:
            self._call("cuEventCreate", ctypes.byref(event), 0)

        def replay() -> float:
            self._call("cuEventRecord", events[0], self.stream)
            self._call("cuGraphLaunch", ready, self.stream)
            self._call("cuEventRecord", events[1], self.stream)
            self._call("cuStreamSynchronize", self.stream)
            milliseconds = ctypes.c_float()
            self._call("cuEventElapsedTime", ctypes.byref(milliseconds), *events)
            return milliseconds.value / 1e3

        return settled(replay) / count

    def _attribute(self, attribute: int, handle: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._driver, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(result, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'error').decode()}")


class Kernels:
    """The kernels of a region on a device."""

    def __init__(self, device: Device, region: Region, arch: str, cubins: Cubins) -> None:
        self.device, self.region = device, region
        self._cubin = cubins.cubin(region, arch)
        self.launches = cuda.launches(region, arch)
        self._functions, module = {}, device.module(self._cubin)
        for launch in self.launches:
            name, shared = launch.symbol, launch.shared_bytes
            self._functions[name] = device.function(module, name, shared)
            if launch.combine is not None:
                self._functions[launch.combine] = device.function(module, launch.combine, 0)
        self._workspace: dict[tuple[str, int], int] = {}

    def weights(self, w: Array, ws: Array, wz: Array | None = None) -> dict[str, int]:
        """Packed and uploaded: the arguments "w" and "ws"."""
        raw = w.view(np.uint8) if w.dtype.kind == "V" else w
        return {
            "w": self.device.upload(pack(raw, self.region)),
            "ws": self.device.upload(pack_scales(ws, self.region, wz, raw)),
        }

    def run(self, given: dict[str, int], rows: int, **sizes: int) -> None:
        """Launch what the library would for so many rows, with these pointers and other sizes."""
        launch = next(x for x in self.launches if x.max_rows is None or rows <= x.max_rows)
        known = dict(self.region.sizes)
        columns = known.get("N", known["K"])
        summed = image_columns(self.region) if self.region.anchor in CONVS else columns
        grid = (-(-columns // launch.block_columns), -(-rows // launch.block_rows), launch.splits)
        if launch.combine is not None:
            size = launch.splits * rows * summed * 4
            if (launch.symbol, rows) not in self._workspace:
                self._workspace[launch.symbol, rows] = self.device.allocate(size)
            given = given | {"workspace": self._workspace[launch.symbol, rows]}
        # In the order of their names, as TVM has them.
        numbers = [number for _, number in sorted({"rows": rows, **sizes}.items())]
        pointers = [given[name] for name in launch.parameters[: -len(numbers)]]
        function = self._functions[launch.symbol]
        self.device.launch(function, grid, launch.threads, launch.shared_bytes, pointers, numbers)
        if launch.combine is not None:
            blocks = -(-rows * summed // (4 * launch.threads))
            pointers = [given[name] for name in launch.combine_parameters[: -len(numbers)]]
            combine = self._functions[launch.combine]
            self.device.launch(combine, (blocks, 1, 1), launch.threads, 0, pointers, numbers)
