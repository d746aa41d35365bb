"""torch.export programs in: the same numbers, dynamic shapes kept."""

import numpy as np
import pytest
from golden import sqnr

import qcompiler

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128), torch.nn.Linear(128, 10)
    ).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (torch.zeros(2, 64),), dynamic_shapes=({0: batch},))
    return module, exported


@pytest.mark.parametrize("target", ["arm-int8", "cuda-int4"])
def test_compiles_an_exported_program(program, target, tmp_path):
    module, exported = program
    report = qcompiler.compile(exported, target, tmp_path / "b")
    assert report.count("body") >= 2
    session = qcompiler.load(report.bundle)
    for rows in (1, 5):
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        with torch.no_grad():
            expected = module(torch.from_numpy(x)).numpy()
        (feed,) = session.get_inputs()
        assert sqnr(expected, session.run(None, {feed.name: x})[0]) > 15
