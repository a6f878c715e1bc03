"""The process of a group that owns a host's chips: `python -m podquant.group.member FD`, a child of `group.children`.

It learns on the socket FD what to do, tells there how it is, and ends with its parent. Rank 0 schedules, the others
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
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

import jax

from podquant.engine.engine import LocalEngine
from podquant.engine.request import FinishReason, Output, Request
from podquant.engine.start import build_engine, load_tokenizer, open_model, start_executor
from podquant.errors import PodquantError, RequestError
from podquant.group.fingerprint import fingerprints
from podquant.group.launch import Deadlines, Launch, decode_launch, step_key
from podquant.group.lockstep import Announcer, follow, gather, join
from podquant.group.messages import decode_request, encode_output
from podquant.group.wire import Connection, Listener, WireError

_PR_SET_PDEATHSIG = 1
_LEAVE_SECONDS = 5.0
_LOAD_NEWS_SECONDS = 0.5

_log = logging.getLogger(__name__)


class Link:
    """The connection to the parent: what is said there, and a sign of life again and again."""

    def __init__(self, connection: Connection, deadlines: Deadlines) -> None:
        self._connection, self._deadlines = connection, deadlines
        self._commands: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self.busy_seconds: Callable[[], float] = lambda: 0.0
        self.stats: Callable[[], Any] = lambda: None
        for work in (self._beat, self._listen):
            threading.Thread(target=work, name="parent", daemon=True).start()

    def say(self, what: str, **values: Any) -> None:
        """Tell the parent; a process without one ends."""
        try:
            self._connection.send({"is": what, **values})
        except WireError:
            os._exit(1)

    def hear(self) -> Mapping[str, Any]:
        """The parent's next command."""
        return self._commands.get()

    def _listen(self) -> None:
        """Take what the parent says as it comes; a process without a parent ends."""
        while True:
            try:
                body = self._connection.receive(timeout=3 * self._deadlines.liveness).body
            except WireError:
                os._exit(1)
            if body["do"] != "beat":
                self._commands.put(body)

    def _beat(self) -> None:
        while True:
            time.sleep(self._deadlines.beat)
            self.say("beat", busy=self.busy_seconds(), stats=self.stats())


def main() -> None:
    """Serve until told to stop. Ends the process without waiting for what JAX may still wait for."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which decides
    secret = bytes.fromhex(sys.stdin.readline())
    connection = Connection(socket.socket(fileno=int(sys.argv[1])), secret, is_server=False)
    launch = decode_launch(connection.receive(timeout=30.0).body)
    logging.basicConfig(
        level=os.environ.get("PODQUANT_LOG_LEVEL", "INFO"),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s [{launch.place.group}.{launch.place.rank}] %(name)s: %(message)s",
    )
    link = Link(connection, launch.deadlines)
    try:
        _serve(launch, secret, link)
        link.say("ended")
    except PodquantError as error:
        link.say("failed", kind=type(error).__name__, text=str(error))
    except Exception as error:
        _log.exception("failed")
        link.say("failed", kind="", text=f"{type(error).__name__}: {error}")
    _leave()


def _serve(launch: Launch, secret: bytes, link: Link) -> None:
    place, deadlines = launch.place, launch.deadlines
    key = step_key(secret, launch.nonce)
    if launch.options.device == "cpu":
        share, left = divmod(launch.options.tp_size, place.num_ranks)
        jax.config.update("jax_num_cpu_devices", max(1, share + (place.rank < left)))
    with open_model(launch.options, by_ranges=place.num_ranks > 1) as opened:
        prints = fingerprints(opened.source, launch.options)
        news = _LoadNews(link)
        if place.rank > 0:
            step = join(_split(launch.step_address), key, place.rank, prints, deadlines.arrival)
            _initialize(launch, launch.coordinator)
            executor, _ = start_executor(opened, news)
            busy = _Busy()
            link.busy_seconds = busy.seconds
            link.say("ready")
            follow(executor, step, deadlines, busy.begin)
            return
        tokenizer = load_tokenizer(opened)
        followers: list[Connection] = []
        if place.num_ranks > 1:
            coordinator = f"{launch.host}:{_free_port(launch.host)}"
            with contextlib.closing(Listener(launch.host, 0)) as listener:
                link.say("listening", step=f"{launch.host}:{listener.port}", coordinator=coordinator)
                followers = gather(listener, key, prints, place.num_ranks, deadlines.arrival)
            _initialize(launch, coordinator)
        announcer = Announcer(followers, deadlines)
        engine = build_engine(opened, tokenizer, news, announcer.announce)
    _run_engine(engine, link)
    announcer.end()


def _run_engine(engine: LocalEngine, link: Link) -> None:
    """Pass requests in and outputs out, until told to stop."""
    outbox: queue.SimpleQueue[Output | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send_news, args=(outbox, link), name="news", daemon=True)
    sender.start()
    engine.start()
    link.busy_seconds = lambda: engine.busy_seconds
    link.stats = lambda: asdict(engine.stats())
    link.say(
        "ready",
        limits=asdict(engine.limits),
        stats=link.stats(),
    )
    watcher = threading.Thread(target=_watch, args=(engine, link), name="watch", daemon=True)
    watcher.start()
    while (command := link.hear())["do"] != "stop":
        if command["do"] == "submit":
            _submit(engine, decode_request(command["request"]), outbox.put)
        elif command["do"] == "abort":
            engine.abort(command["id"])
    engine.stop(command["drain"])
    outbox.put(None)
    sender.join()


def _submit(engine: LocalEngine, request: Request, put: Callable[[Output], None]) -> None:
    try:
        engine.submit(request, put)
    except RequestError as error:  # the parent has checked it: the engine is ending
        put(Output(request.id, finish_reason=FinishReason.ABORT, error=str(error)))


def _send_news(outbox: queue.SimpleQueue[Output | None], link: Link) -> None:
    while True:
        batch = [outbox.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(outbox.get_nowait())
        outputs = [encode_output(output) for output in batch if output is not None]
        if outputs:
            link.say("news", outputs=outputs)
        if None in batch:
            return


def _watch(engine: LocalEngine, link: Link) -> None:
    """An engine that failed is of no more use to anybody."""
    while engine.failure is None:
        time.sleep(0.05)
    time.sleep(0.2)  # for what it still has to tell its callers
    link.say("failed", kind="", text=engine.failure)
    os._exit(1)


class _LoadNews:
    """Tells the parent how far loading is, a few times a second."""

    def __init__(self, link: Link) -> None:
        self._link, self._last = link, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _LOAD_NEWS_SECONDS or done >= total:
            self._last = now
            self._link.say("loading", done=done, total=total)


class _Busy:
    """For how long a follower has been waiting for its devices."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self, since: float | None) -> None:
        self._since = since

    def seconds(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


def _initialize(launch: Launch, coordinator: str) -> None:
    """Join this process's devices with those of the others."""
    jax.distributed.initialize(
        coordinator,
        num_processes=launch.place.num_ranks,
        process_id=launch.place.rank,
        initialization_timeout=int(launch.deadlines.arrival),
        heartbeat_timeout_seconds=max(10, int(3 * launch.deadlines.liveness)),
    )


def _leave() -> NoReturn:
    """End now: a peer that is dead already would be waited for at JAX's barrier."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as free:
        port: int = free.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
