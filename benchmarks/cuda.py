"""The kernels on a GPU: are they right, and how fast: python benchmarks/cuda.py [--json FILE].

One command; `docs/cuda.md` says how to run it where a GPU is lent for minutes.  In this order:

1. `numbers` against float64, on random data that is new each time (`--seed` repeats a run), for
   rows around every border between kernels;
2. `times` of products beside floors (bytes at the bandwidth of a copy measured here);
3. `checkers`: memcheck of compute-sanitizer on the small numbers, where it is installed;
4. `peers`, as far as they are installed: cuBLAS(Lt) for fp16, int8 and fp8 and torch's int4 product
   through torch, MatMulNBits of ONNX Runtime's CUDA provider;
5. `convolutions`: times of theirs;
6. `models` in ONNX Runtime's CUDA provider, beside its float16 and its MatMulNBits;
7. `races`: the other checkers, of races, barriers and memory that was never written.

Each part runs in a process of its own, with a share of the time (`--minutes`), and its results are
in the file as soon as they are known: what one kernel breaks is lost to no other.  A kernel whose
numbers are wrong is not timed.  Weights rotate, more than any cache holds, and calls are replayed
as a CUDA graph, ours and peers'.  Needs a GPU of compute capability 8.0 to 9.0, its driver, and
either nvcc or the extra [nvrtc] with TVM, or all compiled beforehand (`--prepare`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cuda_bench import Bench
from cuda_checkers import TOOLS, check_with
from cuda_convs import TOLERANCE, convs_to_check
from cuda_cubins import Compiled, Cubins, Packed, PackError, prepare
from cuda_device import CudaError, Device
from cuda_models import model_tasks, prepare_models
from cuda_numbers import EIGHT_BIT, eight_bit, regions_to_check, w4
from cuda_peers import EIGHT_BIT_SIZES, W4_ROWS, W4_SHAPES, peer_tasks
from cuda_tasks import Found, Task, be_child, run_apart
from cuda_wanted import lines_of, wanted

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cubin import find_cubin_compiler

SHARES = {"numbers": 0.2, "times": 0.2, "checkers": 0.15, "peers": 0.15, "convolutions": 0.1,
          "models": 0.15, "races": 1.0}  # fmt: skip
"""The parts in order, and how much of the time each may take; the last gets what is left."""
CUBINS, MODELS = "cubins.zip", "models"
"""In a prepared folder."""


def timed_products() -> list[tuple[Region, tuple[int, ...]]]:
    """With the numbers of rows."""
    found: list[tuple[Region, tuple[int, ...]]] = [(w4(k, n), W4_ROWS) for k, n in W4_SHAPES]
    return found + [
        (eight_bit(a, size, size), (size,)) for size in EIGHT_BIT_SIZES for a in EIGHT_BIT
    ]


def all_regions() -> list[Region]:
    """Those that any part needs."""
    convs = [conv for conv, _ in convs_to_check(small=False)]
    found = [*regions_to_check(small=True), *(region for region, _ in timed_products())]
    return found + [region for conv in convs for region in (conv.image, conv.region)]


class Parts:
    """The tasks of each part; the device is opened by the first that needs it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    @functools.cached_property
    def bench(self) -> Bench:
        """What the tasks use."""
        options = self._options
        device, arch = open_device(options.driver)
        return Bench(device, arch, cubins_of(options), options.seed)

    def tasks(self, part: str) -> list[Task]:
        """Those of one part."""
        tasks: list[Task] = getattr(self, f"_{part}")()
        return tasks

    def _numbers(self) -> list[Task]:
        convs = convs_to_check(small=True)
        found: list[Task] = [
            (region.name, lambda region=region: self._if_able(region, self.bench.check))
            for region in regions_to_check(small=True)
        ]
        return found + [
            (conv.region.name, lambda each=(conv, shape): self.bench.check_conv(*each))
            for conv, shape in convs
        ]

    def _if_able(self, region: Region, run: Callable[[Region], Any]) -> Any:
        return run(region) if self.bench.arch in cuda.archs_of(region) else []

    def _times(self) -> list[Task]:
        copy: Task = ("copy", lambda: [{"copy_bytes_per_second": self.bench.bandwidth}])
        return [copy, *(
            (region.name, lambda region=region, rows=rows: self._if_able(
                region, lambda region: self.bench.times(region, rows)))
            for region, rows in timed_products()
        )]  # fmt: skip

    def _convolutions(self) -> list[Task]:
        return [
            (conv.region.name, lambda each=(conv, shape): [self.bench.time_conv(*each)])
            for conv, shape in convs_to_check(small=False)
        ]

    def _peers(self) -> list[Task]:
        return peer_tasks()

    @functools.cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    def _models(self) -> list[Task]:
        prepared = self._options.prepared and self._options.prepared / MODELS
        has_some = prepared is not None and prepared.is_dir()
        return model_tasks(lambda: prepared if has_some else Path(self._scratch.name))

    def _checkers(self) -> list[Task]:
        return self._tools(TOOLS[:1])

    def _races(self) -> list[Task]:
        return self._tools(TOOLS[1:])

    def _tools(self, tools: tuple[str, ...]) -> list[Task]:
        command = [*child_command(self._options, "numbers"), "0"]
        return [
            (tool, lambda tool=tool, left=left: check_with(
                tool, command, self._seconds_for_each(left)))
            for tool, left in zip(tools, range(len(tools), 0, -1), strict=True)
        ]  # fmt: skip

    def _seconds_for_each(self, left: int) -> float:
        """Of so many tools, so that each is done, or stopped, before this process is."""
        return max(1.0, (self._options.until - time.time()) / left - 3)


