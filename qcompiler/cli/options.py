"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from qcompiler.samples import Samples

__all__ = [
    "FILE",
    "Command",
    "Count",
    "Shapes",
    "ShapesType",
    "TargetName",
    "json_option",
    "preprocess_option",
    "quiet_option",
    "samples_of",
    "verbose_option",
]

Shapes = dict[str, tuple[int, ...]]
"""Sizes by input name."""

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.RichCommand):
    """A command whose options are given once, unless they are flags or may repeat."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse a second value, which would silently replace the first."""
        if not ctx.resilient_parsing:
            try:
                _, _, given = self.make_parser(ctx).parse_args(list(args))
            except click.UsageError as error:
                error.ctx = ctx  # so that the help of this verb is pointed at
                raise
            for option in given:
                if not isinstance(option, click.Option) or option.multiple:
                    continue
                # A flag says the same twice, unless it can be said the other way too.
                if given.count(option) > 1 and (option.secondary_opts or not option.is_flag):
                    name = max(option.opts, key=len)
                    raise click.UsageError(f"{name} is given twice: leave one out", ctx)
        return super().parse_args(ctx, args)


class FileType(click.Path):
    """Any path; the code behind it says what is wrong with it better than click does."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse only what would become the current folder."""
        if not str(value):
            self.fail("it is empty: is a variable of your shell not set?", param, ctx)
        return super().convert(value, param, ctx)


FILE = FileType(path_type=Path)


class Count(click.IntRange):
    """A whole number from `min` on."""

    name = "integer"


class ShapesType(click.ParamType[Shapes]):
    """`input_ids=1x128,attention_mask=1x128`."""

    name = "shapes"

    def convert(
        self, value: str | Shapes, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shapes:
        """Names and sizes, checked against the model later."""
        if isinstance(value, dict):
            return value
        shapes: Shapes = {}
        for part in value.split(","):
            name, found, sizes = part.strip().rpartition("=")
            numbers = [int(n) if n.isdecimal() else 0 for n in sizes.lower().split("x")]
            if not found or not name or min(numbers) < 1:
                self.fail(f"{part!r} is not NAME=SIZExSIZE, such as input_ids=1x128", param, ctx)
            if name in shapes:
                self.fail(f"{name!r} is given twice", param, ctx)
            shapes[name] = tuple(numbers)
        return shapes


class TargetName(click.ParamType[str]):
    """A target's name; whether it exists is asked when it is used."""

    name = "target"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        """Ends click's "Missing option '--target'."."""
        return f"Choose from: {', '.join(_names())}"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin as what was typed."""
        return [CompletionItem(name) for name in _names() if name.startswith(incomplete)]


def json_option(command: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def quiet_option(command: F) -> F:
    """`-q`."""
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        help="No progress; when compiling, warnings and errors only.",
    )(command)


def preprocess_option(command: F) -> F:
    """`--preprocess`, for samples that are images."""
    return click.option(
        "--preprocess", metavar="size=224,…",
        help="What is done to images: size, resize, scale, mean, std, order, layout, dtype.",
    )(command)  # fmt: skip


def samples_of(source: Path, preprocess: str | None) -> Samples:
    """The samples that two options name together."""
    from qcompiler.images import Preprocess
    from qcompiler.samples import Samples

    return Samples(source, None if preprocess is None else Preprocess.parse(preprocess))


def verbose_option(command: F) -> F:
    """`-v`: kept by the terminal, so that errors know of it too."""
    return click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, is_eager=True, callback=_set_verbose,
        help="Tell more; show tracebacks of errors.",
    )(command)  # fmt: skip


def _set_verbose(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    ctx.obj.verbose = wanted


def _names() -> list[str]:
    from qcompiler.targets.catalog import TARGETS

    return list(TARGETS)
