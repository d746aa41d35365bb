"""Temporary folders, and what killed processes left."""

import subprocess
import sys
import tempfile

import pytest

from qcompiler.held_folder import HeldFolder

KILLED = """
import os, signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from qcompiler.held_folder import HeldFolder
folder = HeldFolder("walk-")
(folder.path / "rows").write_text("of a sample")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "walk-of-somebody").mkdir()
    held = HeldFolder("walk-")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 3
    other = HeldFolder("walk-")
    assert set(tmp_path.iterdir()) == {tmp_path / "walk-of-somebody", held.path, other.path}
    held.remove()
    other.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["walk-of-somebody"]
