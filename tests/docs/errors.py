"""The page of the errors, from `podquant.errors`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from podquant import errors
from podquant.errors import PodquantError
from tests.docs.markdown import page, prose, summary, table


def errors_page() -> str:
    """docs/reference/errors.md."""
    tree = (inspect.getdoc(errors) or "").partition("\n\n")[2]
    return page(
        "Errors",
        prose("""
            Every error that podquant raises on purpose is a `PodquantError` (`podquant.errors`). A command and a job
            print it in one line and exit with status 1; [the server](http.md#errors) answers a `RequestError`. A
            message says what, where, expected, got, and what to do.
        """),
        f"```text\n{tree}\n```\n",
        table(["error", "means"], [[f"`{kind.__name__}`", summary(kind)] for kind in _kinds(PodquantError)]),
    )


def _kinds(kind: type[PodquantError]) -> Iterator[type[PodquantError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _kinds(below)
