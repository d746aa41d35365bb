"""What a target is: an architecture and a quantization scheme, as data."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

__all__ = ["Scheme", "Target"]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Which numbers a target multiplies.

    Attributes:
        name: "int8", "int4" or "fp8".
        weight: Storage of MatMul weights.
        activation: Storage of MatMul activations, per token and dynamic; None leaves them float.
        group_sizes: Elements along K that share a weight scale, in order of preference; empty for
            one scale per output channel.
        zero_points: Of groups: "none", "integer" or "float".
        conv_weight: Storage of convolution weights; None keeps convolutions float.
        conv_activation: Storage of convolution activations, per tensor and static.
        images: Whether integer convolutions are kernels of ours: of two dimensions and one group,
            with results that stay float.
        no_conv: Why convolutions are kept float, unless a recipe asks for one.
    """

    name: str
    weight: ir.DataType
    activation: ir.DataType | None
    group_sizes: tuple[int, ...] = ()
    zero_points: str = "none"
    conv_weight: ir.DataType | None = ir.DataType.INT8
    conv_activation: ir.DataType = ir.DataType.UINT8
    images: bool = False
    no_conv: str = ""


@dataclasses.dataclass(frozen=True)
class Target:
    """A name a user can ask for.

    Attributes:
        name: `<arch>-<scheme>`.
        arch: "x86", "arm" or "cuda".
        scheme: The numbers.
        isa: Variants a bundle may carry, best first; what is built today is in the library.
        provider: The ONNX Runtime execution provider its kernels run in.
        machine: The operating system and processor a native library would be linked for.
        float_type: What the part of a model that is not quantized computes in: "fp16" or "fp32".
    """

    name: str
    arch: str
    scheme: Scheme
    isa: tuple[str, ...]
    provider: str
    machine: str
    float_type: str = "fp32"
