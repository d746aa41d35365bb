"""The dialect reference at the end of docs/ir.md, out of the dialect itself.

python -m qcompiler.ir.reference docs/ir.md
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from qcompiler.ir.dialect import OPS, DialectOp
from qcompiler.ir.region import HALF

__all__ = ["MARK", "main", "reference"]

MARK = "<!-- What follows is written by python -m qcompiler.ir.reference docs/ir.md -->\n"
"""What comes before it in the file is kept."""


def reference() -> str:
    """A section for each op: signature, stage, body."""
    return "".join(f"\n{_section(op)}" for op in OPS.values())


def _section(op: DialectOp) -> str:
    attributes = f" <{', '.join(op.attributes)}>" if op.attributes else ""
    call = f"{', '.join(op.outputs)} = {op.name}{attributes} ({', '.join(op.inputs)})"
    operands = "\n".join(_operand(op, name) for name in (*op.inputs, *op.outputs))
    body = re.sub(r"\{(=?)([a-z]\w*)\}", _attribute, textwrap.dedent(op.body + op.ending)).strip()
    text = f"{call}\n\n{operands}\n\n{body}"
    return f"### {op.name}\n\nFrom stage `{op.stage}` on.\n\n```\n{text}\n```\n"


def _operand(op: DialectOp, name: str) -> str:
    dtype, shape = op.type_of(name).name.lower(), dict(op.shapes).get(name, "")
    if op.type_of(name) is not op.type_of(name, (HALF,)):
        dtype += " or half"
    return f"{name:6} {dtype:13} {shape and f'[{shape}]'}".rstrip()


def _attribute(match: re.Match[str]) -> str:
    name = match[2]
    return f"= @{name}" if match[1] else f"{name} = @{name}"


def main(path: str) -> None:
    """Write the reference into a file, below the mark."""
    file = Path(path)
    file.write_text(file.read_text().partition(MARK)[0] + MARK + reference())


if __name__ == "__main__":
    main(sys.argv[1])
