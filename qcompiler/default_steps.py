"""The passes of a target, in the order in which they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qcompiler.ir.region import Region
from qcompiler.ir.stages import Stage
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.awq import AWQ
from qcompiler.passes.bias_correction import BiasCorrection
from qcompiler.passes.bind_kernels import BindKernels
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.passes.convert_float16 import ConvertFloat16
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.passes.fuse_batchnorm import FuseBatchNorm
from qcompiler.passes.fuse_gelu import FuseGelu
from qcompiler.passes.fuse_hard_swish import FuseHardSwish
from qcompiler.passes.fuse_images import FuseImages
from qcompiler.passes.fuse_layer_norm import FuseLayerNorm
from qcompiler.passes.fuse_norms import FuseNorms
from qcompiler.passes.fuse_quantize import FuseQuantize
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.fuse_requantize import FuseRequantize
from qcompiler.passes.fuse_windows import FuseWindows
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.hqq import HQQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.join_integers import JoinIntegers
from qcompiler.passes.keep_from_gemm import KeepFromGemm
from qcompiler.passes.keep_from_qlinear import KeepFromQLinear
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.known_rows import KnownRows
from qcompiler.passes.lift_qoperators import LiftQOperators
from qcompiler.passes.lower_convolutions import LowerConvolutions
from qcompiler.passes.merge_siblings import MergeSiblings
from qcompiler.passes.normalize_qdq import NormalizeQDQ
from qcompiler.passes.round_tables import RoundTables
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.shift_weights import ShiftWeights
from qcompiler.passes.smooth_activations import SmoothActivations
from qcompiler.passes.split_outliers import SplitOutliers
from qcompiler.passes.unfold_convolutions import UnfoldConvolutions
from qcompiler.passes.use_ort_attention import UseOrtAttention
from qcompiler.passes.use_ort_rotary import UseOrtRotary
from qcompiler.passes.widen_floats import WidenFloats
from qcompiler.recipe import Recipe
from qcompiler.step import Step
from qcompiler.targets import catalog
from qcompiler.targets.target import Scheme, Target

__all__ = ["OPTIONS_OF_RECIPE", "default_steps"]

OPTIONS_OF_RECIPE = {
    ("assign-precision", "keep_float"): "keep_float",
    ("assign-precision", "group_size"): "group_size",
    ("assign-precision", "rounding"): "rounding",
    ("assign-precision", "zero_points"): "zero_points",
    ("assign-precision", "scales"): "scales",
    ("fuse-attention", "precision"): "attention",
    ("convert-float16", "type"): "float",
}
"""Options of passes that are keys of the recipe itself, and which."""


def default_steps(
    target: Target,
    recipe: Recipe,
    runs: ModelRuns,
    choose: ChooseKernels | None,
    supports: Callable[[Region], str | None],
    left: str | None = None,
) -> list[Step]:
    """A new pass for each step; for the arguments see `Pipeline.default`."""
    precision = AssignPrecision.Options(
        recipe.keep_float,
        recipe.group_size,
        rounding=recipe.rounding,
        zero_points=recipe.zero_points,
        scales=recipe.scales,
    )
    attention = FuseAttention.Options(recipe.attention)
    # A scheme of float activations has an op for products of floats by few bits.
    lifted = LiftQOperators.Options(float_products=target.scheme.activation is None)
    floats = ConvertFloat16.Options(recipe.float or target.float_type)
    ranges = None if runs.observe is None else KnownRanges(runs.observe)
    rows = KnownRows(runs.sample)
    chosen = [Step("choose-kernels", choose, Stage.FLOAT, "plans")] if choose else []
    unfold = UnfoldConvolutions(choose, recipe.rounding)
    has_unfold = target.arch == "x86"  # only there are products known to be faster
    unfolded = [Step("unfold-convolutions", unfold, Stage.FLOAT, "plans")] if has_unfold else []
    return [
        Step("canonicalize", Canonicalize(), Stage.FLOAT),
        Step(
            "widen-floats",
            WidenFloats(floats.type == "fp16", lifted.float_products),
            Stage.FLOAT,
        ),
        Step("lift-qoperators", LiftQOperators(lifted), Stage.FLOAT),
        Step("normalize-qdq", NormalizeQDQ(), Stage.FLOAT),
        Step("fuse-batchnorm", FuseBatchNorm(), Stage.FLOAT),
        Step("fuse-gelu", FuseGelu(), Stage.FLOAT),
        Step("fuse-layer-norm", FuseLayerNorm(), Stage.FLOAT),
        Step("fuse-hard-swish", FuseHardSwish(), Stage.FLOAT),
        Step(
            "assign-precision",
            AssignPrecision(_scheme(target, runs), precision, recipe.nodes),
            Stage.FLOAT,
            "target",
        ),
        Step("lower-convolutions", LowerConvolutions(), Stage.FLOAT, "plans"),
        *unfolded,
        *chosen,
        Step("equalize-layers", EqualizeLayers(runs.run, ranges), Stage.FLOAT, "plans"),
        Step(
            "smooth-activations",
            SmoothActivations(rows, made_up=runs.made_up, ranges=ranges),
            Stage.FLOAT,
            "plans",
        ),
        Step(
            "split-outliers",
            SplitOutliers(rows, made_up=runs.made_up, ranges=ranges),
            Stage.FLOAT,
            "plans",
        ),
        Step("bias-correction", BiasCorrection(runs.run, ranges), Stage.FLOAT, "plans"),
        Step(
            "keep-sensitive",
            KeepSensitive(runs.run, ranges, progress=runs.layers.progress),
            Stage.FLOAT,
            "plans",
        ),
        Step("join-integers", JoinIntegers(), Stage.FLOAT, "plans"),
        Step("round-tables", RoundTables(), Stage.QDQ, "plans"),
        Step("awq", AWQ(runs.layers), Stage.QDQ, "plans"),
        Step("hqq", HQQ(runs.layers), Stage.QDQ, "plans"),
        Step("gptq", GPTQ(runs.layers), Stage.QDQ, "plans"),
        Step("insert-qdq", InsertQDQ(ranges), Stage.QDQ, "plans"),
        Step("round-to-nearest", RoundToNearest(), Stage.QDQ, "plans"),
        Step("fold-qdq", FoldQDQ(left, target.scheme.images), Stage.QUANTIZED),
        Step("shift-weights", ShiftWeights(sessions_ask=True), Stage.QUANTIZED),
        Step("convert-float16", ConvertFloat16(runs.sample, floats), Stage.QUANTIZED, "target"),
        Step("fuse-regions", FuseRegions(supports), Stage.KERNEL, "target"),
        Step("fuse-images", FuseImages(supports), Stage.KERNEL, "target"),
        Step("fuse-norms", FuseNorms(supports), Stage.KERNEL, "target"),
        Step("use-ort-rotary", UseOrtRotary(target.arch == "x86"), Stage.KERNEL, "target"),
        Step(
            "use-ort-attention",
            UseOrtAttention(target.arch == "cuda"),
            Stage.KERNEL,
            "target",
        ),
        Step(
            "fuse-attention",
            FuseAttention(supports, attention),
            Stage.KERNEL,
            "target",
        ),
        Step("merge-siblings", MergeSiblings(supports), Stage.KERNEL, "target"),
        Step("fuse-windows", FuseWindows(supports), Stage.KERNEL, "target"),
        Step("fuse-requantize", FuseRequantize(supports), Stage.KERNEL, "target"),
        Step("fuse-quantize", FuseQuantize(supports), Stage.KERNEL, "target"),
        Step("keep-from-gemm", KeepFromGemm(), Stage.KERNEL),
        Step("keep-from-qlinear", KeepFromQLinear(target.arch == "x86"), Stage.KERNEL, "target"),
        Step("bind-kernels", BindKernels(catalog.fingerprint(target)), Stage.KERNEL, "target"),
    ]


def _scheme(target: Target, runs: ModelRuns) -> Scheme:
    """The target's; without samples convolutions of GPUs stay as fast as floats are."""
    if not target.scheme.images or target.scheme.conv_weight is None or runs.observe is not None:
        return target.scheme
    why = "its activations need static ranges, for which there are no samples: --calib DIR"
    return dataclasses.replace(target.scheme, conv_weight=None, no_conv=why)
