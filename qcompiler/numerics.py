"""What each pass does to a model's results: run it in stock ONNX Runtime between passes, compare.

    watcher = CheckNumerics("samples.npz")
    pipeline.run(model, watchers=[watcher])

A pass that says of itself that it rounds is reported; any other must keep the numbers, but for the
last bits that another order of sums costs.  In a quantized model such a bit decides a tie here and
there, and what follows carries that on: a deep one then differs by about as much as rounding costs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.exact_copy import save_exact
from qcompiler.ir.errors import (
    CalibrationError,
    ModelError,
    NumericsError,
    OptionError,
    said_by_ort,
)
from qcompiler.ir.graph import every_node
from qcompiler.output_error import ErrorSums, OutputError
from qcompiler.runtime import open_session
from qcompiler.samples import Samples, check_sample
from qcompiler.session_options import new_session_options
from qcompiler.step import Step, Watcher

__all__ = ["Change", "CheckNumerics"]

_Outputs = dict[str, NDArray[Any]]

_EXACT = 60.0
"""dB: float32 sums in another order differ by 100 to 140; one step of int8 anywhere is below 50."""

_HALF = 40.0
"""dB, of a model in float16: each rounding is 75, and those of a deep one add up to 52 (ResNet50)
or 58 (MiniLM), which another order of them changes."""

_QUANTIZED = 15.0
"""dB, of a model that rounds: ties decided otherwise leave 78 (digits) to 19 (MiniLM with ranges
found as it runs; whether ONNX Runtime optimizes makes no difference to that)."""

_ROUNDING = ("Quantize", "DynamicQuantize", "QLinear")


@dataclasses.dataclass(frozen=True)
class Change:
    """What one pass did to the results.

    Attributes:
        step: Its name.
        rounds: Whether it says of itself that it may change them.
        changed: Whether it changed the model at all; if not, nothing was run.
        outputs: Each output against the model before the pass.
        since_source: Each output against the model as it came.
    """

    step: str
    rounds: bool
    changed: bool
    outputs: tuple[OutputError, ...]
    since_source: tuple[OutputError, ...]

    @property
    def max_error(self) -> float:
        """Largest absolute difference of any output to the model before the pass."""
        return max((output.max_error for output in self.outputs), default=0.0)

    @property
    def sqnr(self) -> float | None:
        """In dB, of the output that changed most by the pass; None if all are equal."""
        return _worst(self.outputs)

    @property
    def sqnr_since_source(self) -> float | None:
        """In dB, of the output that changed most since the source; None if all are equal."""
        return _worst(self.since_source)


class CheckNumerics(Watcher):
    """Runs the model after every pass that changed it, and refuses a jump.

    Attributes:
        changes: One per pass so far.
    """

    def __init__(
        self,
        samples: Samples | str | os.PathLike[str],
        bound: float | None = None,
        rounding_bound: float | None = None,
    ) -> None:
        """Take the facts.

        Args:
            samples: `.npz` file or folder; the outputs on all of them are kept in memory.
            bound: Least SQNR in dB against the model before a pass that does not round; by default
                60 if that model is in float32, 40 if in float16, 15 if it rounds to integers.
            rounding_bound: The same of a pass that rounds; None: it is only reported.

        Raises:
            CalibrationError: There are no samples.
            OptionError: A bound that is no number.
        """
        for value in (bound, rounding_bound):
            if value is not None and not math.isfinite(value):
                raise OptionError(f"a bound is a number of dB, not {value}")
        self.samples = samples if isinstance(samples, Samples) else Samples(samples)
        self.bound, self.rounding_bound = bound, rounding_bound
        self.changes: list[Change] = []

    def start(self, steps: Sequence[Step], model: ir.Model) -> None:
        """Run the model as it came.

        Raises:
            ModelError, CalibrationError: It does not run, a sample does not fit it, or none has
                anything to compare.
        """
        self.changes = []
        self._source = self._last = self._run(model)
        if not any(array.size for outputs in self._source for array in outputs.values()):
            raise CalibrationError(
                f"{self.samples.name} checks no numerics: "
                + ("it has no samples" if not self._source else "all outputs on it are empty")
            )
        self._usual = _usual_bound(model)

    def after(self, step: Step, model: ir.Model, changed: bool) -> None:
        """Run the model, compare, and refuse a jump.

        Raises:
            NumericsError: The pass changed the results beyond its bound, or the model runs no more.
        """
        outputs = self._last
        if changed:
            try:
                outputs = self._run(model)
            except ModelError as error:
                raise NumericsError(f"after {step.name} the model runs no more: {error}") from error
        # Other values may be of other boxes, and so many more or less.
        resizes = step.rounds or self._usual == _QUANTIZED
        change = Change(
            step.name, step.rounds, changed,
            _compare(self._last, outputs, step, resizes),
            _compare(self._source, outputs, step, resizes=True),
        )  # fmt: skip
        self.changes.append(change)
        self._check(change)
        self._last, self._usual = outputs, _usual_bound(model)

    def _check(self, change: Change) -> None:
        bound = self._usual if self.bound is None else self.bound
        if change.rounds:
            bound = -math.inf if self.rounding_bound is None else self.rounding_bound
        for output in change.outputs:
            if output.not_finite:
                raise NumericsError(
                    f"{change.step} makes {output.not_finite} values of output {output.name!r} "
                    "NaN or Inf"
                )
            if output.sqnr is not None and output.sqnr < bound and not output.resized:
                option = "--rounding-bound" if change.rounds else "--numerics-bound"
                ties = "" if self._usual == _EXACT else " (ties between two steps may cost that)"
                raise NumericsError(
                    f"{change.step} changes output {output.name!r} to {output.sqnr:.1f} dB, less "
                    f"than {bound:g}, by at most {output.max_error:.3g}; if that may be{ties}, set "
                    f"{option}"
                )

    def _run(self, model: ir.Model) -> list[_Outputs]:
        """The outputs on each sample."""
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            path = Path(folder) / "model.onnx"
            disabled = save_exact(model.clone(), path)
            options = new_session_options()
            options.log_severity_level = 3  # what ORT warns of is not about the pass
            session = open_session(path, options=options, disabled=disabled)
            names = [output.name for output in session.get_outputs()]
            found = []
            for file, sample in self.samples:
                feeds = check_sample(file, sample, session.get_inputs())
                try:
                    found.append(dict(zip(names, session.run(names, feeds), strict=True)))
                except Exception as error:
                    # ORT raises bare RuntimeErrors as well as its own types.
                    raise ModelError(f"the model fails on {file}: {said_by_ort(error)}") from error
            return found


def _usual_bound(model: ir.Model) -> float:
    nodes = list(every_node(model.graph))
    nodes += [node for function in model.functions.values() for node in function]  # of regions
    if any(node.op_type.startswith(_ROUNDING) for node in nodes):
        return _QUANTIZED
    half = ir.DataType.FLOAT16
    return _HALF if any(v.dtype is half for node in nodes for v in node.outputs) else _EXACT


def _compare(
    expected: Sequence[_Outputs], actual: Sequence[_Outputs], step: Step, resizes: bool
) -> tuple[OutputError, ...]:
    sums: dict[str, ErrorSums] = {}
    for before, after in zip(expected, actual, strict=True):
        if before.keys() != after.keys():
            raise NumericsError(
                f"{step.name} renames outputs: {sorted(before)} become {sorted(after)}"
            )
        for name, array in before.items():
            other = after[name]
            if other.shape != array.shape and not (resizes and other.ndim == array.ndim):
                raise NumericsError(
                    f"{step.name} changes the shape of output {name!r} from {list(array.shape)} "
                    f"to {list(other.shape)}"
                )
            sums.setdefault(name, ErrorSums(name)).add(array, other, None)
    return tuple(total.result() for total in sums.values())


def _worst(outputs: Sequence[OutputError]) -> float | None:
    return min((o.sqnr for o in outputs if o.sqnr is not None), default=None)
