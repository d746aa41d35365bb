"""Which instruction sets kernels can be tested on here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import pytest

from qcompiler.cli.host import instruction_sets
from qcompiler.ir.region import Region
from qcompiler.targets import x86
from qcompiler.targets.x86 import Isa, table
from qcompiler.targets.x86.families import FAMILIES


def needs(isa: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(isa not in instruction_sets(), reason=f"this CPU has no {isa}")


needs_kernels = pytest.mark.skipif(
    not {isa.name for isa in x86.ISAS} & {*instruction_sets()},
    reason="no kernels for this CPU",
)


@contextlib.contextmanager
def compiled_for_here() -> Iterator[None]:
    """Libraries get kernels for the instruction sets of this processor alone.

    A test that compares kernels runs no others, and they take as long to compile; for all of them
    they are compiled in `test_library.py` and wherever a model is.
    """
    here = instruction_sets()

    def isas_of(*regions: Region) -> tuple[Isa, ...]:
        # What the processor has of AVX512-BF16 is not known here: it comes with AVX512-VNNI.
        names = {*here, "avx512-bf16"} if "avx512-vnni" in here else here
        return tuple(isa for isa in isas(*regions) if isa.name in names) or isas(*regions)

    isas = x86.isas_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(x86, "isas_of", isas_of)
        patch.setattr(table, "isas_of", isas_of)
        yield


def each_isa(anchor: str) -> pytest.MarkDecorator:
    """The test's `isa` is each that kernels of `anchor` are compiled for."""
    isas = FAMILIES[anchor].isas
    return pytest.mark.parametrize(
        "isa", [pytest.param(isa, id=isa.name, marks=needs(isa.name)) for isa in isas]
    )


def offer(options: ort.SessionOptions, library: Path, isa: Isa | None) -> None:
    """Registers a library, as if `isa` were the best that the processor has if one is given."""
    with pytest.MonkeyPatch.context() as patch:
        if isa is not None:
            patch.setenv("QCOMPILER_ISA", isa.name)
        options.register_custom_ops_library(str(library))


def substitute(isa: Isa) -> Isa:
    """What runs here the code for `isa`: AVX-VNNI's instructions are AVX512-VL's, encoded anew."""
    if isa.name == "avx-vnni" and isa.name not in instruction_sets():
        return dataclasses.replace(isa, features=("+avx512vl", "+avx512vnni"))
    return isa


def each_raw_isa(anchor: str) -> pytest.MarkDecorator:
    """The same for kernels that are loaded without a library, and may be substituted."""

    def runs(isa: Isa) -> str:
        return "avx512-vnni" if substitute(isa) != isa else isa.name

    isas = FAMILIES[anchor].isas
    return pytest.mark.parametrize(
        "isa", [pytest.param(isa, id=isa.name, marks=needs(runs(isa))) for isa in isas]
    )
