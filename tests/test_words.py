"""The words of the code and of the documentation are the field's, not ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    *(path for path in (ROOT / "src").rglob("*") if path.suffix in {".py", ".c", ".h", ".html"}),
    *(ROOT / "docs").glob("*"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / "examples").glob("*.py"),
]

# What stood here before, and what the field says instead.
HOME_MADE = {
    r"foretold|foretells?": "predicted",
    r"rehears\w*": "teacher-forced scoring",
    r"in company|company": "batch size, other requests",
    r"nobody|whoever|somebody": "the name of the part",
    r"told|tells|hears": "reports, says, receives",
    r"bears": "its cost is attributed to",
    r"lean target|general target": "native backend, transformers backend",
    r"look-ups?|looks? up in": "lookup",
    r"by_sure|sure of itself": "confidence",
    r"weighs?|weighed|weighing": "softmax, weighted by",
    r"anchor_labels|vector_labels|plan_label": "domain",
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_words_are_the_fields(file: Path) -> None:
    found = [
        f"line {number}: '{match[0]}' (write: {instead})"
        for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1)
        for words, instead in HOME_MADE.items()
        for match in re.finditer(rf"\b(?:{words})\b", line, re.IGNORECASE)
    ]
    assert not found


def test_the_rule_can_fail() -> None:
    assert re.search(r"\b(?:told|tells|hears)\b", "it is told", re.IGNORECASE)
    assert any(file.suffix == ".c" for file in FILES)
