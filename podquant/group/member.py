"""The process of a group that owns a host's chips: `python -m podquant.group.member FD`, a child of `group.children`.

It is told on the socket FD what to do, reports there how it is, and ends with its parent. Rank 0 schedules, the others
follow. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from podquant.engine.backend import EngineStats
from podquant.engine.collection import sparing_what_is_there
from podquant.engine.engine import LocalEngine
from podquant.engine.request import FinishReason, Output, Request
from podquant.engine.start import build_engine, load_tokenizer, open_model, start_executor
from podquant.errors import PodquantError, RequestError
from podquant.group.credentials import PEER_URI_PREFIX, credentials
from podquant.group.fingerprint import Fingerprints, fingerprints
from podquant.group.launch import Deadlines, Launch
from podquant.group.lockstep import Follower, StepBroadcaster, accept_ranks, follow, join
from podquant.group.messages import (
    BY_ITSELF,
    TO_MEMBER,
    Abort,
    Ended,
    EngineReady,
    Failed,
    FromMember,
    Heartbeat,
    Listening,
    Loading,
    MemberHeartbeat,
    Outputs,
    Ready,
    Start,
    Stop,
    Submit,
    ToMember,
)
from podquant.group.wire import Connection, PeerListener, WireError

_PR_SET_PDEATHSIG = 1
_LOADING_SECONDS = 0.5
"""Between two reports of how far loading is."""

_log = logging.getLogger(__name__)


class ParentLink:
    """The connection to the parent: commands, reports, and a heartbeat in either direction."""

    def __init__(self, connection: Connection[ToMember], deadlines: Deadlines) -> None:
        self._connection, self._deadlines = connection, deadlines
        self._commands: queue.SimpleQueue[ToMember] = queue.SimpleQueue()
        self.busy_seconds: Callable[[], float] = lambda: 0.0
        self.stats: Callable[[], EngineStats | None] = lambda: None
        for work in (self._send_heartbeats, self._receive):
            threading.Thread(target=work, name="parent", daemon=True).start()

    def report(self, message: FromMember) -> None:
        """Tell the parent; a process without one ends."""
        try:
            self._connection.send(message)
        except WireError:
            os._exit(1)

    def next_command(self) -> ToMember:
        """The parent's next command, once it comes."""
        return self._commands.get()

    def _receive(self) -> None:
        """Take what the parent says as it comes; a process without a parent ends."""
        while True:
            try:
                message = self._connection.receive(timeout=3 * self._deadlines.liveness)
            except WireError:
                os._exit(1)
            if not isinstance(message, Heartbeat):
                self._commands.put(message)

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(self._deadlines.heartbeat)
            self.report(MemberHeartbeat(self.busy_seconds(), self.stats()))


