"""How other hosts are taken in or refused: by the words that either side prints."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest

from podquant.engine.options import EngineOptions
from podquant.errors import ConfigError
from podquant.group.hosts import HostAcceptor, RemoteHost, SharedFlags
from podquant.group.launch import Deadlines, Launch, Member, new_nonce
from podquant.group.messages import (
    TO_HOST,
    VERSION,
    Abort,
    CommandMember,
    Ended,
    EndMember,
    Heartbeat,
    HostHello,
    Loading,
    Refusal,
    Report,
    Shutdown,
    StartMember,
    ToHost,
    Welcome,
)
from podquant.group.other_host import serve_host
from podquant.group.wire import Connection, PeerListener, WireError, connect
from tests.group.hosts import wait_until

SECRET = b"of the service"
DEADLINES = Deadlines(liveness=2.0, arrival=5.0)
FLAGS = SharedFlags(3, 1, EngineOptions("model", device="cpu", tp_size=3))


@dataclass
class Host0:
    """Host 0, which expects hosts 1 and 2."""

    address: tuple[str, int]
    hosts: dict[int, RemoteHost]
    reports: list[Report]


@pytest.fixture
def host0() -> Iterator[Host0]:
    listener = PeerListener("127.0.0.1", 0)
    reports: list[Report] = []
    hosts = {number: RemoteHost(number, reports.append, DEADLINES) for number in (1, 2)}
    acceptor = HostAcceptor(listener, SECRET, FLAGS, hosts)
    yield Host0(("127.0.0.1", listener.port), hosts, reports)
    for host in hosts.values():
        host.stop()
    acceptor.close()


def serve(host0: Host0, number: int = 1, flags: SharedFlags = FLAGS, secret: bytes = SECRET) -> None:
    serve_host(number, host0.address, secret, flags, DEADLINES, threading.Event())


@pytest.mark.parametrize(
    ("number", "flags", "message"),
    [
        (5, FLAGS, "--node-rank must be 1 or 2, got 5. Start all hosts with the same flags but for --node-rank"),
        (
            1,
            replace(FLAGS, num_groups=3, options=replace(FLAGS.options, page_size=32)),
            "host 1 was started with other flags than host 0: --dp-size is 3 there and 1 on host 0; "
            "--page-size is 32 there and not given on host 0",
        ),
    ],
)
def test_a_host_with_other_flags_is_refused(host0: Host0, number: int, flags: SharedFlags, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(host0, number, flags)
    assert str(caught.value).startswith(message)
    absence = host0.hosts[1].absence or ""
    assert absence.startswith("host 1 has not come yet")
    assert (message in absence) == (number == 1)


def test_what_is_a_hosts_own_may_differ(host0: Host0) -> None:
    own = replace(FLAGS.options, model_path="elsewhere", download_dir="here", compilation_cache_dir="there")
    thread = threading.Thread(target=serve, args=(host0, 1, replace(FLAGS, options=own)))
    thread.start()
    wait_until(lambda: host0.hosts[1].absence is None, 10, "host 1 has come")
    host0.hosts[1].stop()
    thread.join(10)
    assert not thread.is_alive()


def test_a_host_of_another_version_is_refused_with_both_versions_on_both_sides(
    host0: Host0, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(host0.address, 5) as caller:
        caller.sendall(b"podquant\x07" + bytes(32))
        assert caller.recv(100)[: len(b"podquant") + 1] == b"podquant" + bytes([VERSION])
        assert caller.recv(100) == b""
    message = f"speaks version 7 of podquant's protocol, this process version {VERSION}"
    wait_until(lambda: message in caplog.text, 10, "host 0 says so")
    for number in (1, 2):
        absence = host0.hosts[number].absence or ""
        assert absence.startswith(f"host {number} has not come yet (refused at ")
        assert message in absence


@contextmanager
def older_host_0() -> Iterator[tuple[str, int]]:
    """Greets its first caller as version 1 did."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as peer:
                peer.sendall(b"podquant\x01" + bytes(32))
                while peer.recv(100):
                    pass

        thread = threading.Thread(target=greet)
        thread.start()
        yield server.getsockname()
        thread.join(10)


def test_a_host_does_not_come_again_to_another_version() -> None:
    message = f"host 0: 127.0.0.1:.* speaks version 1 of podquant's protocol, this process version {VERSION}"
    with older_host_0() as address, pytest.raises(ConfigError, match=message):
        serve_host(1, address, SECRET, FLAGS, DEADLINES, threading.Event())


@contextmanager
def entered(host0: Host0) -> Iterator[Connection[ToHost]]:
    """The connection of host 1, by hand."""
    with connect(host0.address, TO_HOST, SECRET, timeout=5) as connection:
        connection.send(HostHello(1, FLAGS.describe()))
        assert connection.receive(timeout=5) == Welcome()
        wait_until(lambda: host0.hosts[1].absence is None, 10, "host 1 has come")
        yield connection


