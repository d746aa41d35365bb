"""The few TIR words our CUDA kernels are written in, and the way from TIR to CUDA C.

Kernels are built with TVM's IR builder: ordinary Python loops unroll, `loop` makes one on the
device.  Instructions are PTX text, `emit("mma.sync...", ...)`.  This module imports tvm; import it
only from a function, or from a module that is itself imported that way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.build import split_host_device_mods
from tvm.tirx.script import builder as script

from qcompiler.targets.cuda.launch import TALL_BLOCKS
from qcompiler.targets.tir import (
    cast,
    constant,
    loop,
    maximum,
    minimum,
    reinterpret,
    select,
    when,
)

__all__ = [
    "Expr",
    "Place",
    "barrier",
    "barrier_of",
    "cast",
    "ceildiv",
    "constant",
    "emit",
    "extern",
    "half_of",
    "kernel",
    "let",
    "loop",
    "maximum",
    "minimum",
    "quotient",
    "real",
    "registers",
    "reinterpret",
    "remainder",
    "select",
    "shared",
    "shared_address",
    "shuffle_xor",
    "source",
    "store",
    "store_vector",
    "unrolled",
    "vector",
    "view",
    "wait_phase",
    "warp_barrier",
    "when",
    "wide",
]

Expr = Any

_ANY_SIZE = 1 << 30
"""The declared length of an array; TVM checks no bounds."""

ROWS = "rows"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which part of the work is this thread's."""

    x: Expr
    y: Expr
    z: Expr
    thread: Expr
    lane: Expr
    warp: Expr


