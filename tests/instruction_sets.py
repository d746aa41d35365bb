"""Which instruction sets kernels can be tested on here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnxruntime as ort
import pytest

from qcompiler.cli.host import instruction_sets
from qcompiler.targets.x86 import Isa
from qcompiler.targets.x86.families import FAMILIES


def needs(isa: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(isa not in instruction_sets(), reason=f"this CPU has no {isa}")


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
