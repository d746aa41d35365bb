"""Choices that are made again, and the shapes that they are made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import mlp

import qcompiler
from qcompiler.ir.decisions import Decision
from qcompiler.ir.errors import OptionError
from qcompiler.report import Report
from qcompiler.timing.record import Record


def test_choices_made_on_different_times_are_told_together():
    whys = [f"float is faster here: {time} us against ORT's int8 99 us (…)" for time in (4.1, 50)]
    nodes = tuple(Decision(str(index), "Conv", "float", why) for index, why in enumerate(whys))
    (group,) = Report(Path("b"), "x86-int8", nodes, 0).groups()
    assert (group.why, group.count) == ("float is faster here", 2)


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    """A bundle with choices."""
    return qcompiler.compile(
        mlp(), "x86-int8", tmp_path_factory.mktemp("estimated") / "b", timing=False
    ).bundle


def test_a_record_reads_back(estimated):
    record = Record.read(estimated, "x86-int8")
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert [site.site for site in record.sites] == ["MatMul 64x48", "MatMul 48x64"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no choices: .* does not exist; give a bundle"),
        ("no JSON", "holds no choices that can be read"),
        ({"target": "arm-int8"}, "are for arm-int8, not for x86-int8"),
        ({"choices": None}, "holds no choices: its bundle was made with passes of its own"),
        ({"choices": {"sites": [{}]}}, r"holds no choices that can be read \(KeyError\('choice'\)"),
        ({"choices": {"sites": [{"choice": "gpu"}]}}, "unknown choice 'gpu'"),
        ({"choices": {"sites": [], "whole": [], "lost": 3}}, "lost is 3, not a text"),
    ],
)
def test_choices_that_cannot_be_made_again(tmp_path, estimated, change, message):
    copy = tmp_path / "bundle"
    if change is not None:
        shutil.copytree(estimated, copy)
        manifest = copy / "manifest.json"
        content = json.loads(manifest.read_text())
        text = change if isinstance(change, str) else json.dumps(content | change)
        manifest.write_text(text)
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(mlp(), "x86-int8", tmp_path / "b", choices=copy)
    assert not (tmp_path / "b").exists()


def test_choices_of_another_model(tmp_path, estimated):
    with pytest.raises(OptionError, match="another model .*: for node .* they hold MatMul 64x48"):
        qcompiler.compile(mlp(width=32), "x86-int8", tmp_path / "b", choices=estimated)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "no input 'z'; the inputs are x"),
        ({"x": (1, 65)}, r"x=1x65 does not fit, the model takes \['m', 64\]"),
        ({"x": (0, 64)}, r"shapes: x=\(0, 64\): sizes are whole numbers from 1"),
        ({"x": (1.5, 64)}, r"shapes: x=\(1.5, 64\): sizes are whole numbers from 1"),
        ({"x": 64}, "shapes: x=64: sizes are whole numbers from 1"),
    ],
)
@pytest.mark.parametrize("timing", [True, False])
def test_shapes_that_do_not_fit(tmp_path, shapes, message, timing):
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(mlp(), "x86-int8", tmp_path / "b", shapes=shapes, timing=timing)


def test_shapes_decide_what_is_weighed(tmp_path):
    report = qcompiler.compile(
        mlp(), "x86-int8", tmp_path / "b", shapes={"x": (33, 64)}, timing=False
    )
    points = [site["costs"]["points"] for site in report.choices["sites"]]
    assert {row for site in points for _, (row, _) in site} == {33}


def test_shapes_and_choices_exclude_each_other(tmp_path, estimated):
    with pytest.raises(OptionError, match="shapes or choices, not both"):
        qcompiler.compile(
            mlp(), "x86-int8", tmp_path / "b", shapes={"x": (1, 64)}, choices=estimated
        )


def test_passes_of_ones_own_choose_nothing(tmp_path):
    passes = qcompiler.Pipeline.default(qcompiler.get_target("x86-int8"))
    report = qcompiler.compile(mlp(), "x86-int8", tmp_path / "b", pipeline=passes)
    assert report.choices is None
    for options in ({"shapes": {"x": (1, 64)}}, {"choices": tmp_path / "b"}):
        with pytest.raises(OptionError, match="a pipeline of your own chooses nothing: leave out"):
            qcompiler.compile(mlp(), "x86-int8", tmp_path / "c", pipeline=passes, **options)
