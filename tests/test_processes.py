"""Compiling in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.ir.errors import ToolchainError
from qcompiler.targets import processes
from qcompiler.targets.processes import in_processes

SEVERAL = [(number,) for number in range(9)]


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: 2)


def test_results_come_in_order_from_other_processes() -> None:
    assert list(in_processes(abs, [(-one,) for (one,) in SEVERAL])) == list(range(9))
    others = list(in_processes(os.getpid, [()] * 4))
    assert len(others) == 4
    assert os.getpid() not in others


def test_one_core_or_one_job_stays_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(in_processes(os.getpid, [()])) == [os.getpid()]
    assert list(in_processes(os.getpid, [])) == []
    monkeypatch.setattr(processes, "available_cores", lambda: 1)
    assert list(in_processes(os.getpid, [()] * 3)) == [os.getpid()] * 3


def test_a_daemon_has_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert list(in_processes(os.getpid, [()] * 3)) == [os.getpid()] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_of_a_fork_has_processes_of_its_own() -> None:
    list(in_processes(abs, [(-1,), (-2,)]))
    if (child := os.fork()) == 0:
        os._exit(list(in_processes(abs, [(-1,), (-2,)])) != [1, 2])
    assert os.waitpid(child, 0)[1] == 0


def test_what_the_function_raises_is_raised_here_and_the_next_work_is_done() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_processes(int, [("1",), ("one",), ("2",)]))
    assert list(in_processes(int, [("1",), ("2",)])) == [1, 2]


def test_a_killed_process_is_a_toolchain_error_and_the_next_work_is_done() -> None:
    with pytest.raises(ToolchainError, match="a process that compiles kernels was killed"):
        list(in_processes(signal.raise_signal, [(signal.SIGKILL,)] * 2))
    assert list(in_processes(abs, [(-1,), (-2,)])) == [1, 2]


def test_workers_have_no_torch() -> None:
    found = in_processes(eval, [("__import__('sys').modules.get('torch')",)] * 2)
    assert list(found) == [None, None]


def test_a_script_that_is_not_written_for_processes_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from qcompiler.targets import processes\n"
        "processes.available_cores = lambda: 2\n"
        "print(*processes.in_processes(abs, [(-1,), (-2,)]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["once", "1", "2"]
    assert done.stderr == ""
