"""Watches Ray's head from a driver: who is alive, and whether the head still answers.

A driver without a head gets no error: its calls hang, and after a minute Ray ends the process in its own words; for a
head that is frozen they hang for ever. So a thread asks, and nobody else has to. Knows nothing of what hosts do.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray.exceptions import RayError

from podquant.cluster.ray_pool import Pool
from podquant.errors import ClusterError

_LOOK_SECONDS = 0.5
_LEAVE_SECONDS = 15.0

_RAY_ENDS_VARIABLE, _RAY_ENDS_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s", "60"
SILENCE_SECONDS = float(os.environ.get(_RAY_ENDS_VARIABLE, _RAY_ENDS_SECONDS)) / 3
"""Without an answer the head is lost: a third of the time after which Ray ends the process, as leaving takes time."""


class HeadWatch:
    """Looks again and again, in a thread, until it is closed."""

    def __init__(self, pool: Pool) -> None:
        """Has looked once when this returns."""
        self._pool = pool
        self._address = ray.get_runtime_context().gcs_address
        self._is_closed = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._run, name="head", daemon=True)
        self._thread.start()

    @property
    def hosts(self) -> set[str]:
        """Addresses of the pool's hosts that were alive when the head last answered."""
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

    def leave(self, release: Callable[[], None], status: int) -> None:
        """Stop looking, give back what is reserved, and disconnect from Ray.

        Not longer than a few seconds: without a head that would never end, nor would Ray's own hook at interpreter
        exit, which is then skipped.

        Args:
            release: gives back what is reserved; not called if the head is lost.
            status: of the program, if Ray's hook has to be skipped.
        """
        self._is_closed.set()
        leaving = threading.Thread(target=self._leave, args=(release,), name="leave Ray", daemon=True)
        leaving.start()
        leaving.join(_LEAVE_SECONDS)
        if leaving.is_alive():
            atexit.register(_exit_without_ray, status)

    def _leave(self, release: Callable[[], None]) -> None:
        if not self.is_lost:
            self._thread.join()  # a look during a disconnection could crash
            release()
        ray.shutdown()

    def _run(self) -> None:
        while not self._is_closed.wait(_LOOK_SECONDS):
            with suppress(RayError):
                self._look()

    def _look(self) -> None:
        begin = time.monotonic()
        self._hosts = self._pool.hosts
        self._seen = begin


def _exit_without_ray(status: int) -> None:
    """End the program, at interpreter exit and before Ray's hook, which was registered earlier."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
