"""Compiling on all cores: TVM and LLVM do it on one thread of a process, so there are several."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from itertools import starmap
from typing import Any, TypeVar

from qcompiler.cores import available_cores
from qcompiler.ir.errors import ToolchainError

__all__ = ["in_processes"]

_MOST = 8
"""Processes, each of which holds TVM: 250 MB."""

T = TypeVar("T")


def in_processes(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]
) -> Generator[T, None, None]:
    """`function(*job)` for each of `jobs`, in order.

    To be closed by who does not take all of the results: that ends the work.

    Args:
        function: One that a new process can import.
        jobs: The arguments of each call; they and the results can be pickled.

    Raises:
        ToolchainError: A process ended before its work.
        Exception: What `function` raises.
    """
    workers = min(available_cores(), len(jobs), _MOST)
    # Daemons, as those of multiprocessing.Pool, may not have children.
    if workers < 2 or multiprocessing.current_process().daemon:
        yield from starmap(function, jobs)
        return
    # The standard library's processes import the user's script again, and run it if it is not
    # written with that in mind; loky's do not.
    from loky import ProcessPoolExecutor
    from loky.process_executor import BrokenProcessPool

    executor = ProcessPoolExecutor(workers, initializer=_begin)
    try:
        for future in [executor.submit(function, *job) for job in jobs]:
            yield future.result()
    except BrokenProcessPool as error:
        raise ToolchainError(
            "a process that compiles kernels was killed; is there enough memory? "
            "On one core (taskset -c 0) there is one process, this one"
        ) from error
    finally:
        executor.shutdown(kill_workers=True)


def _begin() -> None:
    # Ctrl-C goes to all; who asked for the work tells of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # TVM imports torch where it finds it: two thirds of its start, and nobody uses it there.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
