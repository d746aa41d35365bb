"""What is installed is what is in the folders, whichever way it is installed."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
HOMES = {"qcompiler": "qcompiler", **{f"qcompiler.{n}": n for n in ("ir", "passes", "targets")}}


def packages_on_disk() -> set[str]:
    found = set()
    for package, folder in HOMES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if package == "qcompiler" and parts and parts[0] in ("ir", "passes", "targets"):
                continue  # the links
            found.add(".".join([package, *parts]))
    return found


def sources() -> set[str]:
    """Files of the installed package, as paths inside it."""
    names = set()
    for package, folder in HOMES.items():
        prefix = Path(*package.split("."))
        for file in (ROOT / folder).rglob("*"):
            inside = file.relative_to(ROOT / folder)
            linked = package == "qcompiler" and inside.parts[0] in ("ir", "passes", "targets")
            if file.suffix in (".py", ".c", ".h", ".typed") and not linked:
                names.add((prefix / inside).as_posix())
    return names


def test_the_package_list_is_complete():
    assert set(SETUPTOOLS["packages"]) == packages_on_disk()
    assert SETUPTOOLS["package-dir"] == HOMES


@pytest.mark.parametrize("name", ["ir", "passes", "targets"])
def test_links_lead_to_the_root_folders(name):
    link = ROOT / "qcompiler" / name
    if not link.is_symlink():
        pytest.skip("this checkout has no symlinks")
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout: setuptools leaves a build folder and would use it again."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    return copy


def build(kind: str, checkout: Path, folder: Path) -> Path:
    """A wheel or a source archive."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    script = (
        "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])"
        "(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, f"build_{kind}", str(folder)]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder / result.stdout.strip().splitlines()[-1]


def test_a_wheel_has_every_source_and_nothing_else(checkout, tmp_path):
    with zipfile.ZipFile(build("wheel", checkout, tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources()


def test_a_source_archive_has_what_a_wheel_needs(checkout, tmp_path):
    with tarfile.open(build("sdist", checkout, tmp_path)) as archive:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    flat = {name.removeprefix("qcompiler/") for name in sources()}
    at_home = {n if (ROOT / n).exists() else f"qcompiler/{n}" for n in flat}
    assert at_home <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_wheel_from_a_checkout_without_links(checkout, tmp_path):
    """Where symlinks are not supported, git writes a file that holds the link's target."""
    bare = tmp_path / "bare"
    shutil.copytree(checkout, bare, symlinks=True)
    for name in ("ir", "passes", "targets"):
        (bare / "qcompiler" / name).unlink()
        (bare / "qcompiler" / name).write_text(f"../{name}")
    with zipfile.ZipFile(build("wheel", bare, tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources()
