"""Look at a model between its passes: print it, or keep it as a file that ONNX Runtime runs.

pipeline.run(model, watchers=[PrintAfter(["fold-qdq"], print), DumpModels("dumps")])
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.model_file import WeightFile
from qcompiler.step import Step, Watcher

__all__ = ["DumpModels", "PrintAfter"]

_WEIGHTS = "weights.data"


class PrintAfter(Watcher):
    """Writes the model as text after some passes; weights are named, not printed."""

    def __init__(self, names: Sequence[str], write: Callable[[str], None]) -> None:
        """Take the facts.

        Args:
            names: Of passes.
            write: Takes the text, several lines.
        """
        self.names, self.write = names, write

    def start(self, steps: Sequence[Step], model: ir.Model) -> None:
        """Check the names.

        Raises:
            OptionError: No pass of this run is called so.
        """
        known = [step.name for step in steps]
        for name in self.names:
            if name not in known:
                hint = did_you_mean(name, known) or f"; those are {', '.join(known)}"
                raise OptionError(f"print after {name!r}: no such pass runs{hint}")

    def after(self, step: Step, model: ir.Model, changed: bool) -> None:
        """Print."""
        if step.name in self.names:
            self.write(
                f"# after {step.name}{'' if changed else ', which changed nothing'}\n{model}"
            )


class DumpModels(Watcher):
    """Writes `00-source.onnx`, then a numbered file per pass; weights are shared by all of them."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Name the folder; it is made, and files of an earlier run are replaced."""
        self.folder = Path(folder)
        self._count = 0

    def start(self, steps: Sequence[Step], model: ir.Model) -> None:
        """Empty the folder, and write the model as it came.

        Raises:
            OptionError: The folder holds other files, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files = list(self.folder.iterdir())
        except OSError as error:
            raise OptionError(f"cannot write to {self.folder}: {error.strerror}") from error
        for file in files:
            if file.name != _WEIGHTS and not re.fullmatch(r"\d\d-.*\.onnx", file.name):
                raise OptionError(
                    f"the folder {self.folder} for dumps holds other files ({file.name}); name "
                    "another"
                )
        for file in files:
            file.unlink()
        self._weights = WeightFile(self.folder / _WEIGHTS)
        self._count = 0
        self._save(model, "source")

    def after(self, step: Step, model: ir.Model, changed: bool) -> None:
        """Write the model."""
        self._save(model, step.name)

    def _save(self, model: ir.Model, name: str) -> None:
        self._weights.save_model(model, self.folder / f"{self._count:02}-{name}.onnx")
        self._count += 1
