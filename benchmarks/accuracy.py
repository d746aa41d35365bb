r"""How much of a model's accuracy is left in 8 bits: ours beside what others make of the same data.

    pip install '.[cpu,images,zig]' nncf openvino onnxsim torch transformers tokenizers scipy
    python benchmarks/accuracy.py --photos DIR --sts sts-dev.csv --train sts-train.csv \
        --json benchmarks/results/accuracy.json

Tasks are in `tasks.py`, peers and their settings in `quantizers.py`.  Photos are any folder of
pictures (ResNet50 wants things of ImageNet), of which every second one by name is used, the first
128 to calibrate; without a folder they are crops of the photos that a few Python packages carry.
`--sts` and `--train` are splits of the STS benchmark; sentences for Whisper are read aloud by
espeak-ng.  Models come from package registries, see `models.py`.

Figures of accuracy do not depend on how busy the machine is; `--seconds` times sessions, too, in
turn, which wants a quiet one; what ours and ONNX Runtime's quantizers made is found again in
`--work`.  Results are written after each contender; what is measured again replaces its figures in
the file, whose others stay; `--only` and `--without` choose contenders.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from contenders import Contender
from quantizers import quantizers
from tasks import TASKS, Data, Figures, Outputs, Task
from timing import environment, interleave

PACKAGES = ("nncf", "openvino", "onnxsim")


def measure(
    task: Task, wanted: list[str], arguments: argparse.Namespace, keep: Callable[[Figures], None]
) -> None:
    """Find the figures of everybody wanted, by name; of one who fails, why.

    `keep` is given what there is after each, for some take hours.
    """
    found: dict[str, Any] = {}
    made: dict[str, Contender] = {}
    reference: list[Outputs] | None = None
    print(f"\n{task.name}: {len(task.calibration)} samples to calibrate, {len(task.inputs)} judged")
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            folder = (arguments.work or Path(scratch)) / task.name / name
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            try:
                made[name] = quantizers(task)[name](task, folder)
                spent = time.perf_counter() - start
                session = made[name].open(arguments.threads)
                # Copies: what OpenVINO returns is overwritten by its next run.
                outputs = [[*map(np.array, session.run(None, feeds))] for feeds in task.inputs]
                reference = reference or outputs
                found[name] = task.judge(reference, outputs) | {"quantize_s": round(spent, 1)}
            except Exception as error:  # whatever a peer raises is its result
                traceback.print_exc(limit=-3)
                found[name] = {"fails": f"{type(error).__name__}: {str(error)[:300]}"}
            print(f"  {name:28}{in_words(found[name])}", flush=True)
            keep(found)
        if arguments.seconds:
            take_times(task, made, arguments, found)
            keep(found)


def take_times(
    task: Task, made: dict[str, Contender], arguments: argparse.Namespace, found: Figures
) -> None:
    """Put what a run takes into the figures."""
    for threads in (1, arguments.threads):
        sessions = {name: contender.open(threads) for name, contender in made.items()}
        times = interleave(sessions, task.inputs[0], arguments.seconds)
        for name, ms in times.items():
            found[name].setdefault("ms", {})[f"{threads} threads"] = ms
            print(f"  {name:28}{threads} threads {ms['median']:9.2f} ms  min {ms['min']:8.2f}")


def in_words(figures: dict[str, Any]) -> str:
    """One line of figures."""
    return "  ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )


def write(path: Path, task: Task, found: Figures, photos: Path | None) -> None:
    """Put the figures of a task into the file of results."""
    content = json.loads(path.read_text()) if path.exists() else {"tasks": {}}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _has(name)}
    content |= environment() | {"photos": "a folder of labelled photos" if photos else "crops"}
    content["versions"] |= versions
    content["tasks"][task.name] = {
        "calibration": len(task.calibration),
        "judged": len(task.inputs),
        "figures": content["tasks"].get(task.name, {}).get("figures", {}) | found,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
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
    parser.add_argument("--every", type=int, default=1, help="judge by every N-th input alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="also time it, so long per task")
    parser.add_argument("--work", type=Path, help="a folder for quantized models, to use again")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tasks if name not in TASKS]:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    ort.set_default_logger_severity(3)
    data = Data(
        arguments.photos, arguments.sts, arguments.train, arguments.every, arguments.labelled
    )
    for name in arguments.tasks or TASKS:
        task = TASKS[name](data)
        if isinstance(task, str):
            print(f"\nwithout {name}: {task}")
            continue
        wanted = [
            name
            for name in quantizers(task)
            if (name == "ORT FP32" or not arguments.only or name in arguments.only)
            and name not in arguments.without
        ]

        def keep(found: Figures, task: Task = task) -> None:
            if arguments.json:
                write(arguments.json, task, found, arguments.photos)

        measure(task, wanted, arguments, keep)


if __name__ == "__main__":
    main()
