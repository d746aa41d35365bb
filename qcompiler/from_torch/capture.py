"""A module and example inputs as an exported program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from qcompiler.ir.errors import ModelError, OptionError

__all__ = ["capture"]


def capture(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None,
    dynamic_shapes: Any,
) -> torch.export.ExportedProgram:
    """Trace a module by `torch.export.export`.

    Args:
        module: A `torch.fx.GraphModule`, or any module in eval mode.
        example_inputs: Its positional arguments, or its keyword arguments as a mapping.
        dynamic_shapes: Which dimensions vary; all others become those of the example.

    Raises:
        ModelError: torch cannot trace the module, or not with these inputs and shapes.
        OptionError: The inputs are no tuple or mapping.
    """
    _check(module, example_inputs)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    if isinstance(example_inputs, Mapping):
        # In the order of the signature: torch.export mistakes any other for it.
        order = [*inspect.signature(module.forward).parameters, *example_inputs]
        kwargs = {key: example_inputs[key] for key in order if key in example_inputs}
    else:
        args = tuple(example_inputs or ())
    try:
        with torch.no_grad():
            return torch.export.export(
                module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        # Tracing runs the module: what it raises may be of any type.
        message = f"torch.export cannot trace this {type(module).__name__}: {_reason(error)}"
        raise ModelError(message) from error


def _check(module: object, example_inputs: object) -> None:
    """That there is a module to trace, and something to trace it by."""
    name = type(module).__name__
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"cannot read a {name}: give a torch.export.ExportedProgram, or a module with "
            "example_inputs"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"cannot read a {name}: TorchScript holds no program that can be exported; give the "
            "module it was made of, with example_inputs"
        )
    packed = next((part for part in module.modules() if _is_packed(part)), None)
    if packed is not None:
        raise ModelError(
            f"this {name} holds a {type(packed).__name__} of {type(packed).__module__}, which "
            "packs its weights for torch's own kernels: give the module as it was, or quantize it "
            "by torchao (PT2E or quantize_)"
        )
    if example_inputs is None:
        raise OptionError(
            f"a {name} needs example_inputs, a tuple of its arguments, to be traced by; "
            "dynamic_shapes says which of their dimensions vary"
        )
    if not isinstance(example_inputs, tuple | list | Mapping):
        raise OptionError(
            f"example_inputs is a {type(example_inputs).__name__}: give a tuple of the module's "
            "arguments, (x,), or a mapping of its keyword arguments"
        )
    if module.training and not isinstance(module, torch.fx.GraphModule):
        raise ModelError(f"this {name} is in training mode; call its eval() before compiling it")


def _is_packed(module: torch.nn.Module) -> bool:
    """Whether eager-mode quantization made it, such as `quantize_dynamic`."""
    return ".quantized." in type(module).__module__ and hasattr(module, "_packed_params")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return (
        f"{first} (try torch.export.export(module, args, strict=True) or draft_export, which say "
        "where, and give the program)"
    )
