"""Running `qcompile` inside a test."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from qcompiler.cli.app import application

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
MODEL, CALIB, TEST = (str(DIGITS / name) for name in ("digits.onnx", "calib", "test"))
ARM = ("--target", "arm-int8", "--keep-float", "Conv")
"""A target without kernels compiles in a tenth of a second."""


def qcompile(*args: object) -> Result:
    """The outcome of one command line."""
    return CliRunner().invoke(application, [str(arg) for arg in args])


def fails(code: int, message: str, *args: object) -> None:
    """The command ends with that code and one line of error, without a traceback."""
    result = qcompile(*args)
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert message in errors[0]
    assert "Traceback" not in result.output
    assert not result.stdout
