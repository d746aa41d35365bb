"""The passes of a compilation, in order, each with the stage it must leave the model in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import onnx_ir as ir

from qcompiler.arguments import require
from qcompiler.default_steps import default_steps
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.region import Region
from qcompiler.ir.stages import Stage, source_problems
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.passes.options import configured
from qcompiler.pipeline_recipe import recipe_of, told_by_recipe
from qcompiler.pipeline_text import parse_pipeline
from qcompiler.recipe import Recipe
from qcompiler.step import Rewrite, Step, Watcher, as_pass, canonical_first, check_watchers, name_of
from qcompiler.targets import catalog
from qcompiler.targets.target import Target

__all__ = ["Pipeline", "Step", "Watcher"]

_AN_ATTENTION = Region("Attention", (("D", 64),))

_PLANS = "assign-precision"
"""The pass whose plans others carry out."""


class Pipeline:
    """An ordered list of passes that can be edited before it runs.

    pipeline = Pipeline.default("x86-int8").insert_after("fuse-gelu", MyPass())
    pipeline.configure("smooth-activations", alpha=(0.6,))
    model = pipeline.run(model)

    Attributes:
        steps: The passes.
        target: What they were made for; None if nobody said.
        recipe: What they were told to do differently.
        added: Passes that nobody named, for people.
    """

    def __init__(
        self, steps: Iterable[Step], target: Target | None = None, recipe: Recipe | None = None
    ) -> None:
        self.steps = list(steps)
        self.target, self.recipe = target, recipe or Recipe()
        self.added: tuple[str, ...] = ()
        self._told: tuple[str, ...] = ()

    @classmethod
    def default(
        cls,
        target: Target | str,
        recipe: Recipe | None = None,
        runs: ModelRuns | None = None,
        choose: ChooseKernels | None = None,
        supports: Callable[[Region], str | None] | None = None,
        left: str | None = None,
    ) -> Pipeline:
        """The passes of a target.

        Args:
            target: A target, or its name.
            recipe: What to do differently.
            runs: What passes learn by running the model: `ModelRuns.on(samples)`.
            choose: What decides where quantizing gains something; without it, everywhere.
            supports: Why there is to be no kernel for a region; by default the target's word.
            left: Why integer products of the source are left to ONNX Runtime where it has them.

        Raises:
            OptionError: An unknown target, or a recipe that does not fit it.
        """
        if not isinstance(target, Target | str):
            raise OptionError(f"target must be a name or a Target, not {target!r}")
        require("recipe", recipe, Recipe, "a qcompiler.Recipe")
        require("runs", runs, ModelRuns, "a qcompiler.model_runs.ModelRuns")
        recipe = recipe or Recipe()
        goal = catalog.get_target(target) if isinstance(target, str) else target
        supports = supports or (lambda region: catalog.unsupported(goal, region))
        if recipe.attention is not None and catalog.unsupported(goal, _AN_ATTENTION) is not None:
            raise OptionError(
                f"attention {recipe.attention!r}: {goal.name} has no kernel of attention; leave "
                "it out"
            )
        steps = default_steps(goal, recipe, runs or ModelRuns(), choose, supports, left)
        pipeline = cls(steps, goal, recipe)
        if not recipe.smooth:
            pipeline.remove("smooth-activations")
        pipeline.steps = told_by_recipe(pipeline.steps, recipe)
        return pipeline

    @classmethod
    def parse(
        cls, text: str, target: Target | str | None = None, recipe: Recipe | None = None
    ) -> Pipeline:
        """Some of the passes of a target, as text: see `qcompiler/pipeline_text.py`.

        Args:
            text: Such as "canonicalize, smooth-activations{alpha=0.6}".
            target: A target, or its name; None if no pass of the text depends on one.
            recipe: What to do differently.

        Raises:
            OptionError: An unknown pass or option, a value it does not take, or a pass that needs
                a target, or another pass that comes after it.
        """
        default = cls.default(target or next(iter(catalog.TARGETS)), recipe)
        chosen = default.select(text, complete=target is not None)
        if target is None:
            chosen.check_needs_no_target()
        return chosen

    def select(self, text: str, *, complete: bool = True) -> Pipeline:
        """Those passes of this pipeline that a text names, in its order and with its options.

        Args:
            text: See `parse`.
            complete: Whether assign-precision, if the text has none, is added before the first pass
                that needs its plans, which files do not hold.

        Raises:
            OptionError: As by `parse`.
        """
        steps = {step.name: step for step in self.steps}
        items = parse_pipeline(text, list(steps))
        addable = complete and _PLANS in steps and all(item.name != _PLANS for item in items)
        pipeline = Pipeline([], self.target, self.recipe)
        for item in items:
            step = steps[item.name]
            rewrite = configured(step.rewrite, item.name, item.options)
            if step.needs == "plans" and all(other.name != _PLANS for other in pipeline):
                if not addable:
                    raise OptionError(
                        f"{item.name} needs the plans of {_PLANS}, which files do not hold; "
                        f"run both: {_PLANS},{item.name} with --target TARGET"
                    )
                pipeline.steps.append(steps[_PLANS])
                pipeline.added = (f"{_PLANS} runs before {item.name}, which needs its plans",)
            pipeline.steps.append(dataclasses.replace(step, rewrite=rewrite))
        return pipeline

    def up_to(self, stage: Stage) -> Pipeline:
        """The passes before the first that leaves the model beyond a stage.

        Raises:
            OptionError: There are none.
        """
        steps = list(itertools.takewhile(lambda step: step.stage <= stage, self.steps))
        if self.steps and not steps:
            raise OptionError(
                f"nothing to do up to stage {stage.name.lower()}: {self.steps[0].name}, the first "
                f"pass, leaves the model at stage {self.steps[0].stage.name.lower()}"
            )
        pipeline = Pipeline(steps, self.target, self.recipe)
        pipeline.added = self.added
        return pipeline

    def check_needs_no_target(self) -> None:
        """Check that the passes may run though nobody named a target.

        Raises:
            OptionError: One depends on it.
        """
        for step in self.steps:
            if step.needs == "target":
                raise OptionError(f"{step.name} depends on the target: add --target TARGET")

    @property
    def effective_recipe(self) -> Recipe:
        """The recipe with the options of all passes as they are, to do the same another time."""
        return recipe_of(self.steps, self.recipe)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the passes that ran want the user to know."""
        told = (n for step in self.steps for n in getattr(step.rewrite, "notes", ()))
        return (*self.added, *self._told, *told)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(step.name for step in self.steps)})"

    def insert_before(
        self, anchor: str, name: str | Rewrite, rewrite: Rewrite | None = None
    ) -> Pipeline:
        """Insert a pass before the one called `anchor`, in that one's preceding stage.

        Args:
            anchor: The name of a pass.
            name: What to call the new one; if left out, as its class: `MyPass` is "my-pass".
            rewrite: The pass, or rules.

        Returns:
            This pipeline.

        Raises:
            OptionError: No such pass, one of that name, or what is no pass.
        """
        index = self._index(anchor)
        stage = self.steps[index - 1].stage if index else Stage.FLOAT
        return self._insert(index, name, rewrite, stage)

    def insert_after(
        self, anchor: str, name: str | Rewrite, rewrite: Rewrite | None = None
    ) -> Pipeline:
        """Insert a pass after the one called `anchor`, in the same stage; see `insert_before`."""
        index = self._index(anchor)
        return self._insert(index + 1, name, rewrite, self.steps[index].stage)

    def replace(self, name: str, rewrite: Rewrite) -> Pipeline:
        """Let another pass do the work of the one called `name`."""
        index = self._index(name)
        self.steps[index] = dataclasses.replace(self.steps[index], rewrite=as_pass(rewrite))
        return self

    def configure(self, name: str, **options: Any) -> Pipeline:
        """Set options of the pass called `name`.

        Raises:
            OptionError: No such pass or option, or a value it does not take.
        """
        return self.replace(name, configured(self.steps[self._index(name)].rewrite, name, options))

    def remove(self, name: str) -> Pipeline:
        """Leave out the pass called `name`."""
        del self.steps[self._index(name)]
        return self

    def run(
        self,
        model: ir.Model,
        on_step: Callable[[Step], None] | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> ir.Model:
        """Run every pass and verify the model after each.

        Where a model is older than what our passes write, canonicalize runs before the first.

        Args:
            model: Changed in place by passes that work in place.
            on_step: Called before each pass.
            watchers: Shown the model at the start, and before and after each pass.

        Returns:
            The rewritten model.

        Raises:
            QCompilerError: A mistake in the input, as the pass found it.
            VerifyError: A pass broke a rule of its stage.
            onnx_ir.passes.PassError: Anything else that a pass raised, with its name.
        """
        if not isinstance(model, ir.Model):
            raise OptionError(f"run takes an onnx_ir.Model, not {model!r}: onnx_ir.load(path)")
        check_watchers(watchers)
        stage, known = Stage.FLOAT, source_problems(model)
        steps, told = canonical_first(self.steps, model)
        self._told = told
        for watcher in watchers:
            watcher.start(steps, model)
        for step in steps:
            if on_step is not None:
                on_step(step)
            for watcher in watchers:
                watcher.before(step, model)
            # A pass for floats may run late, on what is left of them.
            stage = max(stage, step.stage)
            result = step.apply(model, stage, known)
            model = result.model
            for watcher in watchers:
                watcher.after(step, model, result.modified)
        return model

    def _insert(
        self, index: int, name: str | Rewrite, rewrite: Rewrite | None, stage: Stage
    ) -> Pipeline:
        if rewrite is None:
            name, rewrite = name_of(name), name
        if not isinstance(name, str):
            raise OptionError(f"the name of a pass is a text, not {name!r}")
        if any(step.name == name for step in self.steps):
            raise OptionError(
                f"the pipeline has a pass {name!r}: give the new one another name, or replace it"
            )
        self.steps.insert(index, Step(name, as_pass(rewrite), stage))
        return self

    def _index(self, name: str) -> int:
        names = [step.name for step in self.steps]
        if name not in names:
            raise OptionError(f"no pass {name!r} in the pipeline{did_you_mean(str(name), names)}")
        return names.index(name)
