"""Progress in bytes on stderr: a bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

_LINE_SECONDS = 5.0


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how much of `total` bytes is done; yields the function to call with the bytes done since the last call."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(what, total) as advance:
        yield advance


class LoadProgress:
    """Shows a load from its first news to its last, again if there is another; called with bytes done and in all."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stack = ExitStack()
        self._advance: Callable[[int], None] | None = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        if done < self._done:
            self.close()
        if self._advance is None:
            self._advance = self._stack.enter_context(progress(self._what, total))
        self._advance(done - self._done)
        self._done = done

    def close(self) -> None:
        """Leave the display as it is."""
        self._stack.close()
        self._advance, self._done = None, 0


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _lines(what: str, total: int) -> Iterator[Callable[[int], None]]:
    begin = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if time.monotonic() - shown >= _LINE_SECONDS:
            shown = time.monotonic()
            line()

    def line() -> None:
        seconds = max(time.monotonic() - begin, 1e-9)
        left = f", {(total - done) * seconds / done:.0f} s left" if 0 < done < total else ""
        print(
            f"{what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {done / seconds / 1e9:.2f} GB/s{left}",
            file=sys.stderr,
        )

    yield advance
    line()
