"""MiniLM and ResNet50 as torch quantizes them, saved as .pt2: what `imported.py --quantized` takes.

    pip install torch transformers torchao
    python benchmarks/torch_models.py --data DIR --output DIR

PT2E, static by channel, with the quantizer for x86 and samples of DIR/minilm and DIR/resnet50 to
calibrate on.  Of MiniLM also PT2E with dynamic scales, and torchao's `quantize_`: int8 tokens and
weights, int8 weights alone, weights of 4 bits in groups of 32; none of these does convolutions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import models
import numpy as np


def pt2e(dynamic: bool) -> Callable[[Any, Any, Any, Iterable[Any]], Any]:
    def quantize(module: Any, example: Any, shapes: Any, samples: Iterable[Any]) -> Any:
        import torch
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        program = torch.export.export(module, example, dynamic_shapes=shapes)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
        prepared = prepare_pt2e(program.module(), quantizer)
        for sample in samples:
            prepared(*sample)
        return convert_pt2e(prepared)

    return quantize


def torchao(config: str, **options: Any) -> Callable[[Any, Any, Any, Iterable[Any]], Any]:
    def quantize(module: Any, example: Any, shapes: Any, samples: Iterable[Any]) -> Any:
        import torch
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        if "group" in options:
            given = {"weight_dtype": torch.int4, "granularity": PerGroup(options["group"])}
        else:
            given = options
        quantization.quantize_(module, getattr(quantization, config)(**given))
        return module

    return quantize


WAYS: dict[str, Callable[[Any, Any, Any, Iterable[Any]], Any]] = {
    "pt2e-static": pt2e(dynamic=False),
    "pt2e-dynamic": pt2e(dynamic=True),
    "torchao-int8": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int8-weights": torchao("Int8WeightOnlyConfig"),
    "torchao-int4-weights": torchao("IntxWeightOnlyConfig", group=32),
}


def minilm() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A module, example inputs and dynamic shapes by input."""
    return models.torch_minilm()


def resnet50() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A module, example inputs and dynamic shapes by input."""
    import torch

    class Named(torch.nn.Module):
        """A Sequential calls its input what the model's samples do not."""

        def __init__(self) -> None:
            super().__init__()
            self.network = models.torch_resnet50()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)  # type: ignore[no-any-return]

    shapes = {"x": {0: torch.export.Dim("N", max=64)}}
    return Named().eval(), (torch.zeros(2, 3, 224, 224),), shapes


MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "minilm": (minilm, tuple(WAYS)),
    "resnet50": (resnet50, ("pt2e-static",)),
}
"""What makes each, and the ways that do something to it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of samples per model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    for name in arguments.models:
        make, ways = MODELS[name]
        for way in (way for way in ways if way in arguments.ways):
            path = arguments.output / f"{name}-{way}.pt2"
            try:
                save(path, WAYS[way], make(), arguments.data / name)
                print(path, flush=True)
            except Exception as error:
                # What a tool cannot do to a model is its own affair.
                said = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"{path.stem}: not made: {said}", flush=True)


def save(path: Path, quantize: Callable[..., Any], model: tuple[Any, Any, Any], data: Path) -> None:
    """Quantize a module on the samples in a folder, export it, and write that."""
    import torch

    module, example, shapes = model
    files = [np.load(file) for file in sorted(data.glob("*.npz"))]
    samples = [[torch.from_numpy(file[name]) for name in shapes] for file in files]
    quantized = quantize(module, example, shapes, samples)
    program = torch.export.export(quantized, example, dynamic_shapes=shapes)
    # Weights of torchao's own kinds would lie in the file as pickles, which are refused.
    torch.export.save(program.run_decompositions({}), str(path))


if __name__ == "__main__":
    main()