def main() -> None:
    """Serve until told to stop. Ends the process without waiting for what JAX may still wait for."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for each in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service, they reach the parent as well,
        signal.signal(each, signal.SIG_IGN)  # which lets requests end first
    try:
        connection = Connection(socket.socket(fileno=int(sys.argv[1])), TO_MEMBER, None)
        start = connection.receive(timeout=30.0)
        if not isinstance(start, Start):
            raise connection.unexpected(start)
    except WireError as error:
        sys.exit(f"error: {error}")
    launch = start.launch
    logging.basicConfig(
        level=os.environ.get("PODQUANT_LOG_LEVEL", "INFO"),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s [{launch.member.group}.{launch.member.rank}] %(name)s: %(message)s",
    )
    link = ParentLink(connection, launch.deadlines)
    try:
        _serve(launch, bytes.fromhex(start.step_key), link)
        link.report(Ended(BY_ITSELF))
    except PodquantError as error:
        link.report(Failed(type(error).__name__, str(error)))
    except Exception as error:
        _log.exception("failed")
        link.report(Failed("", f"{type(error).__name__}: {error}"))
    _leave()


def _serve(launch: Launch, key: bytes, link: ParentLink) -> None:
    member, deadlines = launch.member, launch.deadlines
    if launch.options.device == "cpu":
        share, left = divmod(launch.options.tp_size, member.num_ranks)
        jax.config.update("jax_num_cpu_devices", max(1, share + (member.rank < left)))
    with open_model(launch.options, by_ranges=member.num_ranks > 1) as opened:
        mine = fingerprints(opened.source, launch.options)
        on_load = _LoadReports(link)
        if member.rank > 0:
            leader = join(_split(launch.step_address), key, member.rank, mine, deadlines.arrival)
            _initialize(launch, launch.coordinator, key)
            executor, _ = start_executor(opened, on_load)
            busy = _Busy()
            link.busy_seconds = busy.seconds
            with sparing_what_is_there(), contextlib.closing(executor):
                link.report(Ready())
                follow(executor, leader, deadlines, busy.begin)
            return
        tokenizer = load_tokenizer(opened)
        followers: list[Follower] = []
        if member.num_ranks > 1:
            with _held_port(launch.host) as port, contextlib.closing(PeerListener(launch.host, 0)) as listener:
                coordinator = f"{launch.host}:{port}"
                link.report(Listening(f"{launch.host}:{listener.port}", coordinator))
                followers = accept_ranks(listener, key, mine, member.num_ranks, deadlines.arrival)
                _initialize(launch, coordinator, key)
        broadcaster = StepBroadcaster(followers, deadlines)
        engine = build_engine(opened, tokenizer, on_load, broadcaster.broadcast)
    with sparing_what_is_there():
        _run_engine(engine, link, mine)
    broadcaster.end()


def _run_engine(engine: LocalEngine, link: ParentLink, fingerprints: Fingerprints) -> None:
    """Pass requests in and outputs out, until told to stop."""
    outbox: queue.SimpleQueue[Output | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send_outputs, args=(outbox, link), name="outputs", daemon=True)
    sender.start()
    engine.start()
    link.busy_seconds = lambda: engine.busy_seconds
    link.stats = engine.stats
    link.report(EngineReady(engine.limits, engine.stats(), fingerprints))
    watcher = threading.Thread(target=_watch, args=(engine, link), name="watch", daemon=True)
    watcher.start()
    prompt: tuple[int, ...] = ()
    while not isinstance(command := link.next_command(), Stop):
        match command:
            case Submit(request_id, ids, params, salt):
                prompt = tuple(ids.tolist()) if ids.size else prompt
                _submit(engine, Request(request_id, prompt, params, salt), outbox.put)
            case Abort(request_id):
                engine.abort(request_id)
    engine.stop(command.drain_seconds)
    outbox.put(None)
    sender.join()


def _submit(engine: LocalEngine, request: Request, put: Callable[[Output], None]) -> None:
    try:
        engine.submit(request, put)
    except RequestError as error:  # the parent has checked it: the engine is ending
        put(Output(request.id, finish_reason=FinishReason.ABORT, error=str(error)))


def _send_outputs(outbox: queue.SimpleQueue[Output | None], link: ParentLink) -> None:
    """As they come; those that came while others were sent, together."""
    while True:
        batch = [outbox.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(outbox.get_nowait())
        outputs = tuple(output for output in batch if output is not None)
        if outputs:
            link.report(Outputs(outputs))
        if None in batch:
            return


def _watch(engine: LocalEngine, link: ParentLink) -> None:
    """An engine that failed is of no more use to anybody."""
    while engine.failure is None:
        time.sleep(0.05)
    time.sleep(0.2)  # for what it still has to tell its callers
    link.report(Failed("", engine.failure))
    os._exit(1)


class _LoadReports:
    """Tells the parent how far loading is, a few times a second."""

    def __init__(self, link: ParentLink) -> None:
        self._link, self._last = link, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _LOADING_SECONDS or done >= total:
            self._last = now
            self._link.report(Loading(done, total))


class _Busy:
    """For how long a follower has been waiting for its devices."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self, since: float | None) -> None:
        self._since = since

    def seconds(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


def _initialize(launch: Launch, coordinator: str, key: bytes) -> None:
    """Join this process's devices with those of the others; who does not know the key cannot."""
    own = credentials(key, f"rank-{launch.member.rank}")
    jax.distributed.initialize(
        coordinator,
        num_processes=launch.member.num_ranks,
        process_id=launch.member.rank,
        initialization_timeout=int(launch.deadlines.arrival),
        heartbeat_timeout_seconds=max(10, int(3 * launch.deadlines.liveness)),
        coordinator_bind_address=coordinator,
        mtls_cert_file=own.certificate,
        mtls_key_file=own.private_key,
        mtls_ca_file=own.authority,
        mtls_peer_uri_prefix=PEER_URI_PREFIX,
    )


def _leave() -> NoReturn:
    """End now: a peer that is dead already would be waited for at JAX's barrier."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


@contextlib.contextmanager
def _held_port(host: str) -> Iterator[int]:
    """A free port, which nobody but this user can take meanwhile: gRPC, which is to listen there, shares ports so."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, 0))
        yield held.getsockname()[1]


if __name__ == "__main__":
    main()
