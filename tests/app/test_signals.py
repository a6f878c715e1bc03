"""SIGTERM and Ctrl-C, sent to this process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from podquant.app.signals import StopSignal, raising_stop, stopping


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["TERM", "INT"]
)
def test_work_ends_when_it_next_reports(number: int, raised: type[BaseException]) -> None:
    before = signal.getsignal(number)
    done: list[int] = []

    def work() -> None:
        with stopping(done.append) as advance:
            advance(1)
            os.kill(os.getpid(), number)
            done.append(2)  # goes on until it reports
            advance(3)

    with pytest.raises(raised) as caught:
        work()
    assert done == [1, 2]
    if raised is SystemExit:
        assert caught.value.code == 128 + number  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_work_at_once() -> None:
    def work() -> None:
        with stopping(lambda count: None):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("still at work")

    with pytest.raises(KeyboardInterrupt):
        work()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_wherever_it_is(number: int) -> None:
    before = signal.getsignal(number)

    is_stopped = threading.Event()

    def serve() -> None:
        with raising_stop(is_stopped):
            os.kill(os.getpid(), number)
            pytest.fail("still serving")

    with pytest.raises(StopSignal) as caught:
        serve()
    assert caught.value.status == 128 + number
    assert is_stopped.is_set()
    assert signal.getsignal(number) is before
    assert not issubclass(StopSignal, Exception)


def test_a_signal_that_is_lost_where_it_arrives_still_ends_the_server() -> None:
    """As in a callback of a C library, whose exceptions are printed and dropped."""
    is_stopped = threading.Event()

    def lose() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)

    def serve() -> None:
        with raising_stop(is_stopped):
            lose()
            assert is_stopped.is_set()

    with pytest.raises(StopSignal):
        serve()
