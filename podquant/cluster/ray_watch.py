"""Watches Ray's head from a driver: who is alive, and whether the head still answers.

A driver without a head gets no error: its calls hang, and after a minute Ray ends the process in its own words; for a
head that is frozen they hang for ever. So a thread asks, and nobody else has to; what has to call Ray for long, as who
reserves hosts, does so in a thread as well. Knows nothing of what hosts do.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress

import ray
from ray.exceptions import RayError

from podquant.cluster.ray_pool import Pool
from podquant.errors import ClusterError

_LOOK_SECONDS = 0.5
_LEAVE_SECONDS = 15.0
_ABANDON_SECONDS = 1.0

_RAY_ENDS_VARIABLE, _RAY_ENDS_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s", "60"
SILENCE_SECONDS = float(os.environ.get(_RAY_ENDS_VARIABLE, _RAY_ENDS_SECONDS)) / 3
"""Without an answer the head is lost: a third of the time after which Ray ends the process, as leaving takes time."""


class HeadWatch:
    """Looks again and again, in a thread, until it is closed."""

    def __init__(self) -> None:
        """For a process that is connected."""
        self._pool: Pool | None = None
        self._hosts: set[str] = set()
        self._reserving: threading.Thread | None = None
        self._address = ray.get_runtime_context().gcs_address
        self._is_closed = threading.Event()
        self._seen = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="head", daemon=True)
        self._thread.start()

    def reserve(self, reserve: Callable[[], Pool]) -> Pool:
        """The pool that `reserve` gives, whose hosts are watched from now on; or what that raises, or `refuse_loss`."""
        reserved: Future[Pool] = Future()

        def work() -> None:
            try:
                reserved.set_result(reserve())
            except BaseException as error:
                reserved.set_exception(error)

        self._reserving = threading.Thread(target=work, name="reserve hosts", daemon=True)
        self._reserving.start()
        while not wait([reserved], _LOOK_SECONDS).done:
            self.refuse_loss()
        self._pool = reserved.result()
        self.await_answer()
        return self._pool

    @property
    def hosts(self) -> set[str]:
        """Addresses of the reserved hosts that were alive when the head last answered."""
        return self._hosts

    @property
    def is_lost(self) -> bool:
        """Whether the head has been silent for too long."""
        return time.monotonic() - self._seen > SILENCE_SECONDS

    def refuse_loss(self) -> None:
        """Raise ClusterError if the head is lost."""
        if self.is_lost:
            raise ClusterError(
                f"Ray's head {self._address}: no answer for {SILENCE_SECONDS:g} s: it has ended, or cannot be reached "
                "from here, and hosts end without it. Start the cluster again, and submit the same job there"
            )

    def await_answer(self) -> None:
        """Wait for an answer from now on: before a call that would hang without a head. Raises as `refuse_loss`."""
        begin = time.monotonic()
        while self._seen < begin:
            self.refuse_loss()
            time.sleep(0.05)

    def leave(self, release: Callable[[], None], error: BaseException | None) -> None:
        """Stop looking, give back what is reserved, and disconnect from Ray.

        Not longer than a few seconds: without a head that would never end, nor would Ray's own hook at interpreter
        exit, which is then skipped. Nor is it waited for who still reserves hosts.

        Args:
            release: gives back what is reserved; not called if the head is lost.
            error: with which the program ends, should Ray's hook have to be skipped.
        """
        self._is_closed.set()
        leaving = threading.Thread(target=self._leave, args=(release,), name="leave Ray", daemon=True)
        leaving.start()
        is_abandoned = self._reserving is not None and self._reserving.is_alive()
        leaving.join(_ABANDON_SECONDS if is_abandoned else _LEAVE_SECONDS)
        if leaving.is_alive():
            atexit.register(_exit_without_ray, leaving, _status(error))

    def _leave(self, release: Callable[[], None]) -> None:
        if self._reserving is not None:  # calls to Ray during a disconnection could crash
            self._reserving.join()
        if not self.is_lost:
            self._thread.join()
            release()
        ray.shutdown()

    def _run(self) -> None:
        while True:
            with suppress(RayError):
                self._look()
            if self._is_closed.wait(_LOOK_SECONDS):
                return

    def _look(self) -> None:
        begin = time.monotonic()
        if self._pool is None:
            ray.nodes()
        else:
            self._hosts = self._pool.hosts
        self._seen = begin


def _status(error: BaseException | None) -> int:
    """Of a program that ends with it."""
    match error:
        case None:
            return 0
        case SystemExit(code=int(code)):
            return code
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
    return 1


def _exit_without_ray(leaving: threading.Thread, status: int) -> None:
    """End the program, at interpreter exit and before Ray's hook, which was registered earlier."""
    if leaving.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
