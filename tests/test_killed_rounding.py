"""kill -9 while weights are rounded, over and over, and the same bytes in the end."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import planned_norm as models
import pytest

from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.hqq import HQQ
from qcompiler.passes.second_moments import LayerRuns

TEXT = (
    f"{models.X} => (float[n,64] o) {{ {models.NORM} p = MatMul (y, w1) q = Relu (p) "
    "r = MatMul (q, w2) s = Add (r, x) t = MatMul (s, w3) u = Tanh (t) v = MatMul (u, w4) "
    "o = MatMul (v, w5) }"
)
RNG = np.random.default_rng(1)
WEIGHTS = {name: models.WEIGHTS[name] for name in ("gamma", "beta")} | {
    f"w{number}": RNG.standard_normal((64, 64), dtype=np.float32) for number in range(1, 6)
}


class Torn:
    """A file of which half is there when the process dies."""

    def __init__(self, dies, descriptor, mode):
        self.dies, self.file = dies, open(descriptor, mode)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if self.dies():
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(content)


def round_and_die(rounding, where, cache):
    """Round, and tell of it; die after a number of lines, or in the middle of that write.

    Args:
        rounding: How.
        where: "lines 3", "writes 2" or "nowhere".
        cache: Where layers are kept.
    """
    os.environ["QCOMPILER_CACHE"] = cache
    kind, _, number = where.partition(" ")
    left = {"lines": 0, "writes": 0, kind: int(number or 0)}

    def counted(what):
        left[what] -= 1
        return left[what] == 0

    def tell(text, *_):
        print(text, flush=True)
        if counted("lines"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fdopen = partial(Torn, lambda: counted("writes"))
    zero_points = "float" if rounding == "hqq" else "none"
    model = models.planned(TEXT, WEIGHTS, rounding, group_size=16, zero_points=zero_points)
    runs = LayerRuns(models.WALK, tell=tell)
    for rewrite in (AWQ(runs), HQQ(runs), GPTQ(runs)):
        rewrite(model)
    for name, array in sorted(models.constants(model).items()):
        print("=", name, array.dtype, array.tobytes().hex(), flush=True)


def main(rounding, steps, folder):
    """Each step in a fork of a process that has imported all, and opened nothing."""
    for number, (where, cache) in enumerate(steps):
        if not (child := os.fork()):
            sys.stdout = open(Path(folder) / f"{number}.txt", "w")  # noqa: SIM115
            round_and_die(rounding, where, str(Path(folder) / cache))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))


@pytest.mark.parametrize(
    ("rounding", "deaths"),
    [
        ("gptq", ["writes 2", "lines 3", "writes 2"]),
        ("hqq", ["writes 2", "lines 2", "writes 3"]),
        ("awq", ["writes 2", "lines 3", "writes 5", "lines 9"]),  # inputs first, and then layers
    ],
)
def test_the_bytes_are_the_same_after_kills_in_layers_and_writes(tmp_path, rounding, deaths):
    steps = [("nowhere", "whole"), *((death, "killed") for death in deaths), ("nowhere", "killed")]
    code = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; import test_killed_rounding"
    given = json.dumps([rounding, steps, str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; test_killed_rounding.main(*{given})"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    killed = [-signal.SIGKILL] * len(deaths)
    assert list(map(int, done.stdout.split())) == [0, *killed, 0], done.stderr
    lines = [(tmp_path / f"{number}.txt").read_text().splitlines() for number in range(len(steps))]
    kept = [sum("kept from" in line for line in told) for told in lines]
    assert kept == sorted(kept) and kept[0] == 0 < kept[-2] < kept[-1]
    whole, again = ([line for line in lines[n] if line.startswith("=")] for n in (0, -1))
    assert whole == again and len(whole) > 10
