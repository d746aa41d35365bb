"""Runs another benchmark with ONNX Runtime and our kernels held to AVX2 on a processor with more.

    python benchmarks/held_to_avx2.py benchmarks/minilm.py --seconds 4

ONNX Runtime takes what the instruction cpuid says, and no setting changes that.  So a copy of the
package gets an undefined instruction in each such place, and a signal handler answers it with what
the processor says less AVX-512, VNNI and all that came later.  Our kernels are held by
`QCOMPILER_ISA`.  Other peers are not held: leave them out.  Wants objdump, and Linux on x86-64.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qcompiler.targets.toolchain import find_linker

_CPUID, _UD2 = b"\x0f\xa2", b"\x0f\x0b"

_SITE = """import atexit, ctypes, os
held = ctypes.CDLL({handler!r})
say = lambda: os.write(2, b"cpuid was answered %d times\\n" % held.held_answers())
atexit.register(say)
"""


def build_handler(path: Path) -> None:
    """The library whose loading installs the handler."""
    linker = find_linker()
    source = Path(__file__).with_suffix(".c").read_text()
    path.write_bytes(
        linker.link([linker.compile(source, {}, ["-fvisibility=default"])], ["held_answers"])
    )


def hold(library: Path) -> int:
    """Replaces cpuid in a shared library, and returns how often."""
    content, places = bytearray(library.read_bytes()), 0
    listing, sections = _objdump("-dw", library), _sections(library)
    for line in re.finditer(r"^ *([0-9a-f]+):\s+0f a2 \s*cpuid", listing, re.MULTILINE):
        offset = _file_offset(sections, int(line[1], 16))
        if content[offset : offset + 2] != _CPUID:
            raise SystemExit(f"{library} has no cpuid at {line[1]}, where objdump shows it")
        content[offset : offset + 2] = _UD2
        places += 1
    library.write_bytes(content)
    return places


def _file_offset(sections: list[tuple[int, int, int]], address: int) -> int:
    return next(
        address - start + offset
        for start, size, offset in sections
        if start <= address < start + size
    )


def _sections(library: Path) -> list[tuple[int, int, int]]:
    """The address, size and file offset of each."""
    table = _objdump("-hw", library)
    rows = re.findall(r"^ *\d+ \S+ +(\w+) +(\w+) +\w+ +(\w+)", table, re.MULTILINE)
    return [(int(start, 16), int(size, 16), int(offset, 16)) for size, start, offset in rows]


def _objdump(option: str, library: Path) -> str:
    if shutil.which("objdump") is None:
        raise SystemExit("objdump is not installed; binutils has it")
    command = ["objdump", option, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Command line."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        raise SystemExit(__doc__)
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("onnxruntime is not installed")
    with tempfile.TemporaryDirectory() as folder:
        package, handler = Path(folder, "onnxruntime"), Path(folder, "held.so")
        shutil.copytree(Path(spec.origin).parent, package)
        libraries = sorted(package.glob("capi/onnxruntime_pybind11_state*.so"))
        places = sum(hold(library) for library in libraries)
        if not places:
            raise SystemExit(f"no cpuid was found in {spec.origin}: ONNX Runtime would not be held")
        print(f"{places} cpuid in {', '.join(library.name for library in libraries)}")
        build_handler(handler)
        Path(folder, "sitecustomize.py").write_text(_SITE.format(handler=str(handler)))
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        held = {"PYTHONPATH": os.pathsep.join(paths), "QCOMPILER_ISA": "avx2"}
        raise SystemExit(
            subprocess.run([sys.executable, *sys.argv[1:]], env=os.environ | held).returncode
        )


if __name__ == "__main__":
    main()
