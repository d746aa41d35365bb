"""ResNet50 of Keras, rebuilt in torch from the weights of a TensorFlow.js package (ISC)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS = {2: "abc", 3: "abcd", 4: "abcdef", 5: "abc"}
EPSILON = 1e-3
"""Of Keras's batch normalizations in this network."""


def export_resnet50(folder: Path, output: Path) -> None:
    """Write the network as ONNX: x [N, 3, 224, 224] to logits [N, 1000].

    Args:
        folder: Holds model.json and the shards of its weights.
        output: The ONNX file.
    """
    import torch

    network = torch_network(folder)
    axes = {"x": {0: "N"}, "logits": {0: "N"}}
    torch.onnx.export(
        network, (torch.zeros(1, 3, 224, 224),), str(output), dynamo=False, opset_version=17,
        input_names=["x"], output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip


def torch_network(folder: Path) -> Any:
    """The network as a torch module, from a folder as above."""
    return _network(_read_weights(folder)).eval()


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    weights = {}
    for group in json.loads((folder / "model.json").read_text())["weightsManifest"]:
        content, start = b"".join((folder / name).read_bytes() for name in group["paths"]), 0
        for entry in group["weights"]:
            assert entry["dtype"] == "float32"
            count = int(np.prod(entry["shape"]))
            flat = np.frombuffer(content, np.float32, count, start)
            weights[entry["name"]] = flat.reshape(entry["shape"]).copy()
            start += flat.nbytes
    return weights


def _convolution(
    weights: dict[str, np.ndarray], layer: str, norm: str, stride: int = 1, pad: int = 0
) -> Any:
    """A convolution and the norm after it."""
    import torch
    from torch import nn

    kernel = torch.from_numpy(weights[f"{layer}/kernel"].transpose(3, 2, 0, 1).copy())
    made = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride, pad)
    scaled = nn.BatchNorm2d(kernel.shape[0], eps=EPSILON)
    given = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
             "running_var": "moving_variance"}  # fmt: skip
    state = {ours: torch.from_numpy(weights[f"{norm}/{name}"]) for ours, name in given.items()}
    scaled.load_state_dict(state, strict=False)
    made.load_state_dict({"weight": kernel, "bias": torch.from_numpy(weights[f"{layer}/bias"])})
    return nn.Sequential(made, scaled)


def _network(weights: dict[str, np.ndarray]) -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        """Three convolutions and a shortcut, which has one of its own in the first of a stage."""

        def __init__(self, stage: int, letter: str) -> None:
            super().__init__()
            stride = 2 if letter == "a" and stage > 2 else 1

            def branch(name: str, stride: int = 1, pad: int = 0) -> Any:
                place = f"{stage}{letter}_branch{name}"
                return _convolution(weights, f"res{place}", f"bn{place}", stride, pad)

            self.main = nn.Sequential(
                branch("2a", stride), nn.ReLU(), branch("2b", pad=1), nn.ReLU(), branch("2c")
            )
            self.shortcut = branch("1", stride) if letter == "a" else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.main(x) + self.shortcut(x))

    blocks = [Block(stage, letter) for stage, letters in BLOCKS.items() for letter in letters]
    last = nn.Linear(2048, 1000)
    last.load_state_dict({
        "weight": torch.from_numpy(weights["fc1000/kernel"].T.copy()),
        "bias": torch.from_numpy(weights["fc1000/bias"]),
    })  # fmt: skip
    return nn.Sequential(
        _convolution(weights, "conv1", "bn_conv1", 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), last,
    )  # fmt: skip
