"""`qcompile inspect`: what a model or a bundle holds, without running it."""

from __future__ import annotations

import collections
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.decisions import decision_table
from qcompiler.cli.figures import FigureTable, facts, size
from qcompiler.cli.options import FILE, Command, json_option, verbose_option
from qcompiler.ir.errors import BundleError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.bundle import LibraryEntry, Manifest
    from qcompiler.report import Group

__all__ = ["inspect_command"]

_QUANTIZED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "MatMulInteger", "ConvInteger", "MatMulNBits", "MatMulBnb4", "QAttention", "QGemm",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
})  # fmt: skip


@click.command("inspect", cls=Command)
@click.argument("path", type=FILE, metavar="MODEL|BUNDLE")
@click.option(
    "--recipe",
    "recipe_alone",
    is_flag=True,
    help="Print the recipe that the bundle was made by, as TOML, and nothing else.",
)
@json_option
@verbose_option
@click.pass_obj
def inspect_command(terminal: Terminal, path: Path, recipe_alone: bool, as_json: bool) -> None:
    """Show what a model or a bundle holds."""
    if recipe_alone:
        _print_recipe(terminal, path, as_json)
        return
    if path.name == "manifest.json":
        path = path.parent
    if not path.is_dir():
        from qcompiler.frontend import load_model

        facts_of_model = _model_facts(path, load_model(path))
        if as_json:
            terminal.json(facts_of_model)
        else:
            _print_model(terminal, path, facts_of_model)
        return
    from qcompiler.bundle import Manifest

    manifest = Manifest.read(path)
    files = _files(path, manifest)
    groups = _groups(path, manifest)
    if as_json:
        content = dataclasses.asdict(manifest) | {"files": files}
        listed = [dataclasses.asdict(group) for group in groups]
        terminal.json({"kind": "bundle", "path": str(path), **content, "groups": listed})
    else:
        _print_bundle(terminal, path, manifest, files, groups)
    altered = [file["name"] for file in files if file["state"] != "as written"]
    if altered:
        raise BundleError(f"{path}: {', '.join(altered)}: not what was written; compile it again")


def _print_recipe(terminal: Terminal, path: Path, as_json: bool) -> None:
    """The whole recipe of a bundle.

    Raises:
        OptionError: It is not one of a bundle, but a file of its own, or unreadable.
    """
    from qcompiler.recipe import Recipe

    folder = path.parent if path.name == "manifest.json" else path
    if not folder.is_dir():
        raise BundleError(f"{path} is no bundle: only those have a recipe")
    recipe = Recipe.read(folder)
    if as_json:
        terminal.json(recipe.to_dict())
    else:
        terminal.out.print(recipe.to_toml(), end="", highlight=False, soft_wrap=True)


def _recipe_in_brief(path: Path, manifest: Manifest) -> str:
    """What a recipe has that is not everybody's."""
    from qcompiler.pipeline import Pipeline
    from qcompiler.recipe import Recipe

    given = Recipe.from_dict(manifest.recipe, str(path)).to_dict()
    defaults = Pipeline.default(manifest.target).effective_recipe.to_dict()
    rules, passes = given.pop("nodes", []), given.pop("passes", {})
    parts = [f"{key} = {value}" for key, value in given.items() if value != defaults.get(key)]
    parts += [f"{len(rules)} rule{'s' if len(rules) > 1 else ''} for nodes"] if rules else []
    parts += [
        f"{name}: {option} = {value}"
        for name, options in passes.items()
        for option, value in options.items()
        if value != defaults["passes"].get(name, {}).get(option)
    ]
    return ", ".join(parts)


def _model_facts(path: Path, model: ir.Model) -> dict[str, Any]:
    from qcompiler.ir.graph import every_node

    graph = model.graph
    tensors = [v.const_value for v in graph.initializers.values() if v.const_value is not None]
    weights = collections.Counter[str]()
    for tensor in tensors:
        weights[tensor.dtype.name.lower()] += tensor.nbytes
    given = [v for v in graph.inputs if v.name not in graph.initializers]
    ops = collections.Counter(node.op_type for node in every_node(graph))
    quantized = collections.Counter(
        node.op_type
        for node in every_node(graph)
        if node.op_type in _QUANTIZED or node.domain.startswith("qcompiler")
    )
    return {
        "kind": "model",
        "path": str(path),
        "opset": graph.opset_imports.get(""),
        "domains": sorted(domain for domain in graph.opset_imports if domain),
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "inputs": [_value(value) for value in given],
        "outputs": [_value(value) for value in graph.outputs],
        "weights": {"tensors": len(tensors), "bytes": weights.total(),
                    "by_type": dict(weights.most_common())},
        "nodes": ops.total(),
        "ops": dict(ops.most_common()),
        "functions": len(model.functions),
        "quantized": dict(quantized.most_common()),
    }  # fmt: skip


