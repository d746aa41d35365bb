"""`qcompile take-weights`: weights that GPTQ or AWQ rounded elsewhere, put into an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich_click as click

from qcompiler.cli.console import Terminal
from qcompiler.cli.options import FILE, Command, json_option, verbose_option

__all__ = ["take_weights_command"]


@click.command("take-weights", cls=Command)
@click.argument("model", type=FILE, metavar="MODEL.onnx")
@click.argument("checkpoint", type=FILE, metavar="CHECKPOINT")
@click.argument("output", type=FILE, metavar="OUT.onnx")
@click.option(
    "--name", "names", multiple=True, metavar="LAYER=NODE",
    help="The MatMul, or its weight, that a layer of the checkpoint is; repeatable.",
)  # fmt: skip
@click.option(
    "--zeros", type=click.Choice(["less-one", "plain"]),
    help="How GPTQ's zero points are stored; by default as the checkpoint's configuration says.",
)  # fmt: skip
@json_option
@verbose_option
@click.pass_obj
def take_weights_command(
    terminal: Terminal, model: Path, checkpoint: Path, output: Path, names: tuple[str, ...],
    zeros: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Put the weights of a GPTQ or AWQ checkpoint into the float model that it was made from.

    CHECKPOINT is a .safetensors file, or the folder of one.  OUT.onnx then compiles like any
    quantized model, or runs in ONNX Runtime as it is.
    """
    from qcompiler.destination import check_file, real_path
    from qcompiler.frontend import load_model
    from qcompiler.model_file import save_model
    from qcompiler.quantized_checkpoint import take_over_weights

    output = check_file(real_path(output), model)
    given = _names(names)
    loaded = load_model(model)
    less_one = None if zeros is None else zeros == "less-one"
    layers = take_over_weights(loaded, checkpoint, given, zeros_less_one=less_one)
    save_model(loaded, output)
    if as_json:
        terminal.json({"output": str(output), "layers": layers})
        return
    terminal.out.print(f"{len(layers)} layers of {checkpoint}\nWritten to {output}")


def _names(words: Sequence[str]) -> dict[str, str]:
    """Nodes by layer.

    Raises:
        UsageError: A word without a layer or a node, or a layer twice.
    """
    given: dict[str, str] = {}
    for word in words:
        layer, _, node = word.partition("=")
        if not layer or not node:
            raise click.UsageError(f"--name {word!r} is not LAYER=NODE")
        if layer in given:
            raise click.UsageError(f"--name: the layer {layer!r} is given twice")
        given[layer] = node
    return given
