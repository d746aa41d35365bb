"""docs/ir.md: the dialect reference is the code's, and what the text says exists."""

import re
from pathlib import Path

from qcompiler.ir import dialect, reference
from qcompiler.ir.types import QuantSpec, QuantType

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "ir.md").read_text()


def test_the_reference_is_what_the_generator_writes(tmp_path):
    copy = tmp_path / "ir.md"
    copy.write_text(TEXT.partition(reference.MARK)[0] + reference.MARK + "what was there before")
    reference.main(str(copy))
    assert copy.read_text() == TEXT, "run python -m qcompiler.ir.reference docs/ir.md"


def test_every_op_has_its_signature_and_body():
    for op in dialect.OPS.values():
        _, _, section = TEXT.partition(f"### {op.name}\n")
        section = section.partition("###")[0]
        assert f"From stage `{op.stage}` on." in section
        for line in op.body.strip().splitlines():
            assert line.partition("<")[0].strip() in section


def test_the_types_of_the_text_parse():
    texts = re.findall(r"((?:dynamic )?quant<[a-z][^<>]*>)", TEXT)
    assert len(texts) > 4
    for text in texts:
        parsed = QuantSpec.parse(text) if text.startswith("dynamic") else QuantType.parse(text)
        assert str(parsed) == text


def test_every_rule_is_in_the_table():
    files = (f"{name}_rules" for name in ("onnx", "qdq", "shape", "signature"))
    code = "".join((ROOT / "ir" / f"{name}.py").read_text() for name in ("stages", *files))
    rules = set(re.findall(r'(?:yield \(?\s*|\(\()"([a-z-]+)",', code))
    table = re.findall(r"^\| (`[a-z`, -]+`) \|", TEXT.partition("| rule |")[2], re.MULTILINE)
    assert rules == set(re.findall(r"`([a-z-]+)`", " ".join(table)))
