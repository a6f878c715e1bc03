"""The life of one group on host 0: wait for its hosts, start its processes, serve, notice a loss, start anew.

A TPU slice computes together or not at all: when any process or host is lost, all of the group's processes are ended
and a new generation is started, without a hand. Knows nothing of HTTP, and of processes only what is said of them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from podquant import errors
from podquant.engine.options import EngineOptions
from podquant.engine.start import OnLoad
from podquant.errors import ClusterError, PodquantError
from podquant.group.children import Word
from podquant.group.hosts import Host
from podquant.group.launch import Deadlines, Launch, Place, new_nonce
from podquant.group.remote_engine import RemoteEngine

_log = logging.getLogger(__name__)

_FIRST_TRIES = 3
"""Generations that may be lost before one has ever served; then the service gives up."""
_LONGEST_PAUSE = 30.0
_END_SECONDS = 15.0
_LAST_WORDS_SECONDS = 0.5
_FOR_ENGINE = frozenset({"news", "beat"})


class _LostError(Exception):
    """This generation is over. `final`: an error of podquant's own, which another start would meet again."""

    def __init__(self, reason: str, final: PodquantError | None = None) -> None:
        super().__init__(reason)
        self.final = final


class Group:
    """One group of processes, one on each of its hosts; rank r on `hosts[r]`."""

    def __init__(
        self,
        places: Sequence[Place],
        hosts: Sequence[Host],
        options: EngineOptions,
        deadlines: Deadlines,
        engine: RemoteEngine,
        on_load: OnLoad,
    ) -> None:
        self.engine = engine
        self._on_load = on_load
        self.error: PodquantError | None = None
        self.settled = threading.Event()
        self._places, self._hosts = places, hosts
        self._options, self._deadlines = options, deadlines
        self._generation = 0
        self._words: queue.SimpleQueue[Word | None] = queue.SimpleQueue()
        self._living: set[int] = set()
        self._has_served = False
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"group-{places[0].group}", daemon=True)

    def start(self) -> None:
        """Begin; `settled` is set when it serves for the first time, or has given up with an `error`."""
        self._thread.start()

    def hear(self, word: Word) -> None:
        """Take a word of one of its processes, from any thread."""
        if word.generation != self._generation:
            return
        if word.body["is"] in _FOR_ENGINE:
            if word.place.rank == 0:
                self.engine.hear(word.body)
        else:
            self._words.put(word)

    def stop(self, drain_seconds: float) -> None:
        """Let requests on the way end for `drain_seconds`, end the processes, and wait for that."""
        self._is_stopping.set()
        self.engine.stop(drain_seconds)
        self._words.put(None)
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
        self.engine.detach(f"{lost} (at {since}); the group starts anew")
        if self._is_stopping.is_set():
            return
        _log.warning("group %d, generation %d: %s", self._places[0].group, self._generation, lost)
        if not self._has_served and (lost.final is not None or losses >= _FIRST_TRIES):
            self.error = lost.final or ClusterError(f"the group ended {losses} times before it served: {lost}")
            return
        self._end_all()
        self._is_stopping.wait(min(_LONGEST_PAUSE, 0.5 * 2.0 ** (losses - 1)) if losses > 1 else 0.0)

    def _start(self) -> None:
        """Start a process on every host, and wait until all are ready."""
        self._await_hosts()
        launch = Launch(
            self._places[0],
            self._generation,
            new_nonce(),
            self._options,
            self._deadlines,
            self._hosts[0].address,
        )
        deadline = time.monotonic() + self._deadlines.start
        self._launch(launch)
        if len(self._places) > 1:
            listening = self._expect("listening", {0}, deadline)[0]
            for place in self._places[1:]:
                self._launch(
                    replace(launch, place=place, step_address=listening["step"], coordinator=listening["coordinator"])
                )
        ready = self._expect("ready", set(range(len(self._places))), deadline)[0]
        self.engine.attach(partial(self._command, self._generation), ready["limits"], ready["stats"])
        self._has_served = True
        _log.info("group %d serves, generation %d", self._places[0].group, self._generation)
        self.settled.set()

    def _serve(self) -> None:
        """Until it is told to stop; raises when something is lost."""
        while not self._is_stopping.is_set():
            self._take(None)
        deadline = time.monotonic() + self._deadlines.drain + _END_SECONDS
        while 0 in self._living and time.monotonic() < deadline:
            self._take(deadline)

    def _await_hosts(self) -> None:
        end = time.monotonic() + self._deadlines.arrival
        while absent := [host.absence for host in self._hosts if host.absence is not None]:
            self.engine.tell("; ".join(absent))
            if time.monotonic() > end and not self._has_served:
                reason = f"{'; '.join(absent)}, after {self._deadlines.arrival:g} s"
                raise _LostError(reason, ClusterError(f"{reason}. Start it with the same --dist-init-addr and secret"))
            if self._is_stopping.wait(0.1):
                raise _LostError("the server is shutting down")

    def _launch(self, launch: Launch) -> None:
        self._living.add(launch.place.rank)
        self._hosts[launch.place.rank].launch(launch)

    def _command(self, generation: int, body: Mapping[str, Any]) -> None:
        self._hosts[0].command(self._places[0].group, generation, body)

    def _expect(self, what: str, ranks: set[int], deadline: float) -> dict[int, Mapping[str, Any]]:
        """What each of these ranks said of this kind."""
        found: dict[int, Mapping[str, Any]] = {}
        while ranks - found.keys():
            word = self._take(deadline)
            if self._is_stopping.is_set():
                raise _LostError("the server is shutting down")
            if word is None and time.monotonic() < deadline:
                continue
            if word is None:
                missing = ", ".join(str(rank) for rank in sorted(ranks - found.keys()))
                raise _LostError(f"rank {missing} is not {what} after {self._deadlines.start:g} s")
            if word.body["is"] == "loading" and word.body["total"]:
                self.engine.tell(
                    f"loading, {100 * word.body['done'] // word.body['total']} % on rank {word.place.rank}"
                )
            elif word.body["is"] == what:
                found[word.place.rank] = word.body
        return found

    def _take(self, deadline: float | None) -> Word | None:
        """The next word of this generation; None to look around. Raises when a process has failed or ended."""
        try:
            word = self._words.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if word is None or word.generation != self._generation:
            return None
        if word.body["is"] == "ended":
            self._living.discard(word.place.rank)
        if word.body["is"] == "failed" or (word.body["is"] == "ended" and not self._is_stopping.is_set()):
            raise _explained([word, *self._last_words()])
        return word

    def _last_words(self) -> list[Word]:
        """What else is said within a moment: who ends takes others along, and they may be heard first."""
        end = time.monotonic() + _LAST_WORDS_SECONDS
        words = []
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                word = self._words.get(timeout=left)
                if word is not None and word.generation == self._generation:
                    words.append(word)
        return words

    def _end_all(self) -> None:
        """End what is left of this generation. A host that cannot be told will end its processes by itself."""
        for rank in sorted(self._living):
            self._hosts[rank].end(self._places[rank].group)
        self._living.clear()


def _explained(words: Sequence[Word]) -> _LostError:
    """Why a generation is over, of several words that say so: the one that explains the others."""

    def rank_of(word: Word) -> int:
        if word.body["is"] == "failed":
            return 0 if _error_of(word) is not None else 2
        return 3 if "ended with status" in word.body.get("reason", "ended with status 0") else 1

    word = min((word for word in words if word.body["is"] in ("failed", "ended")), key=rank_of)
    if word.body["is"] == "failed":
        return _LostError(f"rank {word.place.rank} failed: {word.body['text']}", _error_of(word))
    return _LostError(f"rank {word.place.rank} ended: {word.body.get('reason', 'by itself')}")


def _error_of(word: Word) -> PodquantError | None:
    """The error of podquant's own that a process failed with, if it was one."""
    kind = getattr(errors, word.body["kind"], None)
    return None if kind is None else kind(word.body["text"])
