"""Every host of a service but host 0: it calls host 0, runs processes as that says, and calls again when it is lost.

Knows nothing of what is done in the processes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import replace

from podquant.engine.options import EngineOptions
from podquant.errors import ClusterError, ConfigError
from podquant.group.children import Children
from podquant.group.hosts import SharedFlags
from podquant.group.launch import OWN_OPTIONS, Deadlines, Launch
from podquant.group.messages import (
    TO_HOST,
    CommandMember,
    EndMember,
    Heartbeat,
    HostHello,
    Refusal,
    Report,
    Shutdown,
    StartMember,
    ToHost,
    Welcome,
)
from podquant.group.wire import Connection, VersionError, WireError, connect

_log = logging.getLogger(__name__)


def serve_host(
    number: int,
    address: tuple[str, int],
    secret: bytes,
    flags: SharedFlags,
    deadlines: Deadlines,
    is_stopped: threading.Event,
) -> None:
    """Be another host than host 0: run processes as host 0 says, until it says to stop or `is_stopped` is set.

    When host 0 is lost, its processes are ended and it is called again.

    Raises:
        ConfigError: host 0 was started with other flags, or from another version of podquant.
        ClusterError: host 0 does not answer within the arrival deadline.
    """
    deadline = time.monotonic() + deadlines.arrival
    while not is_stopped.is_set():
        try:
            with connect(address, TO_HOST, secret, timeout=min(5.0, deadlines.arrival)) as connection:
                _enter(connection, number, flags, deadlines)
                if _obey(connection, secret, flags.options, deadlines, is_stopped):
                    return
        except VersionError as error:
            raise ConfigError(f"host 0: {error}") from error
        except (WireError, OSError, RuntimeError) as error:  # the last two: short of file descriptors, or of threads
            _log.warning("host 0: %s", error)
            if time.monotonic() > deadline:
                raise ClusterError(f"host 0 does not answer at {address[0]}:{address[1]}: {error}") from error
        else:
            deadline = time.monotonic() + deadlines.arrival
        is_stopped.wait(0.5)


def _enter(connection: Connection[ToHost], number: int, flags: SharedFlags, deadlines: Deadlines) -> None:
    connection.send(HostHello(number, flags.describe()))
    # host 0 may first have to notice that the connection before this one is lost
    answer = connection.receive(timeout=max(10.0, deadlines.liveness))
    if isinstance(answer, Refusal):
        if not answer.is_final:
            raise WireError(f"{connection.address}: {answer.reason}")
        raise ConfigError(f"{answer.reason}. Start all hosts with the same flags but for --node-rank")
    if not isinstance(answer, Welcome):
        raise connection.unexpected(answer)


def _obey(
    connection: Connection[ToHost],
    secret: bytes,
    options: EngineOptions,
    deadlines: Deadlines,
    is_stopped: threading.Event,
) -> bool:
    """Do what host 0 says; True when it says to stop, False when it is lost."""

    def relay(report: Report) -> None:
        with contextlib.suppress(WireError):  # the loop below finds it too
            connection.send(report)

    children = Children(secret, relay)
    is_over = threading.Event()

    def send_heartbeats() -> None:
        while not is_over.wait(deadlines.heartbeat):
            if is_stopped.is_set():
                connection.close()
                return
            try:
                connection.send(Heartbeat())
            except WireError:
                return

    threading.Thread(target=send_heartbeats, name="heartbeat", daemon=True).start()
    try:
        while not isinstance(message := connection.receive(timeout=deadlines.liveness), Shutdown):
            match message:
                case Heartbeat():
                    pass
                case StartMember(launch):
                    children.launch(_at_home(launch, options))
                case CommandMember(group, generation, command):
                    children.command(group, generation, command)
                case EndMember(group):
                    children.end(group)
                case Refusal() | Welcome():
                    raise connection.unexpected(message)
        return True
    except WireError as error:
        _log.warning("host 0: %s", error)
        return is_stopped.is_set()
    finally:
        is_over.set()
        children.end_all()


def _at_home(launch: Launch, options: EngineOptions) -> Launch:
    """With what is this host's own business."""
    own = {name: getattr(options, name) for name in OWN_OPTIONS}
    return replace(launch, options=replace(launch.options, **own))
