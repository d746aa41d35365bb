"""Compile a language model to int4 with GPTQ, calibrated with a text.

    python examples/language_model.py model.onnx text.txt [tokenizer.json]

The model takes input_ids [1, tokens], and attention_mask too if it has one.  Without the file of a
tokenizer (which wants `pip install tokenizers`) the bytes of the text are its tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir

import qcompiler
from qcompiler.token_windows import TokenWindows


def main(model: str, text: str, tokenizer: str | None = None) -> None:
    """Round the weights on windows of the text, and print how well that went."""
    inputs = [value.name for value in ir.load(model).graph.inputs]
    windows = TokenWindows(
        tokens_of(Path(text).read_text(encoding="utf-8"), tokenizer),
        length=512,
        count=32,
        mask="attention_mask" if "attention_mask" in inputs else None,
    )
    report = qcompiler.compile(
        model,
        "x86-int4",
        recipe=qcompiler.Recipe(group_size=128, rounding="gptq"),
        calibration=windows,
        progress=lambda label, done, total: print(f"{done:6.2f} of {total}  {label}"),
    )
    for decision in report.decisions:
        if "gptq" in decision.why:
            print(f"{decision.node}: {decision.why}")
    print(f"written to {report.bundle}")


def tokens_of(text: str, tokenizer: str | None) -> list[int]:
    """The text as numbers."""
    if tokenizer is None:
        return list(text.encode())
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(tokenizer)
    made.no_truncation()  # its file may say that a text ends after 128 tokens, or is filled up
    made.no_padding()
    return list(made.encode(text).ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
