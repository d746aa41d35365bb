"""Train the digits example and export it: `python examples/digits/train.py`.

Writes `digits.onnx` and the samples of `draw.py`, then prints the test accuracy of the exported
file in onnxruntime. Every epoch draws new images, so the model has seen none of them twice.

Seeds and one thread make a run repeat itself bit by bit on one machine. On another one (other
vector width, other torch or BLAS) sums round differently: expect other bits in the weights and an
accuracy a few tenths of a percent away.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from draw import SEEDS, SIDE, draw_digits, write_samples
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DigitNet", "accuracy", "export", "train"]

PATCH = 4
TOKENS = (SIDE // PATCH) ** 2
WIDTH = 64
HEADS = 4
HIDDEN = 256
BLOCKS = 2
BATCH = 128
PEAK_RATE = 2e-3
OPSET = 20  # the first opset with Gelu: one node, where opset 18 spells it out in five


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017) over [batch, tokens, width].

    Query, key and value have a linear layer each, as in most exported models. Written with plain
    matrix products: a fused attention operator would hide them from the quantizer.
    """

    def __init__(self) -> None:
        """Make the four linear layers."""
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens; same shape out."""
        # -1 for the batch keeps every Reshape's target a constant in the exported graph.
        query, key, value = (
            layer(x).reshape(-1, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        mixed = scores.softmax(dim=-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(-1, TOKENS, WIDTH))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP with GELU, each with its residual."""

    def __init__(self) -> None:
        """Make the two halves."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, width] to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class DigitNet(nn.Module):
    """A small vision transformer (Dosovitskiy et al., 2021): [batch, 1, 20, 20] to [batch, 10]."""

    def __init__(self) -> None:
        """Make the patch embedding, the blocks and the head."""
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.2 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = self.patches(image).reshape(-1, WIDTH, TOKENS).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def train(epochs: int, images: int) -> DigitNet:
    """Train for `epochs` epochs of `images` new images each, on one thread.

    Args:
        epochs: Number of epochs; the learning rate's one cycle spans them all.
        images: Images per epoch.

    Returns:
        The trained model, in evaluation mode.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = DigitNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    steps = epochs * (images // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    check_images, check_labels = draw_digits(2000, SEEDS["validation"])
    began = time.perf_counter()
    for epoch in range(epochs):
        # Labels come in random order, so a batch is simply the next 128 images.
        drawn, labels = (torch.from_numpy(a) for a in draw_digits(images, SEEDS["train"], epoch))
        total = 0.0
        for at in range(0, images - BATCH + 1, BATCH):
            rows = slice(at, at + BATCH)
            loss = functional.cross_entropy(model(drawn[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        with torch.no_grad():
            guess = model(torch.from_numpy(check_images)).argmax(dim=1).numpy()
        print(
            f"epoch {epoch + 1:2d}/{epochs}  loss {total / (images // BATCH):.4f}"
            f"  validation {100 * np.mean(guess == check_labels):.2f} %"
            f"  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return model.eval()


def export(model: DigitNet, path: Path) -> None:
    """Write `model` to `path`: one ONNX file, input `image`, output `logits`, any batch size."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, SIDE, SIDE),),  # a batch of one would be frozen into the graph
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: "batch"}},
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    # The exporter notes in every node where it came from: Python stack traces, with the paths of
    # this machine, at five times the size of the graph itself (62 kB, without weights 12 kB).
    del proto.graph.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
    for part in (*proto.graph.value_info, *proto.graph.initializer):
        del part.metadata_props[:]
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def accuracy(path: Path, samples: Path) -> float:
    """Return the share of the images in `samples/*.npz` that the model at `path` gets right."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    right = []
    for file in sorted(samples.glob("*.npz")):
        with np.load(file) as batch:
            (logits,) = session.run(["logits"], {"image": batch["image"]})
            right.append(logits.argmax(axis=1) == batch["label"])
    return float(np.concatenate(right).mean())


def main() -> None:
    """Train, export, write the samples, and print the accuracy of the exported file."""
    parser = argparse.ArgumentParser(description="Train and export the digits example.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=50_000, help="new images per epoch")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args.epochs, args.images)
    path = args.out / "digits.onnx"
    export(model, path)
    write_samples(args.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{path}: {count:,} parameters, {path.stat().st_size / 1000:.0f} kB")
    print(f"FP32 test accuracy in onnxruntime: {100 * accuracy(path, args.out / 'test'):.2f} %")


if __name__ == "__main__":
    main()
