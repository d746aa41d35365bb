"""The passes of a target, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from qcompiler.ir.region import Region
from qcompiler.ir.stages import Stage
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.bias_correction import BiasCorrection
from qcompiler.passes.bind_kernels import BindKernels
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.passes.fuse_batchnorm import FuseBatchNorm
from qcompiler.passes.fuse_gelu import FuseGelu
from qcompiler.passes.fuse_norms import FuseNorms
from qcompiler.passes.fuse_quantize import FuseQuantize
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.insert_qdq import InsertQDQ, Observer
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.lift_qoperators import LiftQOperators
from qcompiler.passes.merge_siblings import MergeSiblings
from qcompiler.passes.normalize_qdq import NormalizeQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.side_by_side import Runner
from qcompiler.passes.smooth_activations import Sampler, SmoothActivations
from qcompiler.recipe import Recipe
from qcompiler.step import Step
from qcompiler.targets import catalog
from qcompiler.targets.target import Target

__all__ = ["default_steps"]


def default_steps(
    target: Target,
    recipe: Recipe,
    observe: Observer | None,
    sample: Sampler,
    choose: ChooseKernels | None,
    supports: Callable[[Region], str | None],
    run: Runner | None = None,
) -> list[Step]:
    """A new pass for each step; for the arguments see `Pipeline.default`."""
    precision = AssignPrecision.Options(recipe.keep_float, recipe.group_size)
    attention = FuseAttention.Options(recipe.attention)
    observe = None if observe is None else KnownRanges(observe)
    chosen = [Step("choose-kernels", choose, Stage.FLOAT, "plans")] if choose else []
    return [
        Step("canonicalize", Canonicalize(), Stage.FLOAT),
        Step("lift-qoperators", LiftQOperators(), Stage.FLOAT),
        Step("normalize-qdq", NormalizeQDQ(), Stage.FLOAT),
        Step("fuse-batchnorm", FuseBatchNorm(), Stage.FLOAT),
        Step("fuse-gelu", FuseGelu(), Stage.FLOAT),
        Step(
            "assign-precision",
            AssignPrecision(target.scheme, precision),
            Stage.FLOAT,
            "target",
        ),
        *chosen,
        Step("equalize-layers", EqualizeLayers(run, observe), Stage.FLOAT, "plans"),
        Step("smooth-activations", SmoothActivations(sample), Stage.FLOAT, "plans"),
        Step("bias-correction", BiasCorrection(run, observe), Stage.FLOAT, "plans"),
        Step("keep-sensitive", KeepSensitive(run, observe), Stage.FLOAT, "plans"),
        Step("insert-qdq", InsertQDQ(observe), Stage.QDQ, "plans"),
        Step("round-to-nearest", RoundToNearest(), Stage.QDQ, "plans"),
        Step("fold-qdq", FoldQDQ(), Stage.QUANTIZED),
        Step("fuse-regions", FuseRegions(supports), Stage.KERNEL, "target"),
        Step("fuse-norms", FuseNorms(supports), Stage.KERNEL, "target"),
        Step(
            "fuse-attention",
            FuseAttention(supports, attention),
            Stage.KERNEL,
            "target",
        ),
        Step("merge-siblings", MergeSiblings(supports), Stage.KERNEL, "target"),
        Step("fuse-quantize", FuseQuantize(supports), Stage.KERNEL, "target"),
        Step("bind-kernels", BindKernels(catalog.fingerprint(target)), Stage.KERNEL, "target"),
    ]