def commands(connection: Connection[ToHost], count: int) -> list[ToHost]:
    found: list[ToHost] = []
    while len(found) < count:
        message = connection.receive(timeout=5)
        if not isinstance(message, Heartbeat):
            found.append(message)
    return found


def test_a_host_is_told_what_to_do_and_reports(host0: Host0) -> None:
    launch = Launch(Member(0, 1, 3), 4, new_nonce(), FLAGS.options, DEADLINES, "h")
    host = host0.hosts[1]
    with entered(host0) as connection:
        connection.send(Heartbeat())
        host.launch(launch)
        host.command(0, 4, Abort("id"))
        host.end(0)
        host.stop()
        expected = [StartMember(launch), CommandMember(0, 4, Abort("id")), EndMember(0), Shutdown()]
        assert commands(connection, 4) == expected
        loading = Report(launch.member, 4, Loading(1, 2))
        connection.send(loading)
        wait_until(lambda: host0.reports == [loading], 5, "the report arrives")
    wait_until(lambda: len(host0.reports) == 2, 5, "the loss of the host is reported for its process")
    ended = host0.reports[1]
    assert (ended.member, ended.generation) == (launch.member, 4)
    assert isinstance(ended.message, Ended)
    assert ended.message.reason.startswith("was on host 1: 127.0.0.1:")
    assert (host.absence or "").startswith("host 1 is lost since ")


def test_a_process_that_a_lost_host_should_start_is_reported_to_have_ended(host0: Host0) -> None:
    launch = Launch(Member(0, 1, 3), 4, new_nonce(), FLAGS.options, DEADLINES, "h")
    host0.hosts[1].launch(launch)
    assert host0.reports == [Report(launch.member, 4, Ended("host 1 has not come yet"))]


def keep_alive(connection: Connection[ToHost], until: threading.Event) -> None:
    while not until.wait(DEADLINES.heartbeat / 4):
        connection.send(Heartbeat())


def test_a_second_host_of_a_number_is_refused_while_the_first_answers(host0: Host0) -> None:
    is_over = threading.Event()
    with entered(host0) as first, connect(host0.address, TO_HOST, SECRET, timeout=5) as second:
        thread = threading.Thread(target=keep_alive, args=(first, is_over))
        thread.start()
        second.send(HostHello(1, FLAGS.describe()))
        refusal = Refusal("there is a host 1 already, and it answers", is_final=False)
        assert second.receive(timeout=5) == refusal
        is_over.set()
        thread.join()


def test_a_host_that_calls_again_takes_the_place_of_its_silent_connection(host0: Host0) -> None:
    """As after a loss that only one end has noticed."""
    launch = Launch(Member(0, 1, 3), 4, new_nonce(), FLAGS.options, DEADLINES, "h")
    with entered(host0) as first:
        host0.hosts[1].launch(launch)
        with entered(host0) as second:
            wait_until(lambda: len(host0.reports) == 1, 5, "what ran on the lost connection is reported to have ended")
            host0.hosts[1].end(0)
            assert commands(second, 1) == [EndMember(0)]
            with pytest.raises(WireError):
                commands(first, 5)


def test_a_host_that_is_refused_for_another_comes_in_when_that_has_gone(host0: Host0) -> None:
    is_over, is_stopped = threading.Event(), threading.Event()
    with entered(host0) as first:
        alive = threading.Thread(target=keep_alive, args=(first, is_over))
        host = threading.Thread(target=serve_host, args=(1, host0.address, SECRET, FLAGS, DEADLINES, is_stopped))
        alive.start()
        host.start()
        came = host0.hosts[1].address
        is_over.wait(DEADLINES.heartbeat * 2)
        assert (host0.hosts[1].absence, host0.hosts[1].address) == (None, came)
        is_over.set()
        alive.join()

    def has_been_let_go() -> bool:
        host0.hosts[1].stop()
        return not host.is_alive()

    wait_until(has_been_let_go, 10, "the other comes in once the first has gone")


@pytest.mark.parametrize(
    ("send", "message"),
    [
        (lambda connection: connection.send(Heartbeat()), "did not expect the message Heartbeat now"),
        (lambda connection: connection.send(Shutdown()), "malformed message: message 'Shutdown': unknown here"),
    ],
)
def test_who_does_not_say_hello_is_refused(
    host0: Host0, caplog: pytest.LogCaptureFixture, send: Callable[[Connection[ToHost]], None], message: str
) -> None:
    with connect(host0.address, TO_HOST, SECRET, timeout=5) as connection:
        send(connection)
        wait_until(lambda: message in caplog.text, 10, "it is refused")
