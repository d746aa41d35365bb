"""`qcompile MODEL --target T`: compile."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from qcompiler.cli.console import Terminal
from qcompiler.cli.debugging import Debugging, debugging_options
from qcompiler.cli.options import (
    FILE,
    Command,
    Shapes,
    ShapesType,
    TargetName,
    json_option,
    preprocess_option,
    quiet_option,
    samples_of,
    verbose_option,
)
from qcompiler.cli.outcome import print_emitted, print_report, print_stopped

if TYPE_CHECKING:
    from qcompiler.recipe import Recipe

__all__ = ["compile_command"]


@click.command("compile", cls=Command, hidden=True, add_help_option=False)
@click.option_panel("Arguments")
@click.argument("model", type=FILE, metavar="MODEL", help="An ONNX file, or a .pt2 of torch.")
@click.option(
    "--target",
    type=TargetName(),
    metavar="TARGET",
    required=True,
    help="What to compile for; `qcompile targets` lists them.",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="DIR",
    help="The bundle's folder; <model>.<target> if not given.",
)
@click.option(
    "--calib",
    type=FILE,
    metavar="DIR",
    help="Samples, needed for convolutions: a folder of .npz, .npy, ONNX test data or images, or "
    "module:function.",
)
@preprocess_option
@click.option(
    "--calib-method",
    metavar="METHOD",
    help="Where ranges are cut off: mse, min-max, percentile=99.99, …; see docs/calibration.md.",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=FILE,
    metavar="FILE",
    help="A TOML file: bits per node, options of passes, see docs/recipes.md; or a bundle, to use "
    "the recipe that it was made by.",
)
@click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help="Do not quantize these nodes: a name, an op type or a pattern (re:… too); may repeat.",
)
@click.option("--group-size", type=int, metavar="N", help="Weights per scale, for int4.")
@click.option(
    "--rounding",
    metavar="METHOD",
    help="How weights are rounded: nearest, hqq, awq, gptq, awq_gptq; see docs/weights.md.",
)
@click.option(
    "--zero-points",
    metavar="none|integer|float",
    help="What groups of int4 weights have beside a scale; see docs/weights.md.",
)
@click.option(
    "--float",
    "float_type",
    metavar="fp16|fp32",
    help="What is not quantized computes in; fp16 on CUDA, else fp32, if not given.",
)
@click.option(
    "--shapes",
    type=ShapesType(),
    metavar="NAME=1x128,…",
    help="Shapes of inputs that matter, to choose kernels by.",
)
@click.option(
    "--no-timing",
    "untimed",
    is_flag=True,
    help="Choose kernels by a cost model, not by timing them here.",
)
@click.option(
    "--choices",
    type=FILE,
    metavar="BUNDLE",
    help="Choose the kernels that this bundle or manifest chose.",
)
@click.option(
    "--emit",
    metavar="bundle|ort",
    default="bundle",
    help="What to write: a bundle, or an ONNX file with ONNX Runtime's own MatMulNBits for int4.",
)
@click.option("--strict", is_flag=True, help="Fail if a node that could be fast is not.")
@quiet_option
@debugging_options
@json_option
@verbose_option
@click.pass_obj
def compile_command(
    terminal: Terminal, model: Path, target: str, output: Path | None, calib: Path | None,
    preprocess: str | None, calib_method: str | None, recipe_file: Path | None,
    keep_float: tuple[str, ...], group_size: int | None, rounding: str | None,
    zero_points: str | None,
    float_type: str | None, shapes: Shapes | None, untimed: bool, choices: Path | None, emit: str,
    strict: bool, quiet: bool, debugging: Debugging, as_json: bool,
) -> None:  # fmt: skip
    """Compile a model into a bundle."""
    with (
        debugging.watching(terminal, quiet or as_json) as watchers,
        terminal.progress(shown=not (quiet or as_json)) as progress,
    ):
        # Imported here, so that the progress covers it.
        import qcompiler
        from qcompiler.installed import check_onnxruntime

        check_onnxruntime()
        recipe = _recipe(
            recipe_file, keep_float, group_size, calib_method, rounding, zero_points, float_type
        )
        if calib is None and not (preprocess is None and calib_method is None):
            raise click.UsageError("--preprocess and --calib-method are about samples: add --calib")
        samples = None if calib is None else samples_of(calib, preprocess)
        report = qcompiler.compile(
            model, target, output, recipe=recipe, calibration=samples,
            pipeline=debugging.pipeline, strict=strict, timing=not untimed, shapes=shapes,
            choices=choices, progress=progress, stop_after=debugging.stage, emit=emit,
            watchers=watchers.all,
        )  # fmt: skip
    if as_json:
        terminal.json(report.to_dict() | watchers.to_dict())
        return
    if emit == "ort":
        print_emitted(terminal, report, quiet)
    elif debugging.stop is not None:
        print_stopped(terminal, debugging.stop, report, quiet)
    else:
        print_report(terminal, model, report, quiet)


def _recipe(
    file: Path | None, keep_float: tuple[str, ...], group_size: int | None, method: str | None,
    rounding: str | None, zero_points: str | None, float_type: str | None,
) -> Recipe:  # fmt: skip
    """The recipe of the file, with the options on top."""
    from qcompiler.recipe import Recipe

    recipe = Recipe() if file is None else Recipe.read(file)
    return dataclasses.replace(
        recipe,
        keep_float=(*recipe.keep_float, *keep_float),
        group_size=recipe.group_size if group_size is None else group_size,
        calibration=recipe.calibration if method is None else method,
        rounding=recipe.rounding if rounding is None else rounding,
        zero_points=recipe.zero_points if zero_points is None else zero_points,
        float=recipe.float if float_type is None else float_type,
    )
