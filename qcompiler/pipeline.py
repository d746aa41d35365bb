"""The passes of a compilation, in order, each with the stage it must leave the model in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import onnx_ir as ir

from qcompiler.calibrate import sample_tokens
from qcompiler.ir.errors import OptionError, QCompilerError, did_you_mean
from qcompiler.ir.region import Region
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.bind_kernels import BindKernels
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.passes.fuse_batchnorm import FuseBatchNorm
from qcompiler.passes.fuse_gelu import FuseGelu
from qcompiler.passes.fuse_norms import FuseNorms
from qcompiler.passes.fuse_quantize import FuseQuantize
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.insert_qdq import InsertQDQ, Observer
from qcompiler.passes.merge_siblings import MergeSiblings
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.smooth_activations import Sampler, SmoothActivations
from qcompiler.recipe import Recipe
from qcompiler.targets import catalog
from qcompiler.targets.target import Target

__all__ = ["Pipeline", "Step"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of a pipeline.

    Attributes:
        name: What it is called on the command line.
        rewrite: The pass; any `onnx_ir` pass will do.
        stage: What the model must satisfy afterwards.
        needs: What the pass depends on beside the model: the target, or plans made before it.
    """

    name: str
    rewrite: ir.passes.PassBase
    stage: Stage
    needs: Literal["", "target", "plans"] = ""

    def apply(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass and verify what it leaves.

        Raises:
            QCompilerError: A mistake in the input, as the pass found it.
            VerifyError: The pass broke a rule of its stage.
        """
        try:
            result = self.rewrite(model)
        except ir.passes.PassError as error:
            # onnx_ir wraps what happens inside a sequence of passes; ours speak for themselves.
            if isinstance(error.__cause__, QCompilerError):
                raise error.__cause__ from None
            raise
        verify(result.model, self.stage, after=self.name)
        return result


class Pipeline:
    """An ordered list of passes that can be edited before it runs.

    pipeline = Pipeline.default(get_target("x86-int8"))
    pipeline.insert_after("fuse-gelu", "my-pass", MyPass())
    model = pipeline.run(model)
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = list(steps)

    @classmethod
    def default(
        cls,
        target: Target,
        recipe: Recipe | None = None,
        observe: Observer | None = None,
        sample: Sampler = sample_tokens,
        choose: ChooseKernels | None = None,
        supports: Callable[[Region], str | None] | None = None,
    ) -> Pipeline:
        """The passes of a target.

        Args:
            target: From `get_target`.
            recipe: What to do differently.
            observe: Where static activation ranges come from, see `InsertQDQ`.
            sample: Where tokens to smooth by come from, see `SmoothActivations`.
            choose: What decides where quantizing gains something; without it, everywhere.
            supports: Why there is to be no kernel for a region; by default the target's word.
        """
        recipe = recipe or Recipe()
        supports = supports or (lambda region: catalog.unsupported(target, region))
        chosen = [Step("choose-kernels", choose, Stage.FLOAT, "plans")] if choose else []
        pipeline = cls(
            [
                Step("canonicalize", Canonicalize(), Stage.FLOAT),
                Step("fuse-batchnorm", FuseBatchNorm(), Stage.FLOAT),
                Step("fuse-gelu", FuseGelu(), Stage.FLOAT),
                Step(
                    "assign-precision",
                    AssignPrecision(target.scheme, recipe.keep_float, recipe.group_size),
                    Stage.FLOAT,
                    "target",
                ),
                *chosen,
                Step("smooth-activations", SmoothActivations(sample), Stage.FLOAT, "plans"),
                Step("insert-qdq", InsertQDQ(observe), Stage.QDQ, "plans"),
                Step("round-to-nearest", RoundToNearest(), Stage.QDQ, "plans"),
                Step("fold-qdq", FoldQDQ(), Stage.QUANTIZED),
                Step("fuse-regions", FuseRegions(supports), Stage.KERNEL, "target"),
                Step("fuse-norms", FuseNorms(supports), Stage.KERNEL, "target"),
                Step(
                    "fuse-attention",
                    FuseAttention(supports, precision=recipe.attention),
                    Stage.KERNEL,
                    "target",
                ),
                Step("merge-siblings", MergeSiblings(supports), Stage.KERNEL, "target"),
                Step("fuse-quantize", FuseQuantize(supports), Stage.KERNEL, "target"),
                Step(
                    "bind-kernels", BindKernels(catalog.fingerprint(target)), Stage.KERNEL, "target"
                ),
            ]
        )
        if not recipe.smooth:
            pipeline.remove("smooth-activations")
        return pipeline

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def insert_before(self, anchor: str, name: str, rewrite: ir.passes.PassBase) -> None:
        """Insert a pass before the one called `anchor`, in that one's preceding stage."""
        index = self._index(anchor)
        stage = self.steps[index - 1].stage if index else Stage.FLOAT
        self.steps.insert(index, Step(name, rewrite, stage))

    def insert_after(self, anchor: str, name: str, rewrite: ir.passes.PassBase) -> None:
        """Insert a pass after the one called `anchor`, in the same stage."""
        index = self._index(anchor)
        self.steps.insert(index + 1, Step(name, rewrite, self.steps[index].stage))

    def replace(self, name: str, rewrite: ir.passes.PassBase) -> None:
        """Let another pass do the work of the one called `name`."""
        index = self._index(name)
        self.steps[index] = dataclasses.replace(self.steps[index], rewrite=rewrite)

    def remove(self, name: str) -> None:
        """Leave out the pass called `name`."""
        del self.steps[self._index(name)]

    def run(self, model: ir.Model, on_step: Callable[[Step], None] | None = None) -> ir.Model:
        """Run every pass and verify the model after each.

        Args:
            model: Changed in place by passes that work in place.
            on_step: Called before each pass.

        Returns:
            The rewritten model.

        Raises:
            QCompilerError: A mistake in the input, as the pass found it.
            VerifyError: A pass broke a rule of its stage.
        """
        for step in self.steps:
            if on_step is not None:
                on_step(step)
            model = step.apply(model).model
        return model

    def _index(self, name: str) -> int:
        names = [step.name for step in self.steps]
        if name not in names:
            raise OptionError(f"no pass {name!r} in the pipeline{did_you_mean(name, names)}")
        return names.index(name)
