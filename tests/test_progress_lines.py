"""Lines of progress, for files and pipes: a stage that takes long says how far it is."""

import io

import pytest
from rich.console import Console

from qcompiler.cli import progress
from qcompiler.progress import Clock


@pytest.fixture
def at(monkeypatch):
    """Sets the time of day."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100 + seconds)


def test_a_long_stage_says_how_far_it_is_and_how_long_it_takes(at):
    file = io.StringIO()
    clock = Clock(progress.progress_lines(Console(file=file, width=200)))
    clock.total = 3
    clock.start("load")
    at(2)
    clock.start("insert-qdq")
    for done in range(1, 41):
        at(2 + done)
        clock.count_samples(done, 100)
    clock.detail("layer 3, 5 s left", 0.5)
    at(60)
    clock.detail("layer 4, 5 s left", 0.6)
    clock.start("fold-qdq")
    assert file.getvalue().splitlines() == [
        "   0.0 s  load",
        "   2.0 s  insert-qdq",
        "  12.0 s  insert-qdq: sample 10 of 100, 0:01:30 left",
        "  22.0 s  insert-qdq: sample 20 of 100, 0:01:20 left",
        "  32.0 s  insert-qdq: sample 30 of 100, 0:01:10 left",
        "  42.0 s  insert-qdq: sample 40 of 100, 0:01:00 left",
        "  60.0 s  insert-qdq: layer 4, 5 s left",
        "  60.0 s  fold-qdq",
    ]


def test_what_is_done_at_once_is_one_line(at):
    file = io.StringIO()
    clock = Clock(progress.progress_lines(Console(file=file, width=200)))
    for stage in ("load", "insert-qdq", "load"):
        clock.start(stage)
        clock.count_samples(1, 2)
        at(5)
    assert file.getvalue().splitlines() == ["   0.0 s  load", "   5.0 s  insert-qdq"]
