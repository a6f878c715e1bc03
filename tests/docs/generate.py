"""Writes the pages of docs/reference/ that are generated from the code.

    python -m tests.docs.generate

`test_reference.py` fails where a committed page is not the one that the code gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.docs.commands import commands_page
from tests.docs.errors import errors_page
from tests.docs.files import jobs_page, rules_page
from tests.docs.routes import http_page

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGES: Mapping[str, Callable[[], str]] = {
    "cli.md": commands_page,
    "errors.md": errors_page,
    "http.md": http_page,
    "jobs.md": jobs_page,
    "rules.md": rules_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
