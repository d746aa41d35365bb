r"""How much of a model's accuracy is left in 8 bits: ours beside what others make of the same data.

    pip install '.[cpu,images,zig]' nncf openvino onnxsim torch transformers tokenizers scipy
    python benchmarks/accuracy.py --photos DIR --sts sts-dev.csv --train sts-train.csv \
        --json benchmarks/results/accuracy.json
    python benchmarks/accuracy_table.py benchmarks/results/accuracy.json

Tasks are in `tasks.py`, peers and their settings in `quantizers.py`.  Photos are any folder of
pictures (ResNet50 wants things of ImageNet), of which every second one by name is used, the first
128 to calibrate; without a folder they are crops of the photos that a few Python packages carry.
`--sts` and `--train` are splits of the STS benchmark; sentences for Whisper are read aloud by
espeak-ng.  Models come from package registries, see `models.py`.

Each contender is measured on each task in a process of its own, which may take so much processor
time (`--limit`); what it failed by is its result, too.  Results are written after each; with
`--missing` those that the file has are not measured again, so that a run that was stopped goes on,
and without it they are replaced.  `--only` and `--without` choose contenders.  What ours and ONNX
Runtime's quantizers made is found again in `--work`.

Figures of accuracy do not depend on how busy the machine is; `--seconds` times sessions, too, in
turn and in one process, which wants a quiet one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from contenders import Contender
from quantizers import quantizers
from tasks import TASKS, Data, Figures, Outputs, Task
from timing import environment, interleave

FLOAT = "ORT FP32"
PACKAGES = ("nncf", "openvino", "onnxsim")


def measure(task: Task, name: str, work: Path, threads: int) -> Figures:
    """The figures of one contender; of one that fails, why."""
    reference = _outputs(quantizers(task)[FLOAT](task, work), task, threads)
    folder = work / task.name / name
    folder.mkdir(parents=True, exist_ok=True)
    start = _processor_seconds()
    try:
        made = quantizers(task)[name](task, folder)
        spent = _processor_seconds() - start
        found = task.judge(reference, _outputs(made, task, threads))
        return found | {"quantize_cpu_s": round(spent, 1)}
    except Exception as error:  # whatever a peer raises is its result
        traceback.print_exc(limit=-3)
        return {"fails": f"{type(error).__name__}: {str(error)[:300]}"}


def _outputs(contender: Contender, task: Task, threads: int) -> list[Outputs]:
    session = contender.open(threads)
    # Copies: what OpenVINO returns is overwritten by its next run.
    return [[*map(np.array, session.run(None, feeds))] for feeds in task.inputs]


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_apart(task: str, name: str, work: Path, minutes: float) -> Figures:
    """The figures of one contender, from a process of its own with so much processor time."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "figures.json")
        own = ["--cell", task, name, str(result), "--work", str(work)]
        code = subprocess.run([sys.executable, __file__, *sys.argv[1:], *own]).returncode
        if code == 0:
            return dict(json.loads(result.read_text()))
    if code == -signal.SIGXCPU:
        return {"fails": f"not done in {minutes:g} minutes of processor time"}
    return {"fails": f"its process ended with {code}"}


def take_times(task: Task, wanted: list[str], arguments: argparse.Namespace) -> Figures:
    """What a run takes, by contender."""
    made = {
        name: quantizers(task)[name](task, arguments.work / task.name / name) for name in wanted
    }
    found: Figures = {}
    for threads in (1, arguments.threads):
        sessions = {name: contender.open(threads) for name, contender in made.items()}
        times = interleave(sessions, task.inputs[0], arguments.seconds)
        for name, ms in times.items():
            found.setdefault(name, {})[f"{threads} threads"] = ms
            print(f"  {name:28}{threads} threads {ms['median']:9.2f} ms  min {ms['min']:8.2f}")
    return found


def in_words(figures: dict[str, Any]) -> str:
    """One line of figures."""
    return "  ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )


def read(path: Path | None) -> dict[str, Any]:
    """The file of results, if there is one."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {"tasks": {}}


def write(path: Path, task: Task, kind: str, found: Figures, photos: Path | None) -> None:
    """Put what was found of a task's contenders, "figures" or "ms", into the file of results."""
    content = read(path)
    content |= environment() | {"photos": "a folder of labelled photos" if photos else "crops"}
    content["versions"] |= {name: metadata.version(name) for name in PACKAGES if _has(name)}
    entry = content["tasks"].setdefault(task.name, {})
    entry |= {"calibration": len(task.calibration), "judged": len(task.inputs)}
    entry[kind] = entry.get(kind, {}) | found
    path.write_text(json.dumps(content, indent=1) + "\n")


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--photos", type=Path, help="a folder of pictures")
    parser.add_argument(
        "--labelled", action="store_true", help="photos are one of each class, in order by name"
    )
    parser.add_argument("--sts", type=Path, help="dev split of the STS benchmark")
    parser.add_argument("--train", type=Path, help="train split, to calibrate with")
    parser.add_argument("--only", action="append", default=[], help="a contender; may repeat")
    parser.add_argument("--without", action="append", default=[], help="leave one out; may repeat")
    parser.add_argument("--missing", action="store_true", help="what the file has stays as it is")
    parser.add_argument("--limit", type=float, default=30, help="minutes of processor time for one")
    parser.add_argument("--every", type=int, default=1, help="judge by every N-th input alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="time it, so long per task")
    parser.add_argument("--work", type=Path, help="a folder for quantized models, to use again")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tasks if name not in TASKS]:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    return arguments


def measure_cell(data: Data, arguments: argparse.Namespace) -> None:
    """What a process of its own does."""
    name, contender, result = arguments.cell
    task, seconds = TASKS[name](data), round(60 * arguments.limit)
    assert isinstance(task, Task)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 60))
    found = measure(task, contender, arguments.work, arguments.threads)
    Path(result).write_text(json.dumps(found))


def measure_task(name: str, task: Task, arguments: argparse.Namespace) -> None:
    """Measure all who are wanted, and keep what is found after each."""

    def keep(kind: str, found: Figures) -> None:
        if arguments.json:
            write(arguments.json, task, kind, found, arguments.photos)

    print(f"\n{task.name}: {len(task.calibration)} samples to calibrate, {len(task.inputs)} judged")
    known = read(arguments.json)["tasks"].get(task.name, {}).get("figures", {})
    wanted = [
        contender
        for contender in quantizers(task)
        if (contender == FLOAT or not arguments.only or contender in arguments.only)
        and contender not in arguments.without
    ]
    for contender in wanted:
        if not (arguments.missing and contender in known):
            found = measure_apart(name, contender, arguments.work, arguments.limit)
            print(f"  {contender:28}{in_words(found)}", flush=True)
            keep("figures", {contender: found})
    if arguments.seconds:
        keep("ms", take_times(task, wanted, arguments))


def main() -> None:
    arguments = parsed()
    ort.set_default_logger_severity(3)
    data = Data(
        arguments.photos, arguments.sts, arguments.train, arguments.every, arguments.labelled
    )
    if arguments.cell:
        measure_cell(data, arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        arguments.work = arguments.work or Path(scratch)
        for name in arguments.tasks or TASKS:
            task = TASKS[name](data)
            if isinstance(task, str):
                print(f"\nwithout {name}: {task}")
            else:
                measure_task(name, task, arguments)


if __name__ == "__main__":
    main()
