"""Compiling on all cores: TVM and LLVM do it on one thread of a process, so there are several."""

from __future__ import annotations

import multiprocessing
import os
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
_REST = 30
"""Seconds after which idle processes end; a library that is timed comes before the bundle's."""

_IMPORTED_BY = os.getpid()

T = TypeVar("T")


def in_processes(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> Generator[T, None, None]:
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
    if workers < 2 or not _may_start():
        yield from starmap(function, jobs)
        return
    # The standard library's processes import the user's script again, and run it if it is not
    # written with that in mind; loky's do not.
    from loky import get_reusable_executor
    from loky.process_executor import TerminatedWorkerError

    executor = get_reusable_executor(
        workers, timeout=_REST, initializer=_begin, reuse=True, kill_workers=True
    )
    try:
        for future in [executor.submit(function, *job) for job in jobs]:
            yield future.result()
    except TerminatedWorkerError as error:
        raise ToolchainError(
            "a process that compiles kernels was killed; is there enough memory? "
            "On one core (taskset -c 0) there is one process, this one"
        ) from error
    except BaseException:
        executor.shutdown(wait=False, kill_workers=True)
        raise


def _may_start() -> bool:
    """Whether this process may have others.

    Daemons, as those of multiprocessing.Pool, may not; and a child that was forked has its parent's
    executor without the thread that hands out work, and would wait for ever.
    """
    return os.getpid() == _IMPORTED_BY and not multiprocessing.current_process().daemon


def _begin() -> None:
    # Ctrl-C goes to all; who asked for the work tells of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # TVM imports torch where it finds it: two thirds of its start, and nobody uses it there.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
