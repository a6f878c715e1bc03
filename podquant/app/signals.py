"""What SIGTERM and Ctrl-C do to work in progress: it ends at its next step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield advance_or_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
