"""Every host of a service but host 0: it calls host 0, runs processes as that says, and calls again when it is lost.

Knows nothing of what the processes do.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import asdict, replace

from podquant.engine.options import EngineOptions
from podquant.errors import ClusterError, ConfigError
from podquant.group.children import Children, Word
from podquant.group.hosts import Roll
from podquant.group.launch import OWN_OPTIONS, Deadlines, decode_launch
from podquant.group.wire import Connection, WireError, connect

_log = logging.getLogger(__name__)


def serve_host(
    number: int, address: tuple[str, int], secret: bytes, roll: Roll, deadlines: Deadlines, is_stopped: threading.Event
) -> None:
    """Be another host than host 0: run processes as host 0 says, until it says to stop or `is_stopped` is set.

    When host 0 is lost, its processes are ended and it is called again.

    Raises:
        ConfigError: host 0 was started with other flags.
        ClusterError: host 0 does not answer within the arrival deadline.
    """
    deadline = time.monotonic() + deadlines.arrival
    while not is_stopped.is_set():
        try:
            with connect(address, secret, timeout=min(5.0, deadlines.arrival)) as connection:
                _enter(connection, number, roll)
                if _obey(connection, secret, roll.options, deadlines, is_stopped):
                    return
        except WireError as error:
            _log.warning("host 0: %s", error)
            if time.monotonic() > deadline:
                raise ClusterError(f"host 0 does not answer at {address[0]}:{address[1]}: {error}") from error
        else:
            deadline = time.monotonic() + deadlines.arrival
        is_stopped.wait(0.5)


def _enter(connection: Connection, number: int, roll: Roll) -> None:
    connection.send({"host": number, "started": roll.describe()})
    answer = connection.receive(timeout=10.0).body
    if "refused" in answer:
        raise ConfigError(f"{answer['refused']}. Start all hosts with the same flags but for --node-rank")


def _obey(
    connection: Connection, secret: bytes, options: EngineOptions, deadlines: Deadlines, is_stopped: threading.Event
) -> bool:
    """Do what host 0 says; True when it says to stop, False when it is lost."""

    def relay(word: Word) -> None:
        body = {"is": "child", "place": asdict(word.place), "generation": word.generation, "body": dict(word.body)}
        with contextlib.suppress(WireError):  # the loop below finds it too
            connection.send(body)

    children = Children(secret, relay)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(deadlines.beat):
            if is_stopped.is_set():
                connection.close()
                return
            try:
                connection.send({"is": "beat"})
            except WireError:
                return

    threading.Thread(target=beat, name="beat", daemon=True).start()
    try:
        while True:
            body = connection.receive(timeout=deadlines.liveness).body
            if body["do"] == "launch":
                launch = decode_launch(body["launch"])
                own = {name: getattr(options, name) for name in OWN_OPTIONS}
                children.launch(replace(launch, options=replace(launch.options, **own)))
            elif body["do"] == "command":
                children.command(body["group"], body["generation"], body["body"])
            elif body["do"] == "end":
                children.end(body["group"])
            elif body["do"] == "refused":
                raise ConfigError(body["why"])
            elif body["do"] == "stop":
                return True
    except WireError as error:
        _log.warning("host 0: %s", error)
        return is_stopped.is_set()
    finally:
        is_over.set()
        children.end_all()
