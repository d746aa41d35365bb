"""A step of a pipeline: a pass, the stage it leaves the model in, and what it depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter

from qcompiler.ir.errors import OptionError, QCompilerError
from qcompiler.ir.stages import Interface, Stage, source_problems, verify
from qcompiler.passes.canonicalize import OPSET, Canonicalize

__all__ = [
    "Rewrite", "Step", "Watcher", "as_pass", "canonical_first", "check_watchers", "name_of",
]  # fmt: skip

_CANONICAL, _OURS = "canonicalize", "qcompiler.passes."

Rewrite: TypeAlias = (
    "ir.passes.PassBase | rewriter.RewriteRule | rewriter.RewriteRuleSet "
    "| Sequence[rewriter.RewriteRule]"
)
"""What a pipeline runs: an `onnx_ir` pass, or rules of `onnxscript.rewriter`."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of a pipeline.

    Attributes:
        name: What it is called on the command line.
        rewrite: The pass; any `onnx_ir` pass will do.
        stage: What the model must satisfy afterwards.
        needs: What the pass depends on beside the model: the target, or plans made before it.
    """

    name: str
    rewrite: ir.passes.PassBase
    stage: Stage
    needs: Literal["", "target", "plans"] = ""

    @property
    def rounds(self) -> bool:
        """Whether the pass says of itself (`rounds = True`) that it may change the numbers."""
        return bool(getattr(self.rewrite, "rounds", False))

    def apply(
        self,
        model: ir.Model,
        stage: Stage | None = None,
        known: Collection[tuple[str, str]] | None = None,
    ) -> ir.passes.PassResult:
        """Run the pass and verify what it leaves.

        Args:
            model: Changed in place by a pass that works in place.
            stage: What the model must satisfy, if it was beyond the stage of this pass already.
            known: The `source_problems` of the model before this pass, or before one that ran
                earlier; by default they are looked for.

        Raises:
            QCompilerError: A mistake in the input, as the pass found it.
            VerifyError: The pass broke a rule of its stage.
            onnx_ir.passes.PassError: Anything else that it raised, with its name.
        """
        known = source_problems(model) if known is None else known
        changes = getattr(self.rewrite, "changes_interface", False)
        interface = None if changes else Interface.of(model)
        result = self.rewritten(model)
        verify(result.model, stage or self.stage, self.name, known, interface)
        return result

    def rewritten(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass, and verify nothing.

        Raises:
            QCompilerError: A mistake in the input, as the pass found it.
            onnx_ir.passes.PassError: Anything else that it raised, with its name.
        """
        try:
            with _uncollected():
                return self.rewrite(model)
        except (QCompilerError, OSError, MemoryError, ImportError):
            raise  # not about the pass
        except Exception as error:
            # onnx_ir wraps what happens inside a sequence of passes; ours speak for themselves.
            if isinstance(error.__cause__, QCompilerError):
                raise error.__cause__ from None
            raise ir.passes.PassError(f"{self.name}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage: walks over 100,000 nodes take longer than a pass."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def canonical_first(
    steps: Sequence[Step], model: ir.Model
) -> tuple[Sequence[Step], tuple[str, ...]]:
    """The steps, canonicalize before the first of ours if the model is older than what they write.

    Returns:
        Them, and what to tell the user.
    """
    opset = model.opset_imports.get("", OPSET)
    ours = (i for i, s in enumerate(steps) if type(s.rewrite).__module__.startswith(_OURS))
    first = next(ours, None)
    if opset >= OPSET or first is None:
        return steps, ()
    if any(step.name == _CANONICAL for step in steps[: first + 1]):  # or what stands for it
        return steps, ()
    told = (
        f"{_CANONICAL} runs before {steps[first].name}: what that writes may need opset {OPSET}, "
        f"and the model has {opset}"
    )
    added = Step(_CANONICAL, Canonicalize(), Stage.FLOAT)
    return [*steps[:first], added, *steps[first:]], (told,)


class Watcher:
    """Looks at the model between passes: derive from it, and override what is to be seen."""

    def start(self, steps: Sequence[Step], model: ir.Model) -> None:
        """Called once, before the first pass of a run."""

    def before(self, step: Step, model: ir.Model) -> None:
        """Called before each pass."""

    def after(self, step: Step, model: ir.Model, changed: bool) -> None:
        """Called after each pass, once its result is verified."""


def check_watchers(watchers: Iterable[Watcher]) -> None:
    """Refuse what is no watcher.

    Raises:
        OptionError: Names it.
    """
    if not isinstance(watchers, Iterable):
        raise OptionError(f"watchers must be a list of watchers, not {watchers!r}")
    for watcher in watchers:
        if not isinstance(watcher, Watcher):
            raise OptionError(f"watchers: {watcher!r} is no qcompiler.step.Watcher")


def as_pass(rewrite: Rewrite) -> ir.passes.PassBase:
    """Rules as a pass whose new values have names, which the verifier asks for.

    Raises:
        OptionError: It is neither a pass nor rules.
    """
    if isinstance(rewrite, ir.passes.PassBase):
        return rewrite
    if isinstance(rewrite, rewriter.RewriteRule):
        rewrite = [rewrite]
    if not isinstance(rewrite, rewriter.RewriteRuleSet):
        _check_rules(rewrite)
    return ir.passes.Sequential(
        rewriter.RewritePass(rewrite), common.RemoveUnusedNodesPass(), common.NameFixPass()
    )


def _check_rules(rules: object) -> None:
    for rule in rules if isinstance(rules, Sequence) else [rules]:
        kind = rule if isinstance(rule, type) else type(rule)
        if issubclass(kind, rewriter.RewriteRuleClassBase):
            raise OptionError(f"give the rule of {kind.__name__}: {kind.__name__}.rule()")
        if isinstance(rule, type) and issubclass(kind, ir.passes.PassBase):
            raise OptionError(f"give a pass, not its class: {kind.__name__}()")
        if not isinstance(rule, rewriter.RewriteRule):
            raise OptionError(
                f"{rule!r} is no pass: give an onnx_ir.passes.PassBase, or rules of "
                "onnxscript.rewriter"
            )
    if not rules:
        raise OptionError("a list of rewrite rules is empty")


def name_of(rewrite: object) -> str:
    """What the class of a pass is called on the command line: MyPass is "my-pass".

    Raises:
        OptionError: It is no pass, or rules, which have no names.
    """
    if isinstance(rewrite, str):
        raise OptionError(f"the pass to be called {rewrite!r} is missing: give it after its name")
    as_pass(rewrite)
    if not isinstance(rewrite, ir.passes.PassBase):
        raise OptionError("rules have no name of their own: give one before them")
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", type(rewrite).__name__)
    return words.strip("_").lower()
