"""How passes learn about a model by running it: on the user's samples, or on none."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.calibrate import observe, run_exactly
from qcompiler.clipping import Clipping
from qcompiler.ir.types import TensorStats
from qcompiler.passes.insert_qdq import Observer
from qcompiler.passes.planned_products import Sampler
from qcompiler.passes.second_moments import LayerRuns, Walk
from qcompiler.passes.side_by_side import Runner
from qcompiler.sampled_parts import sample_large
from qcompiler.samples import Samples
from qcompiler.walk import walker

__all__ = ["ModelRuns", "SampleRuns"]


@dataclasses.dataclass(frozen=True)
class ModelRuns:
    """What passes may ask of a model that is run.

    Attributes:
        observe: Ranges of tensors, see `InsertQDQ`; None without samples.
        sample: Rows of tensors, see `SmoothActivations`; by default on inputs made up for it.
        run: Tensors of a model run as it is written, by which passes judge what rounding does to
            it, see `KeepSensitive`; without it those change nothing.
        layers: What goes into one layer after the other, see `GPTQ`.
    """

    observe: Observer | None = None
    sample: Sampler = sample_large
    run: Runner | None = None
    layers: LayerRuns = dataclasses.field(default_factory=LayerRuns)

    @property
    def made_up(self) -> bool:
        """Whether `sample` runs the model on inputs that nobody gave."""
        return self.sample is sample_large

    @classmethod
    def on(cls, samples: Samples, clipping: Clipping | None = None) -> ModelRuns:
        """All of it, on samples.

        Args:
            samples: What to run the model on.
            clipping: Where ranges are cut off; by default where a recipe does by default.
        """
        return SampleRuns(samples, clipping or Clipping("mse")).runs()


class SampleRuns:
    """Runs the model on samples when a pass asks for it, and knows whether one did."""

    def __init__(
        self,
        samples: Samples,
        clipping: Clipping,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        """Nothing is run yet; `tell` hears of each sample that was: (done, total)."""
        self.samples, self.clipping, self.tell = samples, clipping, tell
        self.was_asked = False

    def runs(
        self,
        executor: concurrent.futures.Executor | None = None,
        tell: Callable[[str, float, float], None] | None = None,
    ) -> ModelRuns:
        """What a pipeline takes; the arguments as of `LayerRuns`."""
        layers = LayerRuns(self.walk, executor, tell)
        return ModelRuns(self.observe, self.sample, self.run, layers)

    def observe(
        self, model: ir.Model, names: Mapping[str, str | None]
    ) -> Mapping[str, TensorStats]:
        """The ranges of tensors, see `calibrate.observe`."""
        self.was_asked = True
        return observe(model, names, self.samples, self.tell, self.clipping)

    def sample(self, model: ir.Model, names: Sequence[str]) -> Mapping[str, NDArray[np.float32]]:
        """Some of their rows, see `sampled_parts.sample_large`."""
        self.was_asked = True
        return sample_large(model, names, self.samples)

    def run(self, model: ir.Model, names: Sequence[str]) -> Mapping[str, NDArray[np.float32]]:
        """Tensors of one row each, see `calibrate.run_exactly`."""
        self.was_asked = True
        return run_exactly(model, names, self.samples)

    def walk(self, model: ir.Model, stops: list[ir.Value]) -> Walk:
        """From layer to layer, see `SampleWalk`."""
        self.was_asked = True
        return walker(self.samples)(model, stops)
