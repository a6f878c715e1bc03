"""The documentation as it is in the repository: its files, their fenced blocks, and the commands in a shell block."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "infra" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
"""Everything for readers but the specification of the artifact, which holds no commands."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, and what is in it."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page. Indented code is refused: it has no language, so nothing would check it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    begin: int | None = None
    for number, line in enumerate(lines):
        fence = re.fullmatch(r" *```(\w*)", line)
        if fence and begin is None:
            begin, language = number, fence[1]
            indent = line.index("`")
        elif fence and begin is not None:
            yield Block(path, begin + 2, language, "\n".join(text[indent:] for text in lines[begin + 1 : number]))
            begin = None
        elif begin is None and line.startswith("    ") and not lines[number - 1].strip():
            raise AssertionError(f"{path}:{number + 1}: indented code: put it into a fence with a language")
    assert begin is None, f"{path}: a fence is not closed"


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"))


def statements(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, as words: without comments, and each side of `&&` or `|` by itself."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += "$:,@%+"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ("&&", "||", "|", ";", "&"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(path))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