def child_command(options: argparse.Namespace, part: str, end: float = 0.0) -> list[str]:
    """Starts a child that ends at `end` of the clock; it lacks the number of its first task."""
    command = [sys.executable, str(Path(__file__).resolve()), "--seed", str(options.seed)]
    command += ["--driver", options.driver]
    command += ["--prepared", str(options.prepared)] if options.prepared else []
    return [*command, "--until", str(end), "--part", part, "--first"]


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"python": sys.version.split()[0]}
    for name in ("apache-tvm", "torch", "onnxruntime-gpu", "onnxruntime", "torchao", "qcompiler"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def open_device(driver: str) -> tuple[Device, str]:
    """The GPU, and the architecture whose kernels it runs; exits where there is none."""
    try:
        device = Device(driver)
    except CudaError as error:
        sys.exit(f"benchmarks/cuda.py needs an NVIDIA GPU: {error}")
    if device.arch is None:
        number = ".".join(map(str, device.capability))
        sys.exit(
            f"benchmarks/cuda.py: {device.name} has compute capability {number}, and there are "
            f"kernels for {', '.join(cuda.ARCHS)}"
        )
    return device, device.arch


def cubins_of(options: argparse.Namespace) -> Cubins:
    """Those that were prepared, or a compiler's; exits where there is neither."""
    try:
        if options.prepared:
            return Packed(options.prepared / CUBINS)
        return Compiled(find_cubin_compiler())
    except (PackError, ToolchainError) as error:
        sys.exit(f"benchmarks/cuda.py: {error}")


def prepare_all(folder: Path, archs: list[str], parts: list[str]) -> None:
    """What parts need where nothing compiles; exits where nothing does here, either."""
    tell = functools.partial(print, file=sys.stderr)
    try:
        compiler = find_cubin_compiler()
        folder.mkdir(parents=True, exist_ok=True)
    except (ToolchainError, OSError) as error:
        sys.exit(f"benchmarks/cuda.py: {error}")
    prepare(folder / CUBINS, all_regions(), archs, compiler, tell)
    if "models" in parts:
        prepare_models(folder / MODELS, tell)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--prepared", type=Path, metavar="FOLDER", help="what --prepare wrote")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER",
                        help="compile kernels and models for --parts, no GPU")  # fmt: skip
    parser.add_argument("--archs", nargs="+", choices=cuda.ARCHS, default=["sm_90a"],
                        help="what --prepare compiles for")  # fmt: skip
    parser.add_argument("--driver", default="libcuda.so.1", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


class Report:
    """The file, written anew whenever something is found."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path, self.content = path, about | {"parts": {}}

    def tell(self, part: str, found: Found) -> None:
        """Add what a task found."""
        if "problem" in found:
            print(f"  {found['task']}: {found['problem']}", file=sys.stderr)
        self.content["parts"].setdefault(part, []).append(found)
        self.content["wanted"] = wanted(self.content["parts"])
        if self._path is not None:
            # Never half of it, whenever this process is ended.
            new = self._path.with_name(f"{self._path.name}.new")
            new.write_text(json.dumps(self.content, indent=1) + "\n")
            new.replace(self._path)

    def bad(self) -> list[str]:
        """What is wrong."""
        tasks = [(part, each) for part, all_ in self.content["parts"].items() for each in all_]
        found = [f"{part} {each['task']}: {each['problem']}" for part, each in tasks
                 if "problem" in each]  # fmt: skip
        return found + [
            f"{row['region']}, {row['rows']} rows: off by {row['error']:.1e}"
            for part, each in tasks if part == "numbers"
            for row in each.get("rows", []) if not row["error"] <= TOLERANCE
        ]  # fmt: skip


def run_parts(options: argparse.Namespace) -> Report:
    """All parts, each in its share of the time."""
    begin, (device, arch), name = time.monotonic(), open_device(options.driver), cubins_of(options)
    print(f"{device.name}, driver for CUDA {device.driver_version}, {name.name}, kernels for "
          f"{arch}, seed {options.seed}", file=sys.stderr)  # fmt: skip
    report = Report(options.json, {
        "device": device.name, "capability": device.capability, "arch": arch,
        "driver": device.driver_version, "compiler": name.name, "versions": versions(),
        "seed": options.seed,
    })  # fmt: skip
    parts, last = Parts(options), begin + options.minutes * 60
    for part in options.parts:
        print(f"{part}:", file=sys.stderr)
        names = [name for name, _ in parts.tasks(part)]
        end = min(last, time.monotonic() + SHARES[part] * options.minutes * 60)
        command = child_command(options, part, time.time() + end - time.monotonic())
        run_apart(command, names, end, functools.partial(report.tell, part))
    return report


def main() -> None:
    """Prepare, or be a child, or run all parts."""
    options = parsed()
    if options.prepare:
        prepare_all(options.prepare, options.archs, options.parts)
        return
    if options.part:
        be_child(Parts(options).tasks(options.part), options.first)
    report = run_parts(options)
    if options.json is None:
        print(json.dumps(report.content, indent=1))
    for line in lines_of(report.content["parts"]):
        print(line, file=sys.stderr)
    if bad := report.bad():
        sys.exit("\n".join([f"{len(bad)} problems:", *bad]))


if __name__ == "__main__":
    main()
