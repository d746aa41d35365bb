"""The few TIR words our kernel generators are written in, and the way from TIR to an object file.

Kernels are plain C functions: pointer and int32 parameters, no packed ABI, no TVM runtime.  They
are built with TVM's IR builder, so ordinary Python loops unroll.  This module imports tvm; import
it only from a function, or from a module that is itself imported that way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.build import codegen_build, split_host_device_mods
from tvm.tirx.script import builder as script

__all__ = [
    "LANES",
    "Expr",
    "Parameter",
    "Register",
    "all_words",
    "any_of",
    "broadcast",
    "cast",
    "compile_object",
    "constant",
    "constants",
    "function",
    "half",
    "imported",
    "inlined",
    "intrinsic",
    "lanes",
    "loop",
    "maximum",
    "minimum",
    "negation",
    "prefetch_to_l1",
    "prefetch_to_l2",
    "reinterpret",
    "scratch",
    "select",
    "shuffle",
    "store",
    "when",
]

Expr = Any
"""A TIR expression, variable or array; TVM ships no type stubs."""

LANES = 16
"""32-bit lanes in a zmm register."""

_ON_STACK = {"disable_lower_builtin": True}
"""Without this, TVM asks its runtime for the memory of a local array."""

_CACHE_LINE = 64
"""In bytes, as long as a zmm register."""

_ANY_SIZE = 1 << 30
"""The declared length of a pointer parameter; TVM checks no bounds in raw functions."""

minimum: Callable[[Expr, Expr], Expr] = tirx.min
maximum: Callable[[Expr, Expr], Expr] = tirx.max
cast: Callable[[str, Expr], Expr] = tirx.Cast
reinterpret: Callable[[str, Expr], Expr] = tirx.reinterpret
select: Callable[[Expr, Expr, Expr], Expr] = tirx.Select


def any_of(conditions: Sequence[Expr]) -> Expr:
    """Whether one of them holds; all are computed."""
    return functools.reduce(tirx.bitwise_or, conditions)


def negation(condition: Expr) -> Expr:
    """Whether it does not hold."""
    return tirx.Not(condition)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: a pointer to `dtype`, or one value of it."""

    name: str
    dtype: str
    is_pointer: bool = True

    def variable(self) -> Expr:
        """A new TIR variable of its type."""
        return script.handle(self.dtype) if self.is_pointer else tirx.Var(self.name, self.dtype)


class Register:
    """A value that LLVM keeps in one register, with an array of its own until then.

    Accumulators that share an array stay in memory, which costs 5 to 30 percent.
    """

    def __init__(self, dtype: str, init: Expr, count: int = LANES) -> None:
        self._count = count
        self._vector_type = f"{dtype}x{count}"
        self._array = _on_stack(dtype, count)
        self.set(init)

    def set(self, value: Expr) -> None:
        """Overwrite all lanes."""
        store(self._array, value, lanes(0, self._count) if self._count > 1 else _index(0))

    @property
    def value(self) -> Expr:
        """All lanes, as they are at this point of the program."""
        if self._count == 1:
            return self._array[0]
        return self._array.vload([_index(0)], self._vector_type)

    def lane(self, index: int) -> Expr:
        """One lane, as a scalar."""
        return self._array[index]


def _index(value: Expr) -> Expr:
    return tirx.IntImm("int32", value) if isinstance(value, int) else value


def broadcast(value: Expr, count: int = LANES) -> Expr:
    """`value` in every lane; a Python float becomes a float32, a Python int an int32."""
    if isinstance(value, float):
        value = tirx.FloatImm("float32", value)
    return tirx.Broadcast(_index(value), count)


def all_words(value: int) -> Expr:
    """`value` in each of 32 lanes of uint16."""
    return tirx.Broadcast(constant(value, "uint16"), 2 * LANES)


def lanes(start: Expr, count: int = LANES) -> Expr:
    """The indices of `count` consecutive elements from `start`."""
    return tirx.Ramp(_index(start), 1, count)


def shuffle(value: Expr, order: Sequence[int], other: Expr | None = None) -> Expr:
    """Lane `i` of the result is lane `order[i]` of `value`, which `other` continues if given."""
    values = [value] if other is None else [value, other]
    return tirx.Shuffle(values, [_index(lane) for lane in order])


def constants(values: Sequence[float]) -> Expr:
    """A vector of float32, each lane a constant of its own."""
    lanes = [_index(lane) for lane in range(len(values))]
    return tirx.Shuffle([constant(value, "float32") for value in values], lanes)


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    """A call without side effects to the LLVM intrinsic `name`."""
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def constant(value: float, dtype: str = "int32") -> Expr:
    """A constant of any type."""
    return tirx.const(value, dtype)


def half(value: Expr) -> Expr:
    """`value // 2` for value >= 0."""
    return tirx.shift_right(value, _index(1))