def _value(value: ir.Value) -> dict[str, Any]:
    shape = value.shape
    dims = None if shape is None else [d if isinstance(d, int) else d.value for d in shape]
    dtype = "unknown" if value.dtype is None else value.dtype.name.lower()
    return {"name": value.name, "dtype": dtype, "shape": dims}


def _print_model(terminal: Terminal, path: Path, found: dict[str, Any]) -> None:
    weights, out = found["weights"], terminal.out
    kinds = ", ".join(f"{name} {size(count)}" for name, count in weights["by_type"].items())
    domains = "".join(f", {domain}" for domain in found["domains"])
    quantized = ", ".join(f"{op} {count}" for op, count in found["quantized"].items())
    out.print(Text.assemble("\n", (str(path), "bold"), f"  {size(path.stat().st_size)}\n"))
    out.print(facts(
        ("Format", f"ONNX opset {found['opset']}{domains}"
                   + (f", by {found['producer']}" if found["producer"] else "")),
        *_signature("Input", found["inputs"]),
        *_signature("Output", found["outputs"]),
        ("Weights", f"{size(weights['bytes'])} in {weights['tensors']} tensors: {kinds}"),
        ("Quantized", f"already: {quantized}" if quantized else "no"),
        ("Nodes", f"{found['nodes']}: " + ", ".join(f"{o} {n}" for o, n in found["ops"].items())),
    ))  # fmt: skip
    out.print()
    if not found["domains"]:
        terminal.next(shlex.join(["qcompile", str(path), "--target"]) + " TARGET",
                      "qcompile targets")  # fmt: skip


def _signature(title: str, values: list[dict[str, Any]]) -> list[tuple[str, Text]]:
    width = max((len(value["name"]) for value in values), default=0)
    rows = []
    for index, value in enumerate(values):
        shape = "unknown shape" if value["shape"] is None else (
            f"[{', '.join('?' if d is None else str(d) for d in value['shape'])}]")  # fmt: skip
        text = Text(f"{value['name']:<{width}}  {value['dtype']} {shape}")
        rows.append((title if index == 0 else "", text))
    return rows


def _files(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Each file with its size, and whether it is what the manifest says."""
    files = []
    for name in manifest.files:
        file = path / name
        try:
            manifest.check_file(path, name)
            state = "as written"
        except BundleError:
            state = "altered" if file.is_file() else "missing"
        length = file.stat().st_size if file.is_file() else 0
        files.append({"name": name, "bytes": length, "state": state})
    return files


def _groups(path: Path, manifest: Manifest) -> list[Group]:
    from qcompiler.ir.decisions import Decision
    from qcompiler.report import Report

    try:
        decisions = tuple(Decision(**decision) for decision in manifest.decisions)  # type: ignore[arg-type]
        return Report(path, manifest.target, decisions, bytes_before=0).groups()
    except (TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path}: its manifest holds unreadable decisions ({error})") from error


def _kernels(library: LibraryEntry | None, groups: list[Group]) -> str:
    """Who computes what is quantized."""
    if library is not None:
        isa, glibc = ", ".join(library.isa), library.minimum_glibc
        return f"{isa} on {library.machine}, glibc {glibc} or newer"
    count = sum(group.count for group in groups if group.action == "body")
    if not count:
        return "none needed: every node is ONNX Runtime's own"
    return f"none: {count} node{'s' if count > 1 else ''} of ours run as function bodies"


def _print_bundle(
    terminal: Terminal, path: Path, manifest: Manifest, files: list[dict[str, Any]],
    groups: list[Group],
) -> None:  # fmt: skip
    out = terminal.out
    recipe = _recipe_in_brief(path, manifest)
    out.print(Text.assemble("\n", (str(path), "bold"), f"  a bundle for {manifest.target}\n"))
    out.print(facts(
        ("Needs", f"ONNX Runtime {manifest.minimum_ort} or newer"),
        ("Kernels", _kernels(manifest.library, groups)),
        ("Recipe", recipe or "the target's defaults"),
        ("Made by", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ))  # fmt: skip
    out.print()
    out.print(decision_table(groups))
    out.print()
    table = FigureTable("File", ">Size", "Content")
    for file in files:
        good = file["state"] == "as written"
        state = Text("intact" if good else file["state"], "green" if good else "bold red")
        table.add_row(file["name"], size(file["bytes"]), state)
    out.print(table)
    out.print()
