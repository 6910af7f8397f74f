"""The project's vocabulary: words with a plainer or more usual synonym are not used."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A banned word and what to write instead.
BANNED = {
    r"anew": "again",
    r"beside": "next to",
    r"behaviours?": "behavior",
    r"colour\w*": "color",
    r"grey\w*": "gray",
    r"in whose place": "in place of",
    r"in so far": "if",
    r"licen[c]es?": "license",
    r"neighbour\w*": "neighbor",
    r"pictures?": "image",
    r"sees": "attends to, gets, reads",
    r"so many": "that many",
    r"stands?": "is",
    r"stock": "original",
    r"(is|are) told": "gets, knows",
    r"whereupon|wherein|thereof|therein": "a short sentence",
}

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
EXAMPLES = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.ipynb")]
SOURCES = [
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
    *(file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__)),
]


def written(file: Path) -> str:
    """Return the text of a file to check: for notebooks cells without outputs, for pages no names and errors."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return re.sub(r"`[^`\n]+`", "", text.split("\n## Errors\n")[0])
    if file.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def banned_words(text: str) -> list[str]:
    """Return each banned word with its line and what to write instead."""
    return [
        f"line {number}: {found[0]!r}, write {instead!r}"
        for number, line in enumerate(text.splitlines(), 1)
        for word, instead in BANNED.items()
        for found in re.finditer(rf"(?i)(?<!\w){word}(?!\w)", line)
    ]


@pytest.mark.parametrize(
    "file", sorted([*DOCUMENTS, *EXAMPLES, *SOURCES]), ids=lambda file: str(file.relative_to(ROOT))
)
def test_words(file):
    assert banned_words(written(file)) == []


@pytest.mark.parametrize("text", ["Draw it anew.", "two Pictures", "all that\nit is told", "a neighbouring tile"])
def test_banned_words_are_found(text):
    assert len(banned_words(text)) == 1


@pytest.mark.parametrize("text", ["besides", "outstanding", "to understand", "see_all", "standard"])
def test_other_words_are_not(text):
    assert banned_words(text) == []
