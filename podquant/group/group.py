"""The life of one group on host 0: wait for its hosts, start its members, serve, notice a loss, restart.

A TPU slice computes together or not at all: when any process or host is lost, all of the group's processes are ended
and a new generation is started, without a hand. Knows nothing of HTTP, and of processes only what is reported of them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from podquant.engine.options import EngineOptions
from podquant.engine.start import OnLoad
from podquant.errors import ClusterError, ConfigError, PodquantError, TransientStorageError, error_named
from podquant.group.fingerprint import Agreement
from podquant.group.hosts import Host
from podquant.group.launch import Deadlines, Launch, Member, new_nonce
from podquant.group.messages import (
    BY_ITSELF,
    Ended,
    EngineCommand,
    EngineReady,
    Failed,
    FromMember,
    Listening,
    Loading,
    MemberHeartbeat,
    Outputs,
    Ready,
    Report,
)
from podquant.group.remote_engine import RemoteEngine

_log = logging.getLogger(__name__)

_LONGEST_PAUSE = 30.0
_END_SECONDS = 15.0
_LAST_REPORTS_SECONDS = 0.5


class _LostError(Exception):
    """This generation is over. `final`: an error that another start would meet again."""

    def __init__(self, reason: str, final: PodquantError | None = None) -> None:
        super().__init__(reason)
        self.final = final


class Group:
    """One group of processes, one on each of its hosts; rank r on `hosts[r]`."""

    def __init__(
        self,
        members: Sequence[Member],
        hosts: Sequence[Host],
        options: EngineOptions,
        deadlines: Deadlines,
        engine: RemoteEngine,
        on_load: OnLoad,
        agreement: Agreement,
        max_failed_starts: int | None = None,
    ) -> None:
        """One that does not run yet.

        Args:
            agreement: what the groups of a service have in common.
            max_failed_starts: in a row before the first that serves; then it gives up. None: never.
        """
        self.engine = engine
        self._on_load = on_load
        self.error: PodquantError | None = None
        self.settled = threading.Event()
        self._members, self._hosts = members, hosts
        self._options, self._deadlines = options, deadlines
        self._agreement = agreement
        self._max_failed_starts = max_failed_starts
        self._generation = 0
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._alive: set[int] = set()
        self._has_served = False
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"group-{members[0].group}", daemon=True)

    def start(self) -> None:
        """Begin; `settled` is set when it serves for the first time, or has given up with an `error`."""
        self._thread.start()

    def take(self, report: Report) -> None:
        """Hear of one of its processes, from any thread."""
        if report.generation != self._generation:
            return
        if isinstance(report.message, Outputs | MemberHeartbeat):
            if report.member.rank == 0:
                self.engine.take(report.message)
        else:
            self._reports.put(report)

    def stop(self, drain_seconds: float) -> None:
        """Let requests in flight end for `drain_seconds`, end the processes, and wait for that."""
        self._is_stopping.set()
        self.engine.stop(drain_seconds)
        self._reports.put(None)
        if self._thread.ident is not None:
            self._thread.join(drain_seconds + 2 * _END_SECONDS)

    def _run(self) -> None:
        losses = 0
        while not self._is_stopping.is_set():
            self._generation += 1
            try:
                self._start()
                losses = 0
                self._serve()
            except _LostError as lost:
                losses += 1
                self._lose(lost, losses)
            except Exception as error:  # whatever it is, it may pass
                _log.exception("group %d, generation %d", self._members[0].group, self._generation)
                losses += 1
                self._lose(_LostError(f"{type(error).__name__}: {error}"), losses)
            finally:
                self._end_all()
            if self.error is not None:
                break
        else:
            self.engine.detach("the server is shutting down")  # what did not end within the drain time
        self.settled.set()

    def _lose(self, lost: _LostError, losses: int) -> None:
        """Tell callers, and decide whether to start again, and when."""
        since = time.strftime("%H:%M:%S")
        self.engine.detach(f"{lost} (at {since}); the group restarts")
        if self._is_stopping.is_set():
            return
        _log.warning("group %d, generation %d: %s", self._members[0].group, self._generation, lost)
        has_tried_enough = self._max_failed_starts is not None and losses >= self._max_failed_starts
        if not self._has_served and (lost.final is not None or has_tried_enough):
            self.error = lost.final or ClusterError(f"the group ended {losses} times before it served: {lost}")
            return
        self._end_all()
        self._is_stopping.wait(min(_LONGEST_PAUSE, 0.5 * 2.0 ** (losses - 1)) if losses > 1 else 0.0)

    def _start(self) -> None:
        """Start a process on every host, and wait until all are ready."""
        self._await_hosts()
        launch = Launch(
            self._members[0],
            self._generation,
            new_nonce(),
            self._options,
            self._deadlines,
            self._hosts[0].address,
        )
        deadline = time.monotonic() + self._deadlines.start
        self._launch(launch)
        if len(self._members) > 1:
            listening = self._expect((Listening,), {0}, deadline, "listening")[0]
            for member in self._members[1:]:
                self._launch(
                    replace(
                        launch,
                        member=member,
                        step_address=listening.step_address,
                        coordinator=listening.coordinator,
                    )
                )
        ready = self._expect((Ready, EngineReady), set(range(len(self._members))), deadline, "ready")[0]
        if not isinstance(ready, EngineReady):
            raise _LostError("rank 0 is ready, and takes no requests")
        if different := self._agreement.differences(ready.fingerprints):
            reason = f"group {self._members[0].group} refused: {'; '.join(different)}"
            raise _LostError(reason, ConfigError(f"{reason}. Give all hosts the same model, flags and podquant"))
        self.engine.attach(partial(self._command, self._generation), ready)
        self._has_served = True
        _log.info("group %d serves, generation %d", self._members[0].group, self._generation)
        self.settled.set()

    def _serve(self) -> None:
        """Until it is told to stop; raises when something is lost."""
        while not self._is_stopping.is_set():
            self._next(None)
        deadline = time.monotonic() + self._deadlines.drain + _END_SECONDS
        while 0 in self._alive and time.monotonic() < deadline:
            self._next(deadline)

    def _await_hosts(self) -> None:
        end = time.monotonic() + self._deadlines.arrival
        while absent := [absence for host in self._hosts if (absence := host.absence) is not None]:
            self.engine.tell("; ".join(absent))
            if time.monotonic() > end and not self._has_served:
                reason = f"{'; '.join(absent)}, after {self._deadlines.arrival:g} s"
                raise _LostError(reason, ClusterError(f"{reason}. Start it with the same --dist-init-addr and secret"))
            if self._is_stopping.wait(0.1):
                raise _LostError("the server is shutting down")

    def _launch(self, launch: Launch) -> None:
        self._alive.add(launch.member.rank)
        self._hosts[launch.member.rank].launch(launch)

    def _command(self, generation: int, command: EngineCommand) -> None:
        self._hosts[0].command(self._members[0].group, generation, command)

    def _expect[M: FromMember](
        self, kinds: tuple[type[M], ...], ranks: set[int], deadline: float, what: str
    ) -> dict[int, M]:
        """What each of these ranks says of these kinds, which means that it is `what`."""
        found: dict[int, M] = {}
        while ranks - found.keys():
            report = self._next(deadline)
            if self._is_stopping.is_set():
                raise _LostError("the server is shutting down")
            if report is None and time.monotonic() < deadline:
                continue
            if report is None:
                missing = ", ".join(str(rank) for rank in sorted(ranks - found.keys()))
                raise _LostError(f"rank {missing} is not {what} after {self._deadlines.start:g} s")
            rank, message = report.member.rank, report.message
            if isinstance(message, Loading) and message.total:
                self.engine.tell(f"loading, {100 * message.done // message.total} % on rank {rank}")
                if rank == 0:
                    self._on_load(message.done, message.total)
            elif isinstance(message, kinds):
                found[rank] = message
        return found

    def _next(self, deadline: float | None) -> Report | None:
        """The next report of this generation; None to look around. Raises when a process has failed or ended."""
        try:
            report = self._reports.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if report is None or report.generation != self._generation:
            return None
        has_ended = isinstance(report.message, Ended)
        if has_ended:
            self._alive.discard(report.member.rank)
        if isinstance(report.message, Failed) or (has_ended and not self._is_stopping.is_set()):
            raise _explained([report, *self._last_reports()])
        return report

    def _last_reports(self) -> list[Report]:
        """What else is reported within a moment: a process that ends takes others along, which may be heard first."""
        end = time.monotonic() + _LAST_REPORTS_SECONDS
        reports = []
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                report = self._reports.get(timeout=left)
                if report is not None and report.generation == self._generation:
                    reports.append(report)
        return reports

    def _end_all(self) -> None:
        """End what is left of this generation. A host that cannot be told will end its processes by itself."""
        for rank in sorted(self._alive):
            self._hosts[rank].end(self._members[rank].group)
        self._alive.clear()


def _explained(reports: Sequence[Report]) -> _LostError:
    """Why a generation is over, of several reports that say so: the one that explains the others."""

    def order(report: Report) -> int:
        match report.message:
            case Failed() as failed:
                return 0 if _error_of(failed) is not None else 2
            case Ended(reason):
                return 3 if "ended with status" in reason or reason == BY_ITSELF else 1
        return 4

    report = min(reports, key=order)
    rank = report.member.rank
    if isinstance(report.message, Failed):
        error = _error_of(report.message)
        final = None if isinstance(error, ClusterError | TransientStorageError) else error
        return _LostError(f"rank {rank} failed: {report.message.text}", final)
    reason = report.message.reason if isinstance(report.message, Ended) else BY_ITSELF
    return _LostError(f"rank {rank} ended: {reason}")


def _error_of(failed: Failed) -> PodquantError | None:
    """The error of podquant's own that a process failed with, if it was one."""
    kind = error_named(failed.error)
    return None if kind is None else kind(failed.text)