def scratch(dtype: str, size: int) -> Expr:
    """An array on the stack, on a cache line of its own unless it is shorter than one.

    TVM aligns arrays to 16 bytes at most, so that every vector might lie across two lines.  What it
    leaves to LLVM are arrays of vectors: this is one, seen as its elements.  Not so a `Register`:
    TVM visits what is declared inside one another with Python, which ends after hundreds.
    """
    width = _CACHE_LINE // np.dtype(dtype).itemsize
    if size < width:
        return _on_stack(dtype, size)
    lines = _on_stack(f"{dtype}x{width}", -(-size // width))
    return script.decl_buffer((size,), dtype, data=lines.data, scope="local", align=_CACHE_LINE)


def _on_stack(dtype: str, size: int) -> Expr:
    return script.alloc_buffer(
        (size,), dtype, scope="local", align=_CACHE_LINE, annotations=_ON_STACK
    )


def store(array: Expr, value: Expr, index: Expr) -> None:
    """`array[index] = value`, where `index` may be `lanes(...)`."""
    script.buffer_store(array, value, [index])


def prefetch_to_l2(array: Expr, index: Expr) -> None:
    """Ask for the cache line of `array[index]`; no fault if there is no such memory."""
    _prefetch(array, index, write=False, level=2)


def prefetch_to_l1(array: Expr, index: Expr, write: bool = False) -> None:
    """The same, to be read or written soon."""
    _prefetch(array, index, write, level=3)


def _prefetch(array: Expr, index: Expr, write: bool, level: int) -> None:
    line, data_cache = tirx.address_of(array[index]), _index(1)
    how = (_index(int(write)), _index(level), data_cache)
    script.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", line, *how))


def imported(text: str) -> AbstractContextManager[None]:
    """The enclosed statements may call functions defined in this LLVM IR, see `inlined`."""
    frame: AbstractContextManager[None] = script.attr(
        constant(0, "int32"), "pragma_import_llvm", text
    )
    return frame


def inlined(dtype: str, name: str, *args: Expr) -> Expr:
    """A call without side effects to a function of imported LLVM IR, which is inlined."""
    return tirx.call_pure_extern(dtype, name, *args)


def loop(begin: Expr, end: Expr) -> AbstractContextManager[Expr]:
    """`for i in range(begin, end)`, in the compiled program."""
    frame: AbstractContextManager[Expr] = script.serial(_index(begin), _index(end))
    return frame


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """The enclosed statements run if `condition` holds."""
    with script.If(condition), script.Then():
        yield


def function(parameters: Sequence[Parameter], body: Callable[..., None]) -> Any:
    """A kernel with these parameters, which may not alias; `body` gets them and emits statements.

    Pointers arrive as flat arrays about whose alignment nothing is assumed: ORT hands out slices.
    """
    with IRBuilder() as builder, script.prim_func(s_tir=True, private=True):
        script.func_attr({"tirx.noalias": True})
        arguments = [script.arg(p.name, p.variable()) for p in parameters]
        body(
            *(
                script.decl_buffer((_ANY_SIZE,), p.dtype, data=argument, align=1)
                if p.is_pointer
                else argument
                for p, argument in zip(parameters, arguments, strict=True)
            )
        )
    return builder.get()


_DISABLED = ["s_tir.CompactBufferAllocation"]
"""Scratch has its size already, and looking for a smaller one takes a third of the time."""


def compile_object(
    functions: Mapping[str, Any],
    mcpu: str,
    features: Sequence[str] = (),
    options: Sequence[str] = (),
) -> bytes:
    """An ELF object for x86-64 Linux with one global C symbol per function."""
    target = tvm.target.Target(
        {
            "kind": "llvm",
            "mcpu": mcpu,
            "mattr": list(features),
            "cl-opt": list(options),
            "mtriple": "x86_64-unknown-linux-gnu",
        }
    )
    host = target.with_host(target)
    module = tvm.IRModule({tvm.ir.GlobalVar(name): body for name, body in functions.items()})
    with tvm.transform.PassContext(
        config={"tirx.disable_storage_rewrite": True}, disabled_pass=_DISABLED
    ):
        lower, finish_host, _ = tirx.get_tir_pipeline("s_tir")
        lowered = lower(tirx.transform.BindTarget(host)(module))
        named = tvm.IRModule({}, attrs=lowered.attrs)
        for variable, body in lowered.functions.items():
            # Only now: a function that has its symbol earlier is given TVM's packed ABI.
            body = body.without_attr("tirx.is_entry_func")
            named[variable] = body.with_attr("global_symbol", variable.name_hint)
        on_host, _ = split_host_device_mods(named)
        compiled = codegen_build(finish_host()(on_host), target)
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.o")
        compiled.write_to_file(str(path), "o")
        return path.read_bytes()
