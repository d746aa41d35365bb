"""A torch model, exported with a batch of any size, compiled for x86-int8, and run beside torch."""

import tempfile
from pathlib import Path

import numpy as np
import torch

import qcompiler


def main() -> None:
    """Export, compile, and compare."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(384, 1536), torch.nn.GELU(), torch.nn.Linear(1536, 384)
    ).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.zeros(2, 384),), dynamic_shapes=shapes)

    with tempfile.TemporaryDirectory() as folder:
        report = qcompiler.compile(program, "x86-int8", Path(folder) / "mlp")
        session = qcompiler.load(report.bundle)
        print(
            f"{report.bytes_before:,} bytes of torch weights, {report.bytes_after:,} in the bundle"
        )
        for decision in report.decisions:
            print(f"  {decision.action:6} {decision.op:12} {decision.why}")
        for rows in (1, 7, 128):
            x = torch.randn(rows, 384)
            expected = model(x).detach().numpy()
            (y,) = session.run(None, {"input": x.numpy()})
            noise = np.mean((y - expected) ** 2) / np.mean(expected**2)
            print(f"{rows:4} rows: an error {-10 * np.log10(noise):.1f} dB below the output")


if __name__ == "__main__":
    main()
