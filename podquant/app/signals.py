"""What SIGTERM and Ctrl-C do: a conversion ends at its next step, a server ends wherever it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class StopSignal(BaseException):
    """SIGTERM or SIGINT arrived; a BaseException, so that no `except Exception` swallows it.

    Attributes:
        status: the exit status of a program that such a signal ends.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Within, SIGTERM exits as `sys.exit(143)` would, so that whatever is open is closed; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def raising_stop(is_stopped: threading.Event) -> Iterator[None]:
    """Within, SIGTERM and SIGINT set `is_stopped` and raise StopSignal; afterwards they do what they did before.

    An exception raised wherever the signal finds the program can be lost there, in a callback or a finalizer: whoever
    works for long looks at `is_stopped` as well, and leaving raises what was lost.
    """
    arrived: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        arrived.append(number)
        is_stopped.set()
        raise StopSignal(number)

    with _handled_by(stop):
        yield
        if arrived:
            raise StopSignal(arrived[0])


@contextmanager
def stopping(advance: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Within, SIGTERM and Ctrl-C end the work when it next reports progress; a second one ends it at once.

    Raised wherever the signal finds the program, the exception could break a lock that is being let go. Yields the
    function to report progress to, which passes it on to `advance`.
    """
    arrived: list[int] = []

    def note(number: int, frame: object) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            raise KeyboardInterrupt

    def advance_or_stop(count: int) -> None:
        if arrived:
            raise KeyboardInterrupt if arrived[0] == signal.SIGINT else SystemExit(128 + arrived[0])
        advance(count)

    with _handled_by(note):
        yield advance_or_stop


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
