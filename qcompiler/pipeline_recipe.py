"""What a recipe tells the passes of a pipeline, and what they would tell a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qcompiler.default_steps import OPTIONS_OF_RECIPE
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.passes.options import configured
from qcompiler.pipeline_text import ALIASES, with_aliases
from qcompiler.recipe import Recipe
from qcompiler.step import Step

__all__ = ["recipe_of", "told_by_recipe"]


def told_by_recipe(steps: Sequence[Step], recipe: Recipe) -> list[Step]:
    """The steps with the options that a recipe gives their passes.

    Raises:
        OptionError: No such pass or option, a value it does not take, or an option that is a key of
            the recipe.
    """
    told = {step.name: step for step in steps}
    for given, options in recipe.passes.items():
        name = ALIASES.get(given, given)
        try:
            told[name] = _told(told, name, given, options, recipe.smooth)
        except OptionError as error:
            raise OptionError(f"{recipe.source}: passes: {error}") from error
    return list(told.values())


def _told(
    steps: Mapping[str, Step], name: str, given: str, options: Mapping[str, Any], smooth: bool
) -> Step:
    """One step with its options; `given` is what the recipe calls it."""
    if name == "smooth-activations" and not smooth:
        raise OptionError(f"{given!r} is left out by smooth = false")
    if name not in steps:
        hint = did_you_mean(name, with_aliases(steps)) or f"; one of {', '.join(steps)}"
        raise OptionError(f"no pass {given!r}{hint}")
    for option in options:
        if key := OPTIONS_OF_RECIPE.get((name, option)):
            raise OptionError(
                f"{name}: {option} is what the recipe calls {key}: write that at the top"
            )
    rewrite = configured(steps[name].rewrite, name, options)
    return dataclasses.replace(steps[name], rewrite=rewrite)


def recipe_of(steps: Iterable[Step], recipe: Recipe) -> Recipe:
    """A recipe with the options of all passes as they are, to do the same another time."""
    passes: dict[str, dict[str, Any]] = {}
    for step in steps:
        options = getattr(step.rewrite, "options", None)
        if dataclasses.is_dataclass(options) and not isinstance(options, type):
            passes[step.name] = dataclasses.asdict(options)
    told = {
        key: passes[name].pop(option)
        for (name, option), key in OPTIONS_OF_RECIPE.items()
        if name in passes
    }
    given = {name: options for name, options in passes.items() if options}
    return dataclasses.replace(recipe, **told, passes=given)
