"""Options that choose passes and look between them, and what they find, for people."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.figures import FigureTable
from qcompiler.cli.options import FILE

if TYPE_CHECKING:
    from qcompiler.ir.stages import Stage
    from qcompiler.numerics import Change, CheckNumerics
    from qcompiler.step import Watcher

__all__ = ["Debugging", "debugging_options"]

F = TypeVar("F", bound=Callable[..., Any])

_PANEL = "Passes"
_STAGES = ("float", "qdq", "quantized", "kernel")


@dataclasses.dataclass(frozen=True)
class Debugging:
    """What a user wants of the passes.

    Attributes:
        pipeline: Passes to run, as text; None for all of the target.
        print_after: Passes after which the model is printed.
        stop: The stage to stop after.
        dump_dir: Where the model is kept after each pass.
        samples: What the model is run on between passes.
        bounds: Least SQNR in dB of a pass that does not round, and of one that does; None where
            nothing was said.
    """

    pipeline: str | None
    print_after: tuple[str, ...]
    stop: str | None
    dump_dir: Path | None
    samples: Path | None
    bounds: tuple[float | None, float | None]

    def __post_init__(self) -> None:
        """Check that they agree.

        Raises:
            UsageError: A bound, and no samples.
        """
        if self.samples is None and self.bounds != (None, None):
            raise click.UsageError("a bound needs --check-numerics SAMPLES, which it is for")

    @property
    def stage(self) -> Stage | None:
        """The stage to stop after."""
        from qcompiler.ir.stages import Stage

        return None if self.stop is None else Stage[self.stop.upper()]

    @contextmanager
    def watching(self, terminal: Terminal, as_json: bool) -> Iterator[_Watchers]:
        """What looks between the passes; its figures are printed at the end, an error or not.

        Raises:
            QCompilerError: Samples that are not there, or a bound that is no number.
        """
        from qcompiler.numerics import CheckNumerics
        from qcompiler.watch import DumpModels, PrintAfter

        watchers: list[Watcher] = []
        numerics = None
        if self.print_after:
            write = functools.partial(terminal.err.print, soft_wrap=True)
            watchers.append(PrintAfter(self.print_after, write))
        if self.dump_dir is not None:
            watchers.append(DumpModels(self.dump_dir))
        if self.samples is not None:
            _refuse_images(self.samples)
            numerics = CheckNumerics(self.samples, *self.bounds)
            watchers.append(numerics)
        try:
            yield _Watchers(watchers, numerics)
        finally:
            if numerics is not None and numerics.changes and not as_json:
                terminal.out.print(_numerics_table(numerics.changes))
                terminal.out.print()


def _refuse_images(samples: Path) -> None:
    """Say what to give instead; --preprocess, which other options would name, is not for these.

    Raises:
        UsageError: There are images among the files.
    """
    from qcompiler.images import IMAGES

    files = samples.rglob("*") if samples.is_dir() else [samples]
    if any(file.suffix.lower() in IMAGES for file in files):
        raise click.UsageError(
            f"--check-numerics takes arrays, and {samples} has images: give .npz or .npy files"
        )


@dataclasses.dataclass(frozen=True)
class _Watchers:
    """The watchers of one run, and the one among them that has figures."""

    all: list[Watcher]
    numerics: CheckNumerics | None

    def to_dict(self) -> dict[str, Any]:
        """What they found, for JSON."""
        if self.numerics is None:
            return {}
        return {"numerics": [dataclasses.asdict(change) for change in self.numerics.changes]}


def debugging_options(command: F) -> F:
    """`--pipeline` and so on, as one parameter `debugging`."""

    @functools.wraps(command)
    def gathered(
        *args: Any, pipeline: str | None, print_after: tuple[str, ...], stop: str | None,
        dump_dir: Path | None, samples: Path | None, bound: float | None,
        rounding_bound: float | None, **others: Any,
    ) -> Any:  # fmt: skip
        bounds = (bound, rounding_bound)
        debugging = Debugging(pipeline, print_after, stop, dump_dir, samples, bounds)
        return command(*args, debugging=debugging, **others)

    # The panel named last comes first in the help.
    for decorate in (
        *reversed(_OPTIONS),
        click.option_panel(_PANEL),
        click.option_panel("Options"),
    ):
        gathered = decorate(gathered)
    return gathered  # type: ignore[return-value]


_OPTIONS = (
    click.option(
        "--pipeline", metavar="PASSES", panel=_PANEL,
        help='Run these passes only: "canonicalize..fold-qdq", "smooth-activations{alpha=0.6}"; '
        "`qcompile pass --list` lists them.",
    ),
    click.option(
        "--print-after", multiple=True, metavar="PASS", panel=_PANEL,
        help="Print the model as text on stderr after this pass; may repeat.",
    ),
    click.option(
        "--stop-after", "stop", type=click.Choice(_STAGES), metavar="STAGE", panel=_PANEL,
        help="Write the model as it is after float, qdq, quantized or kernel, as an ONNX file.",
    ),
    click.option(
        "--dump-dir", type=FILE, metavar="DIR", panel=_PANEL,
        help="Keep the model after each pass there, as an ONNX file that runs.",
    ),
    click.option(
        "--check-numerics", "samples", type=FILE, metavar="NPZ", panel=_PANEL,
        help="Run the model on these samples after each pass, and say what the pass changed.",
    ),
    click.option(
        "--numerics-bound", "bound", type=float, metavar="DB", panel=_PANEL,
        help="Fail where a pass that does not round leaves less SQNR; if not given, 60, or 15 "
        "once the model is quantized.",
    ),
    click.option(
        "--rounding-bound", type=float, metavar="DB", panel=_PANEL,
        help="Fail where a pass that rounds leaves less SQNR.",
    ),
)  # fmt: skip


def _numerics_table(changes: list[Change]) -> FigureTable:
    table = FigureTable("Pass", ">Max abs", ">SQNR", ">Since the\nsource", "")
    for change in changes:
        note = "rounds" if change.rounds else ""
        if not change.changed:
            table.add_row(change.step, "", "", "", Text("changed nothing", "dim"))
            continue
        table.add_row(
            change.step, f"{change.max_error:.3g}", _decibels(change.sqnr),
            _decibels(change.sqnr_since_source), Text(note, "yellow"),
        )  # fmt: skip
    return table


def _decibels(sqnr: float | None) -> str:
    return "equal" if sqnr is None else f"{sqnr:.1f} dB"
