"""The table of a library for GPUs: cubins, how their kernels are launched, and twins on the CPU."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from qcompiler.ir.region import Region
from qcompiler.targets.cuda import Launch, archs_of, launches
from qcompiler.targets.cuda.norm_plan import NORMS
from qcompiler.targets.cuda.packing import CONV, CONV_IMAGE, IMAGE
from qcompiler.targets.cuda.twin import epilogue_function, epilogue_name
from qcompiler.targets.kernel_table import kernel_table, members, op_spec

__all__ = ["cubin_name", "cuda_table"]

_WORD = re.compile(r"RMS|[A-Z][a-z0-9]+")

_ANCHORS = {
    "QMatMulW4A16": "qc_cuda_w4a16",
    "QMatMulW4Z4A16": "qc_cuda_w4z4a16",
    "QMatMulW8A8": "qc_cuda_w8a8",
    "QMatMulFp8": "qc_cuda_fp8",
    "Quantize": "qc_cuda_quantize",
    "QuantizeFp8": "qc_cuda_quantize_fp8",
    IMAGE: "qc_cuda_image",
    CONV: "qc_cuda_conv",
    CONV_IMAGE: "qc_cuda_conv_image",
    **{norm: f"qc_cuda_{'_'.join(_WORD.findall(norm)).lower()}" for norm in NORMS},
}
"""The `struct qc_anchor` of each op, in native/cuda_ops.c."""


def cubin_name(region: Region, arch: str) -> str:
    """The C name of the cubin of a region."""
    return f"cubin_{region.name}_{arch}"


def cuda_table(
    regions: Sequence[Region], domain: str, cubins: Mapping[str, bytes], version: tuple[int, int]
) -> str:
    """The C text for `regions`.

    Args:
        regions: What the ops compute.
        domain: The ONNX domain of the ops.
        cubins: By `cubin_name`; files of these names are beside the text when it is compiled.
        version: The CUDA of the compiler that made them.
    """
    anchors = [f"extern const struct qc_anchor {name};" for name in sorted(_ANCHORS.values())]
    definitions = [
        "#include <math.h>",
        '#include "cuda_driver.h"',
        *anchors,
        f"const int qc_cuda_version = {1000 * version[0] + 10 * version[1]};",
        *(_embedded(name, content) for name, content in sorted(cubins.items())),
        *(epilogue_function(region) for region in regions if region.steps),
        *(_variants(region) for region in regions),
    ]
    return kernel_table("cuda_driver.h", domain, definitions, [_op(region) for region in regions])


def _embedded(name: str, content: bytes) -> str:
    """A file as bytes of the library; its hash is there for caches that know the text alone."""
    lines = (".pushsection .rodata", ".balign 64", f"{name}:", f'.incbin \\"{name}\\"',
             ".popsection")  # fmt: skip
    assembly = "\\n".join(lines)
    return (
        f"/* {hashlib.sha256(content).hexdigest()} */\n"
        f'__asm__("{assembly}");\n'
        f'extern const unsigned char {name}[] __attribute__((visibility("hidden")));'
    )


def _op(region: Region) -> str:
    epilogue = epilogue_name(region) or "NULL"
    anchor = _ANCHORS[region.anchor]
    more = {name: _number_of(value) for name, value in region.attributes}
    return op_spec(region, anchor, len(archs_of(region)), epilogue=epilogue, **more)


def _number_of(value: float | tuple[int, ...]) -> str:
    """An attribute as C."""
    if isinstance(value, tuple):
        return "{" + ", ".join(map(str, value)) + "}"
    return str(value) if isinstance(value, int) else f"{value!r}f"


def _variants(region: Region) -> str:
    """Of each architecture, the best first."""
    archs = sorted(archs_of(region), key=_number, reverse=True)
    lines = [line for arch in archs for line in _kernels(region, arch)]
    rows = ", ".join(
        members({"isa": f"&qc_{arch}", "cuda": f"&kernels_{region.name}_{arch}"}) for arch in archs
    )
    lines.append(f"static const struct qc_variant variants_{region.name}[] = {{{rows}}};")
    return "\n".join(lines)


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("a"))


def _kernels(region: Region, arch: str) -> list[str]:
    name, found = f"{region.name}_{arch}", launches(region, arch)
    rows = ",\n".join(f"    {_launch(launch)}" for launch in found)
    kernels = members({
        "cubin": cubin_name(region, arch),
        "launches": f"launches_{name}",
        "launch_count": str(len(found)),
    })  # fmt: skip
    return [
        f"static const struct qc_launch launches_{name}[] = {{\n{rows}}};",
        f"static const struct qc_cuda_kernels kernels_{name} = {kernels};",
    ]


def _launch(launch: Launch) -> str:
    values = {
        "symbol": f'"{launch.symbol}"',
        "max_rows": str(launch.max_rows or 0),
        "threads": str(launch.threads),
        "shared_bytes": str(launch.shared_bytes),
        "block_rows": str(launch.block_rows),
        "block_columns": str(launch.block_columns),
        "splits": str(launch.splits),
        "arguments": _arguments(launch.parameters),
    }
    if launch.combine is not None:
        values["combine"] = f'"{launch.combine}"'
        values["combine_arguments"] = _arguments(launch.combine_parameters)
    return members(values)


def _arguments(parameters: Iterable[str]) -> str:
    # "extra3" is the fourth of its kind, and so is "y3"; "y" alone is another.
    codes = [
        f"QC_{name[:-1].upper()}0 + {name[-1]}" if name[-1].isdigit() else f"QC_{name.upper()}"
        for name in parameters
    ]
    return f"(const uint8_t[]){{{', '.join([*codes, 'QC_END'])}}}"