def kernel(
    pointers: Mapping[str, str],
    grid: Callable[[Expr], Sequence[Expr]],
    threads: int,
    body: Callable[[Mapping[str, Expr], Expr, Place], None],
    sizes: Sequence[str] = (),
    is_tall: bool = False,
) -> Any:
    """A kernel with these arrays (name to dtype) and `rows` as parameters; none may alias.

    `grid` gives the blocks in x, y and z for a number of rows: TVM leaves out an index that is
    always 0.  Of one that `is_tall`, blocks of rows that a grid does not hold in y lie in z, and
    `Place.y` counts all.  `body` gets the arrays, and other `sizes` by their names, the number of
    rows, and the thread's place, and emits statements.  TVM sorts the parameters by name, pointers
    first.
    """
    with IRBuilder() as builder, script.prim_func(private=True):
        script.func_attr({"tirx.noalias": True})
        arrays = {
            name: script.arg(name, script.buffer((_ANY_SIZE,), pointers[name], buffer_name=name))
            for name in pointers
        }
        rows, *others = (script.arg(name, tirx.Var(name, "int32")) for name in (ROWS, *sizes))
        arrays |= zip(sizes, others, strict=True)
        script.device_entry()
        blocks = [*grid(rows)]
        if is_tall:
            blocks[2] = ceildiv(blocks[1], TALL_BLOCKS)
        x, y, z = script.cta_id(blocks)
        if is_tall:
            y, z = z * TALL_BLOCKS + y, constant(0)
        thread = script.thread_id([threads])
        place = Place(x, y, z, thread, let(thread % 32), let(thread // 32))
        body(arrays, rows, place)
    return builder.get()


ceildiv: Callable[[Expr, Expr], Expr] = tirx.ceildiv
# Of what is not negative, which TVM need not be able to prove, as it would for `//` and `%`.
quotient: Callable[[Expr, Expr], Expr] = tirx.truncdiv
remainder: Callable[[Expr, Expr], Expr] = tirx.truncmod


def emit(instruction: str, *operands: Expr) -> None:
    """One PTX instruction; results are elements of `registers`."""
    script.evaluate(script.ptx[instruction](*operands))


def barrier() -> None:
    """Wait for all threads of the block."""
    script.evaluate(script.cuda.cta_sync())


def barrier_of(threads: int) -> None:
    """Wait for some threads of the block, always the same."""
    emit("bar.sync", 1, threads)


def warp_barrier() -> None:
    """Wait for the other threads of the warp; they then see what each other did."""
    emit("bar.warp.sync", constant(0xFFFFFFFF, "uint32"))


def wait_phase(pointer: Expr, parity: Expr) -> None:
    """Wait until the phase of an mbarrier that has this parity is over."""
    script.evaluate(script.cuda.mbarrier_wait(pointer, parity))


def real(value: float) -> Expr:
    """A float32 constant, rounded here: the CUDA compiler warns of each that it has to round."""
    return constant(float(np.float32(value)), "float32")


def unrolled(count: int) -> AbstractContextManager[Expr]:
    """`for i in range(count)`, unrolled by the CUDA compiler; shorter text than a Python loop's."""
    frame: AbstractContextManager[Expr] = script.unroll(0, count)
    return frame


def let(value: Expr) -> Expr:
    """A variable with this value from here on."""
    return script.bind(value)


def registers(dtype: str, count: int) -> Expr:
    """An array that only constants and unrolled loops index: each element is a register."""
    return script.alloc_buffer((count,), dtype, scope="local")


def shared(count: int, align: int = 128) -> Expr:
    """The dynamic shared memory, as bytes."""
    return script.alloc_buffer((count,), "uint8", scope="shared.dyn", align=align)


def view(array: Expr, dtype: str, count: int) -> Expr:
    """Shared memory as elements of another type."""
    return script.decl_buffer((count,), dtype, data=array.data, scope="shared.dyn")


def store(array: Expr, value: Expr, index: Expr) -> None:
    """`array[index] = value`."""
    script.buffer_store(array, value, [index])


def vector(array: Expr, index: Expr, dtype: str, count: int) -> Expr:
    """`array[index : index + count]` in one load."""
    return array.vload([index], f"{dtype}x{count}")


def store_vector(array: Expr, value: Expr, index: Expr, count: int) -> None:
    """`array[index : index + count] = value` in one store."""
    script.buffer_store(array, value, [tirx.Ramp(index, constant(1, "int64"), count)])


def wide(value: Expr) -> Expr:
    """An int64: rows times columns may be more than an int32 holds."""
    return cast("int64", value)


def extern(dtype: str, name: str, *args: Expr) -> Expr:
    """A call to a function of CUDA's headers, without side effects."""
    return tirx.call_pure_extern(dtype, name, *args)


def shared_address(pointer: Expr) -> Expr:
    """The address of shared memory that instructions take, as a uint64."""
    return cast("uint64", script.cuda.cvta_generic_to_shared(pointer))


def half_of(word: Expr, index: int) -> Expr:
    """The lower (0) or upper float16 of a uint32, as float32."""
    bits = cast("uint16", word >> constant(16 * index, "uint32"))
    return let(cast("float32", reinterpret("float16", bits)))


def shuffle_xor(value: Expr, distance: int) -> Expr:
    """The float32 `value` of the lane whose number differs in this bit."""
    return extern(
        "float32", "__shfl_xor_sync", constant(0xFFFFFFFF, "uint32"), value, constant(distance)
    )


def _lower(module: Any) -> Any:
    """TVM's pipeline, less what its CUDA compiler does as well: loops are unrolled there.

    Common expressions are left to it for another reason: those of the grid and a kernel TVM would
    compute on the host and pass as parameters.
    """
    passes = tirx.transform
    sequence = [
        passes.LowerTIRx(),
        tvm.s_tir.transform.UnifyThreadBinding(),
        passes.StmtSimplify(),
        passes.LowerTIRxOpaque(),
        passes.FlattenBuffer(),
        passes.NarrowDataType(32),
        passes.VectorizeLoop(True),
        passes.UnrollLoop(),
        passes.StmtSimplify(),
        passes.VerifyMemory(),
        passes.AnnotateEntryFunc(),
        passes.SplitHostDevice(),
        passes.MakePackedAPI(),
    ]
    return tvm.ir.transform.Sequential(sequence)(module)


def source(functions: Mapping[str, Any], arch: str) -> str:
    """The CUDA C text of kernels; the extern "C" name of each is its key and `_kernel`."""
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host="llvm")
    module = tvm.IRModule(
        {name: body.with_attr("global_symbol", name) for name, body in functions.items()}
    )
    _, _, finish_device = tirx.get_tir_pipeline("tirx")
    with tvm.transform.PassContext(config={"tirx.UnrollLoop": {"explicit_unroll": 0}}):
        lowered = _lower(tirx.transform.BindTarget(target)(module))
    _, on_device = split_host_device_mods(lowered)
    ((device, kernels),) = on_device.items()
    build = tvm.get_global_func("target.build.cuda")
    text: str = build(finish_device()(kernels), device).inspect_source("cuda")
    return text
