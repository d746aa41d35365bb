"""MiniLM as torch quantizes it, saved as .pt2 files: what `imported.py --quantized` takes.

    pip install torch transformers torchao
    python benchmarks/torch_models.py --data DIR --output DIR

PT2E, static by channel, with the quantizer for x86 and samples of DIR/minilm to calibrate on; PT2E
with dynamic scales; and torchao's `quantize_`: int8 tokens and weights, int8 weights alone, weights
of 4 bits in groups of 32.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="has a folder minilm of samples")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    import torch

    files = [np.load(file) for file in sorted((arguments.data / "minilm").glob("*.npz"))]
    for way in arguments.ways:
        module, example, shapes = models.torch_minilm()
        samples = [[torch.from_numpy(file[name]) for name in shapes] for file in files]
        path = arguments.output / f"minilm-{way}.pt2"
        try:
            quantized = WAYS[way](module, example, shapes, samples)
            program = torch.export.export(quantized, example, dynamic_shapes=shapes)
            # Weights of torchao's own kinds would lie in the file as pickles, which are refused.
            torch.export.save(program.run_decompositions({}), str(path))
            print(path)
        except Exception as error:
            # What a tool cannot do to a model is its own affair.
            print(f"{path.stem}: not made: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
