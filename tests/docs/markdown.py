"""Pieces of generated Markdown: tables, and what a docstring says of each attribute."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

NOTICE = "<!-- Generated from the code by `python -m tests.docs.generate`: change the code, then run it again. -->"


def page(title: str, *parts: str) -> str:
    """A whole page; parts are separated by an empty line."""
    return "\n".join([f"{NOTICE}\n\n# {title}\n", *parts])


def prose(text: str) -> str:
    """A paragraph on one line, however it is broken in the source."""
    return f"{' '.join(text.split())}\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; in cells `|` and line breaks are made harmless, and a last full stop goes."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").removesuffix(".")


def attributes(docstring: str) -> dict[str, str]:
    """What the section `Attributes:` of a docstring says, by name.

    `a, b: text` says it of both; further lines of an entry stand deeper than its name.
    """
    found: dict[str, str] = {}
    names: list[str] = []
    section = False
    for line in inspect.cleandoc(docstring).splitlines():
        entry = re.match(r"    ([\w, ]+): (.*)", line)
        if line == "Attributes:":
            section = True
        elif section and entry and not line.startswith("     "):
            names = [name.strip() for name in entry[1].split(",")]
            found |= dict.fromkeys(names, entry[2])
        elif section and line.startswith("     "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line.strip():
            section = False
    return found


def summary(owner: object) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(owner) or "").partition("\n\n")[0].split())


def first_sentence(text: str) -> str:
    """Up to the first full stop."""
    return text.partition(". ")[0].removesuffix(".")
