"""The examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_torch_export():
    pytest.importorskip("torch", reason="torch is not installed")
    command = [sys.executable, str(EXAMPLES / "torch_export.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"(\d+) rows: .* ([\d.]+) dB", printed)
    assert [int(rows) for rows, _ in found] == [1, 7, 128]
    assert all(float(noise) > 30 for _, noise in found)
