"""Look at a model between its passes: print it, or keep it as a file that ONNX Runtime runs.

pipeline.run(model, watchers=[PrintAfter(["fold-qdq"], print), DumpModels("dumps")])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompiler.destination import check_writable
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.graph import every_graph
from qcompiler.model_file import WeightFile, saving
from qcompiler.step import Step, Watcher

__all__ = ["DumpModels", "PrintAfter", "check_dumps"]

_WEIGHTS = "weights.data"
_INDEX = "qcompiler-dump.txt"
"""Names the files that a dump wrote, one per line: only those are ever deleted."""


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
            OptionError: The folder holds other files, or the model's own, or cannot be written.
        """
        self._check_weights(model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files = list(self.folder.iterdir())
            index = self.folder / _INDEX
            written = index.read_text(encoding="utf-8").split("\n") if index.exists() else []
        except OSError as error:
            raise OptionError(f"cannot write to {self.folder}: {error.strerror}") from error
        for file in files:
            if file.name not in (*written, _INDEX):
                raise OptionError(
                    f"the folder {self.folder} for dumps holds other files ({file.name}); name "
                    "another"
                )
        for file in files:
            file.unlink()
        self._note(_WEIGHTS)
        self._weights = WeightFile(self.folder / _WEIGHTS)
        self._count = 0
        self._save(model, "source")

    def after(self, step: Step, model: ir.Model, changed: bool) -> None:
        """Write the model."""
        self._save(model, step.name)

    def check_apart(self, what: str, path: Path) -> None:
        """Refuse a file or folder that the dumps would be mixed with.

        Raises:
            OptionError: It lies in the folder, or the folder in it.
        """
        folder, path = self.folder.resolve(), path.resolve()
        if path.is_relative_to(folder) or folder.is_relative_to(path):
            raise OptionError(
                f"the folder {self.folder} for dumps and the {what} {path} lie in one another; "
                "name another folder"
            )

    def _check_weights(self, model: ir.Model) -> None:
        for graph in every_graph(model.graph):
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    self.check_apart("weights", Path(value.const_value.path))

    def _save(self, model: ir.Model, name: str) -> None:
        file = f"{self._count:02}-{name}.onnx"
        self._note(file)
        self._weights.save_model(model, self.folder / file)
        self._count += 1

    def _note(self, name: str) -> None:
        """Add a file to the index, before it is written."""
        with saving(self.folder / _INDEX), (self.folder / _INDEX).open("a", encoding="utf-8") as f:
            f.write(f"{name}\n")


def check_dumps(watchers: Sequence[Watcher], source: object, output: Path) -> None:
    """Refuse to dump where nothing can be written, or where the model comes from or goes to.

    Args:
        watchers: Of a run that is about to start.
        source: The model; its path, if it is a file.
        output: What will be written.

    Raises:
        OptionError: A folder for dumps cannot be written, or it and one of the two lie in one
            another.
    """
    for watcher in watchers:
        if isinstance(watcher, DumpModels):
            index, what = watcher.folder / _INDEX, f"the folder {watcher.folder} for dumps"
            check_writable(index, what, "name another folder")
            if isinstance(source, str | os.PathLike):
                watcher.check_apart("model", Path(source))
            watcher.check_apart("output", output)
