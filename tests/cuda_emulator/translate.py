"""From the CUDA C that TVM generates to C++ for `emulator.h`.

Inline PTX becomes a call of the emulator's function; what is not known is an error, not a no-op.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection

__all__ = ["translate"]

_FIRST_FUNCTION = re.compile(r'__forceinline__ __device__|extern "C" __global__')
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")
_KERNEL = re.compile(
    r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) *(?=\{)'
)
_WAIT = re.compile(r'asm volatile\(\n.*?mbarrier\.try_wait\.parity.*?"memory"\);', re.DOTALL)
"""TVM's own loop around it."""
_ASM = re.compile(r"asm volatile\((.*)\);$", re.MULTILINE)
_OPERAND = re.compile(r'"[^"]*"\(([^()]*)\)')

# A pattern of PTX, and the call: %0, %1 are the operands, in order of their numbers in PTX.
_RULES = (
    (r"cp\.async\.cg\.shared\.global \[%0\], \[%1\], 16;", "copy_async(%0, %1)"),
    (r"cp\.async\.cg\.shared\.global \[%0\], \[%1\], 16, %2;", "copy_async(%0, %1, %2)"),
    (r"cp\.async\.commit_group;", "commit_group()"),
    (r"cp\.async\.wait_group (?P<n>\d+);", "wait_group({n})"),
    (r"ld\.global\.[\w.:]*v4\.u32 .*", "load_global({{&%0, &%1, &%2, &%3}}, %4)"),
    (r"ld\.shared\.v4\.u32 .*", "load_shared({{&%0, &%1, &%2, &%3}}, %4)"),
    (r"ld\.shared\.u32 .*", "load_shared({{&%0}}, %1)"),
    (r"ld\.global\.[\w.:]*v2\.u32 .*", "load_global({{&%0, &%1}}, %2)"),
    (r"ld\.global\.[\w.:]*u32 %0.*", "load_global({{&%0}}, %1)"),
    (r"ld\.global\.nc\.u16 .*", "load_narrow<uint16_t>(&%0, %1)"),
    (r"ld\.global\.nc\.u8 .*", "load_narrow<uint8_t>(&%0, %1)"),
    (r"ld\.shared\.u16 .*", "load_shared_pair(&%0, %1)"),
    (r"st\.global\.u32 .*", "store_global(%0, {{%1}})"),
    (r"st\.global\.v2\.u32 .*", "store_global(%0, {{%1, %2}})"),
    (r"st\.global\.v4\.u32 .*", "store_global(%0, {{%1, %2, %3, %4}})"),
    (r"cvt\.rn\.f16x2\.f32 .*", "%0 = to_half(%2) | uint32_t(to_half(%1)) << 16"),
    (
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 .*",
        "load_matrices({{&%0, &%1, &%2, &%3}}, %4)",
    ),
    *(
        (
            rf"mma\.sync\.aligned\.{shape} .*",
            f"multiply<Kind::{kind}, {sums}>({{{{&%0, &%1, &%2, &%3}}}}, {{{{%4, %5, %6, %7}}}}, "
            "{{%8, %9}}, {{%10, %11, %12, %13}})",
        )
        for shape, kind, sums in (
            (r"m16n8k16\.row\.col\.f32\.f16\.f16\.f32", "half", "float"),
            (r"m16n8k32\.row\.col\.s32\.s8\.u8\.s32", "int8", "uint32_t"),
            (r"m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32", "e4m3", "float"),
        )
    ),
    (r"wgmma\.fence\.sync\.aligned;", "(void)0"),
    (r"wgmma\.commit_group\.sync\.aligned;", "commit_products()"),
    (r"wgmma\.wait_group\.sync\.aligned (?P<n>\d+);", "wait_products({n})"),
    (r"fence\.proxy\.async\.shared::cta;", "fence_async()"),
    (r"st\.shared\.v4\.u32 .*", "store_shared(%0, {{%1, %2, %3, %4}})"),
    (r"mbarrier\.init\.shared::cta\.b64 .*", "begin_phases(%0, %1)"),
    (r"mbarrier\.arrive\.release\.cta\.shared::cta\.b64 .*", "arrive(%0, %1)"),
    # The barrier of the block follows.
    (r"fence\.mbarrier_init\.release\.cluster;", "(void)0"),
    (r"bar\.sync .*", "synchronize(%0, %1)"),
    (r"bar\.warp\.sync .*", "synchronize_warp(%0)"),
    (r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32 \d+;", "(void)0"),
    (r"lop3\.b32 %0, %1, %2, %3, (?P<n>\d+);", "%0 = lookup3(%1, %2, %3, {n})"),
    (r"prmt\.b32 .*", "%0 = permute(%1, %2, %3)"),
    (r"dp4a\.u32\.s32 .*", "%0 = add_products_of_bytes(%1, %2, %3)"),
    (r"sub\.f16x2 .*", "%0 = subtract_halves(%1, %2)"),
    (r"mul\.f16x2 .*", "%0 = multiply_halves(%1, %2)"),
    (r"fma\.rn\.f16x2 .*", "%0 = fma_halves(%1, %2, %3)"),
    (r"cvt\.rn\.f16x2\.e4m3x2 .*", "%0 = pair_from_e4m3(%1)"),
    (r"cvt\.rn\.satfinite\.e4m3x2\.f32 .*", "%0 = pair_to_e4m3(%1, %2)"),
)


_GROUP = re.compile(
    r"\{ \.reg \.pred ps0; setp\.ne\.b32 ps0, %\d+, 0; wgmma\.mma_async\.sync\.aligned\."
    r"m64n(\d+)k\d+\.(f32\.f16\.f16|s32\.s8\.u8|f32\.e4m3\.e4m3) .*"
)
_KINDS = {
    "f32.f16.f16": "Kind::half, float",
    "s32.s8.u8": "Kind::int8, uint32_t",
    "f32.e4m3.e4m3": "Kind::e4m3, float",
}


def translate(source: str, only: Collection[str] | None = None) -> str:
    """The C++ program: its `main` runs one kernel, see `emulator.h`.

    Args:
        source: As TVM writes it.
        only: The kernels that are kept, by name; all without.
    """
    first = _FIRST_FUNCTION.search(source)
    assert first is not None, source
    functions = source[first.start() :] if only is None else _kept(source[first.start() :], only)
    functions = _WAIT.sub("wait_phase(barrier_addr_int, phase);", functions)
    functions = _ASM.sub(lambda match: _call(match[1]), functions)
    functions = _SHARED.sub(r"\1 *\2 = (\1 *)emulator::shared_begin;", functions)
    kernels = [(match[1], match[2]) for match in _KERNEL.finditer(functions)]
    runs = "\n".join(_run(name, parameters) for name, parameters in kernels)
    table = ", ".join(f'{{"{name}", run_{name}}}' for name, _ in kernels)
    return (
        f'#include "emulator.h"\nusing namespace emulator;\n{functions}\n{runs}\n'
        f"static const Kernel all_kernels[] = {{{table}}};\n"
        "int main(int count, char **words) {\n"
        f"    return emulator::main(count, words, all_kernels, {len(kernels)});\n}}\n"
    )


def _kept(functions: str, only: Collection[str]) -> str:
    """Without the bodies of other kernels, which come one after the other, after all else."""
    starts = [match.start() for match in _KERNEL.finditer(functions)]
    parts = [functions[a:b] for a, b in itertools.pairwise([*starts, len(functions)])]
    names = [match[1] for match in _KERNEL.finditer(functions)]
    assert set(only) <= set(names), (only, names)
    kept = [part for name, part in zip(names, parts, strict=True) if name in only]
    return "".join([functions[: starts[0]], *kept])


def _run(name: str, parameters: str) -> str:
    types = [p.replace("__restrict__", "").rsplit(maxsplit=1)[0] for p in parameters.split(",")]
    values = ", ".join(f"*({kind.strip()} *)a[{i}]" for i, kind in enumerate(types))
    return f"static void run_{name}(void **a) {{ {name}({values}); }}"


def _call(statement: str) -> str:
    """The emulator's form of what stands between the parentheses of an `asm`."""
    text = re.match(r'"((?:[^"\\]|\\.)*)"', statement)
    assert text is not None, statement
    operands = _OPERAND.findall(statement[text.end() :])
    if group := _GROUP.fullmatch(text[1].strip()):
        count = int(group[1]) // 2
        sums, rest = operands[:count], operands[count:]
        results = ", ".join(f"&{name}" for name in sums)
        weights = ", ".join(rest[:4])
        kind = _KINDS[group[2]]
        return f"multiply_group<{kind}>({{{results}}}, {{{weights}}}, {rest[4]}, {rest[5]});"
    for pattern, call in _RULES:
        if found := re.fullmatch(pattern, text[1].strip()):
            filled = call.format(**found.groupdict())
            return re.sub(r"%(\d+)", lambda number: operands[int(number[1])], filled) + ";"
    raise ValueError(f"the emulator does not know this PTX: {text[1]}")
