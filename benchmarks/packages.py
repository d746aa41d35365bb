"""Packages of public registries, unpacked, not installed, and kept in a cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(
    os.environ.get("QCOMPILER_BENCHMARK_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler-benchmarks"
)


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


def npm_package(requirement: str) -> Path:
    """The unpacked npm package `NAME@VERSION`."""
    folder = CACHE / requirement.replace("@", "-")
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        subprocess.run(["npm", "pack", "--silent", requirement], cwd=scratch, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        (file,) = Path(scratch).glob("*.tgz")
        shutil.unpack_archive(file, Path(scratch) / "part", format="gztar", filter="data")
        shutil.move(Path(scratch) / "part" / "package", folder)
    return folder
