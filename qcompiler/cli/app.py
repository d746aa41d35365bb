"""The program: its first argument is a verb, or else the model to compile."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import rich_click as click
from click.shell_completion import CompletionItem
from rich.text import Text
from rich_click.rich_panel import RichCommandPanel, RichOptionPanel

from qcompiler.cli.bench import bench_command
from qcompiler.cli.compare import compare_command
from qcompiler.cli.compile import compile_command
from qcompiler.cli.console import EXIT_INTERRUPTED, Terminal
from qcompiler.cli.inspect import inspect_command
from qcompiler.cli.passes import pass_command
from qcompiler.cli.streams import noting_interrupts, prepare_streams
from qcompiler.cli.take_weights import take_weights_command
from qcompiler.cli.targets import targets_command
from qcompiler.ir.errors import did_you_mean

__all__ = ["application", "run"]

_COMPILE = "compile"
_HELP = ("--help", "-h")


class Application(click.RichGroup):
    """A group that compiles when its first argument is no verb, and explains its errors."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the hidden verb in front where there is none."""
        if not args:
            args = ["--help"]
        elif args[0] not in self.commands and args[0] not in (*_HELP, "--version"):
            if not ctx.resilient_parsing:
                _check_first_word(args[0], [v for v in self.commands if v != _COMPILE])
            args = [_COMPILE, *args]
        if args[0] == _COMPILE and any(word in _HELP for word in args):
            args = ["--help"]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Both ways to call it."""
        formatter.write(Text("\n qcompile MODEL --target TARGET [OPTIONS]\n qcompile VERB ...\n"))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options of compiling, then the verbs and our own options."""
        within = compile_command.context_class(compile_command, info_name=_COMPILE, parent=ctx)
        compile_command.format_options(within, formatter)
        super().format_options(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs, or a model's file."""
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run a command line and exit with its code."""
        terminal = Terminal()
        with noting_interrupts(terminal.note_interrupt), terminal.one_line_warnings():
            sys.exit(self._run(terminal, args))

    def _run(self, terminal: Terminal, args: Sequence[str] | None) -> int:
        try:
            code = super().main(args, "qcompile", standalone_mode=False, obj=terminal)
            terminal.flush()
        except click.UsageError as error:
            terminal.error(error.format_message())
            path = error.ctx.command_path if error.ctx is not None else "qcompile"
            path = path.removesuffix(f" {_COMPILE}")
            terminal.err.print(f"'{path} --help' shows how it is used", style="dim")
            return error.exit_code
        except click.ClickException as error:
            terminal.error(error.format_message())
            return error.exit_code
        except (KeyboardInterrupt, click.Abort):
            terminal.error("interrupted")
            return EXIT_INTERRUPTED
        except Exception as error:
            if terminal.interrupted:
                # TVM, for one, turns a KeyboardInterrupt into an empty RuntimeError.
                terminal.error("interrupted")
                return EXIT_INTERRUPTED
            return terminal.failure(error)
        return code if isinstance(code, int) else 0


def _check_first_word(word: str, verbs: Sequence[str]) -> None:
    """Tell a mistyped verb from the name of a model."""
    if (
        word.startswith("-")
        or Path(word).exists()
        or Path(word).suffix
        or len(Path(word).parts) > 1
    ):
        return
    hint = did_you_mean(word, verbs) or f"; the verbs are {', '.join(verbs)}"
    raise click.UsageError(f"{word!r} is neither a file nor a verb{hint}")


def _version() -> str:
    try:
        return importlib.metadata.version("qcompiler")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _print_version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.obj.out.print(f"qcompile {_version()}")
        ctx.exit()


application = Application(
    name="qcompile",
    help="Compile a model into a folder that ONNX Runtime runs: quantized, with its own kernels.",
    epilog="A file that is named like a verb is given with its folder: ./bench",
    commands=[
        compile_command, targets_command, inspect_command, bench_command, compare_command,
        pass_command, take_weights_command,
    ],
    params=[
        click.Option(["--version"], is_flag=True, expose_value=False, is_eager=True,
                     callback=_print_version, help="Print the version."),
    ],
    panels=[
        RichCommandPanel(
            "Verbs", ["targets", "inspect", "bench", "compare", "pass", "take-weights"]
        ),
        RichOptionPanel("General", ["--version", "--help"]),
    ],
    context_settings={"help_option_names": list(_HELP), "rich_help_config": {"theme": "slim"}},
)  # fmt: skip


def run() -> NoReturn:
    """Run the command line of this process."""
    prepare_streams()
    # A polite kill unwinds the stack, so that no half-written bundle stays behind.
    for polite in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(polite, lambda number, frame: sys.exit(128 + number))
    application.main()
