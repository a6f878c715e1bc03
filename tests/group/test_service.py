"""Several hosts that serve one model: the tokens of one process, and what becomes of requests when anything is lost.

Hosts are processes of this machine, started by flags; their JAX processes talk over gloo.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from podquant.artifact.manifest import parse_manifest
from podquant.group.messages import VERSION
from tests.group.hosts import PATIENCE, Service, cmdline, is_alive, wait_until
from tests.group.references import GOLDENS, PROMPTS, expected_tokens, make_artifact
from tests.group.strangers import IMPOSTOR, call_as_strangers, listening_ports
from tests.matrix import half
from tests.storage.hub.emulator import HubEmulator
from tests.storage.kinds import fine_tune

pytestmark = pytest.mark.slow

FLAGS = ("--dtype", "float32", "--skip-tokenizer-init", "--skip-server-warmup", "--liveness-seconds", "8")
LIVENESS = 8.0
"""Long enough for a heartbeat to come in time when the machine is busy."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A compilation cache that all processes share, as on a pod's hosts with a common directory."""
    place = str(tmp_path_factory.mktemp("cache"))
    return {"JAX_COMPILATION_CACHE_DIR": place, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(GOLDENS / "llama", tmp_path_factory.mktemp("artifact") / "int8", "int8_w8a8.yaml", 2)


@pytest.fixture(scope="module")
def expected(artifact: Path) -> list[list[int]]:
    return expected_tokens(artifact)


@pytest.fixture(scope="module")
def two_hosts(artifact: Path, cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two hosts of two devices."""
    folder = tmp_path_factory.mktemp("hosts")
    with Service(artifact, 2, "--tp-size", "4", *FLAGS, folder=folder, environment=cache) as service:
        service.wait_until_ready()
        yield service


@pytest.fixture
def service(two_hosts: Service) -> Service:
    """The two hosts, serving, whatever the test before did to them."""
    two_hosts.wait_until_ready()
    return two_hosts


def test_two_hosts_give_the_tokens_of_one_process(service: Service, expected: list[list[int]]) -> None:
    assert [service.complete(prompt) for prompt in PROMPTS] == expected
    assert service.http.get("/health").json() == {"status": "ok"}
    together: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        together[number] = service.complete(PROMPTS[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(PROMPTS))] == expected
    assert "podquant_generated_tokens_total" in service.http.get("/metrics").text


def test_what_a_model_refuses_is_refused_as_by_one_process(service: Service) -> None:
    answer = service.http.post("/v1/completions", json={"prompt": [1, 100_000], "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    answer = service.http.post("/v1/completions", json={"prompt": [1] * 500, "max_tokens": 100})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    with service.http.stream(
        "POST", "/v1/completions", json={"prompt": [3], "max_tokens": 400, "stream": True, "ignore_eos": True}
    ) as stream:
        next(stream.iter_lines())
    wait_until(lambda: running(service) == 0, PATIENCE, "a request whose caller has gone is given up")


def running(service: Service) -> int:
    return int(service.http.get("/status").json()["num_running"])


@pytest.mark.parametrize(("number", "what"), half([1, 0], [signal.SIGKILL, signal.SIGSTOP]))
def test_a_process_that_is_lost(service: Service, expected: list[list[int]], number: int, what: signal.Signals) -> None:
    """Its requests end with an error in time, /health says so, and the group serves again by itself."""
    lost = service.member(number)
    found: list[tuple[httpx.Response, float]] = []

    def ask() -> None:
        body = {"prompt": [3, 4, 5], "max_tokens": 480, "ignore_eos": True}
        with httpx.Client(timeout=PATIENCE) as client:
            answer = client.post(f"{service.http.base_url}/v1/completions", json=body)
        found.append((answer, time.monotonic()))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: running(service) == 1, PATIENCE, "the request runs", service.said)
    began = time.monotonic()
    os.kill(lost, what)
    asking.join(PATIENCE)
    answer, at = found[0]
    assert answer.status_code == 503, answer.text
    assert f"rank {number} ended" in answer.json()["error"]["message"]
    assert at - began < LIVENESS + 30  # and not when the client's patience ends
    health = service.http.get("/health")
    assert health.status_code == 503
    assert f"rank {number} ended" in health.json()["error"]["message"]
    service.wait_until_ready()
    print(f"served again {time.monotonic() - began:.1f} s after {what.name} of rank {number}")
    assert service.http.get("/health").json() == {"status": "ok"}
    assert not is_alive(lost)
    assert service.complete(PROMPTS[0]) == expected[0]


def test_a_host_that_is_lost_comes_back(service: Service, expected: list[list[int]]) -> None:
    """The parent itself: its process ends with it, and whoever starts it again is let in."""
    parent, member = service.hosts[1], service.member(1)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(member), PATIENCE, "a process ends with its parent")
    wait_until(lambda: service.http.get("/health").status_code == 503, PATIENCE, "/health says so")
    wait_until(
        lambda: "host 1 is lost since" in service.http.get("/health").json()["error"]["message"],
        PATIENCE,
        "/health says which host is missing, since when",
    )
    service.start(1)
    service.wait_until_ready()
    assert service.complete(PROMPTS[1]) == expected[1]


def test_strangers_do_not_get_in_and_do_no_harm(service: Service, expected: list[list[int]]) -> None:
    address = service.meeting.split(":")
    with socket.create_connection((address[0], int(address[1])), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + b" " * 64)
        stranger.settimeout(15)
        try:
            while stranger.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
    service.logs.append(service.logs[0].with_name("stranger.log"))
    service.start(
        2,
        "--node-rank",
        "1",
        PODQUANT_GROUP_SECRET="a guess that is long enough",
    )
    wait_until(
        lambda: "does not know this group's secret" in service.logs[2].read_text(), PATIENCE, "refused", service.said
    )
    stranger_host = service.hosts.pop(2)
    stranger_host.terminate()
    stranger_host.wait(PATIENCE)
    assert "does not know this group's secret" in service.logs[0].read_text()
    before = [service.member(0), service.member(1)]
    ports = listening_ports(service.hosts[0].pid)
    assert len(ports) >= 3  # HTTP, the hosts' meeting, JAX's coordinator
    for port in ports:
        call_as_strangers(port)
    (*_, coordinator) = re.findall(r"Starting JAX distributed service on (\S+)", service.logs[0].read_text())
    assert int(coordinator.rpartition(":")[2]) in ports
    done = subprocess.run(
        [sys.executable, "-c", IMPOSTOR, coordinator], capture_output=True, timeout=PATIENCE, check=False
    )
    assert b"joined" not in done.stdout
    assert [service.member(0), service.member(1)] == before
    assert service.complete(PROMPTS[2]) == expected[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--page-size", "32"], "--page-size is 32 there and not given on host 0"),
        (["--tp-size", "2"], "--tp-size is 2 there and 4 on host 0"),
    ],
)
def test_a_host_with_other_flags_is_refused(service: Service, flags: list[str], message: str) -> None:
    service.logs.append(service.logs[0].with_name(f"other{flags[0]}.log"))
    number = len(service.logs) - 1
    service.start(number, "--node-rank", "1", *flags)
    other = service.hosts.pop(number)
    assert other.wait(PATIENCE) == 1
    assert f"error: host 1 was started with other flags than host 0: {message}" in service.logs[number].read_text()


def changed_code(place: Path, file: str, change: Callable[[str], str]) -> dict[str, str]:
    """The environment of processes that run podquant with one file changed."""
    package = Path(__file__).parents[2] / "podquant"
    shutil.copytree(package, place / "podquant", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "configs", place / "configs")
    changed = place / "podquant" / file
    changed.write_text(change(changed.read_text()))
    return {"PYTHONPATH": str(place)}


def test_a_host_of_another_version_is_refused(service: Service, tmp_path: Path) -> None:
    """Both sides name both versions."""
    environment = changed_code(
        tmp_path, "group/messages.py", lambda text: text.replace(f"VERSION = {VERSION}", f"VERSION = {VERSION + 1}")
    )
    service.logs.append(service.logs[0].with_name("version.log"))
    number = len(service.logs) - 1
    service.start(number, "--node-rank", "1", **environment)
    other = service.hosts.pop(number)
    assert other.wait(PATIENCE) == 1
    speaks = "speaks version {} of podquant's protocol, this process version {}: install the same podquant on all hosts"
    assert "error: host 0: 127.0.0.1:" in service.logs[number].read_text()
    assert speaks.format(VERSION, VERSION + 1) in service.logs[number].read_text()
    assert speaks.format(VERSION + 1, VERSION) in service.logs[0].read_text()


def test_a_stop_lets_requests_end_and_leaves_no_process(artifact: Path, cache: dict[str, str], tmp_path: Path) -> None:
    with Service(artifact, 2, "--tp-size", "2", *FLAGS, folder=tmp_path, environment=cache) as service:
        service.wait_until_ready()
        members = [service.member(0), service.member(1)]
        body = {"prompt": [3], "max_tokens": 200, "stream": True, "ignore_eos": True}
        with service.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            for member in members:  # as systemd does, which tells every process of a service
                os.kill(member, signal.SIGTERM)
            service.hosts[0].send_signal(signal.SIGTERM)
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in events[-2]
        assert service.hosts[0].wait(PATIENCE) == 128 + signal.SIGTERM
        assert service.hosts[1].wait(PATIENCE) == 0  # told by host 0
        assert not any(is_alive(pid) for pid in members)


@pytest.mark.parametrize("what", ["weights", "code"])
def test_a_host_with_other_weights_or_code_is_refused(cache: dict[str, str], tmp_path: Path, what: str) -> None:
    environment = {}
    model = other = GOLDENS / "llama"
    if what == "weights":
        other = fine_tune(model, tmp_path / "other")
    else:
        environment = changed_code(tmp_path / "code", "dtypes.py", lambda text: text + "# other code\n")
    verb = "differ" if what == "weights" else "differs"
    with Service(model, 2, "--tp-size", "2", *FLAGS, folder=tmp_path, environment=cache, absent=[1]) as service:
        service.start(1, "--model-path", str(other), **environment)
        assert service.hosts[0].wait(PATIENCE) == 1
        message = service.logs[0].read_text()
        assert f"error: rank 1 refused: its {what} {verb} from rank 0's (there " in message, service.said()
        service.hosts[1].terminate()


def test_a_replica_with_other_weights_is_refused(cache: dict[str, str], tmp_path: Path) -> None:
    other = fine_tune(GOLDENS / "llama", tmp_path / "other")
    flags = ("--nnodes", "2", "--dp-size", "2", *FLAGS)
    with Service(GOLDENS / "llama", 2, *flags, folder=tmp_path, environment=cache, absent=[1]) as service:
        service.start(1, "--model-path", str(other))
        assert service.hosts[0].wait(PATIENCE) == 1
        assert re.search(
            r"error: group \d refused: its weights differ from those of the replica that was first",
            service.logs[0].read_text(),
        ), service.said()
        service.hosts[1].terminate()


def test_a_push_to_the_hub_between_two_hosts_does_not_part_them(cache: dict[str, str], tmp_path: Path) -> None:
    """Host 0 makes the branch a commit, for all hosts and generations."""
    model = GOLDENS / "llama"
    other = fine_tune(model, tmp_path / "other")
    with HubEmulator() as hub:
        commit = hub.push("org/name", {path.name: path.read_bytes() for path in model.iterdir()})
        environment = cache | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        with Service(
            "org/name", 2, "--tp-size", "2", *FLAGS, folder=tmp_path, environment=environment, absent=[1]
        ) as s:
            wait_until(lambda: bool(hub.requests("/api/models/.*/main")), PATIENCE, "host 0 has asked for main", s.said)
            hub.push("org/name", {path.name: path.read_bytes() for path in other.iterdir()})
            s.start(1)
            s.wait_until_ready()
            assert [s.complete(prompt) for prompt in PROMPTS] == expected_tokens(model)
        assert len(hub.requests("/api/models/.*/main")) == 1
        assert len(hub.requests(f"/api/models/.*/{commit}")) == 2  # the process of each host


def test_a_host_that_never_comes_is_named(artifact: Path, tmp_path: Path) -> None:
    with Service(
        artifact, 2, "--tp-size", "2", *FLAGS, "--arrival-seconds", "2", folder=tmp_path, absent=[1]
    ) as service:
        assert service.hosts[0].wait(PATIENCE) == 1
    assert "error: host 1 has not come yet, after 2 s" in service.logs[0].read_text()


def test_host_0_that_never_answers_is_named(artifact: Path, tmp_path: Path) -> None:
    with Service(
        artifact, 2, "--tp-size", "2", *FLAGS, "--arrival-seconds", "2", folder=tmp_path, absent=[0]
    ) as service:
        assert service.hosts[1].wait(PATIENCE) == 1
    assert "error: host 0 does not answer at 127.0.0.1:" in service.logs[1].read_text()


def test_a_flipped_byte_is_found_before_anything_is_served(
    artifact: Path, cache: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path / "flipped")
    manifest = parse_manifest((artifact / "podquant.json").read_bytes(), "artifact")
    name = next(name for name in manifest.files if name.startswith("tp-01") and name.endswith(".safetensors"))
    data = bytearray((tmp_path / "flipped" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "flipped" / name).write_bytes(data)
    with Service(tmp_path / "flipped", 2, "--tp-size", "2", *FLAGS, folder=tmp_path, environment=cache) as service:
        assert service.hosts[0].wait(PATIENCE) == 1
        assert name in service.logs[0].read_text(), service.said()
        assert "CRC32C" in service.logs[0].read_text()


def test_replicas_behind_one_port_share_requests_and_outlive_each_other(
    artifact: Path, cache: dict[str, str], expected: list[list[int]], tmp_path: Path
) -> None:
    with Service(artifact, 1, "--dp-size", "2", *FLAGS, folder=tmp_path, environment=cache) as service:
        service.wait_until_ready()
        assert [service.complete(PROMPTS[number % 3]) for number in range(4)] == [expected[n % 3] for n in range(4)]
        found: list[int] = []

        def ask() -> None:
            with httpx.Client(timeout=PATIENCE) as client:
                body = {"prompt": [3], "max_tokens": 480, "ignore_eos": True}
                found.append(client.post(f"{service.http.base_url}/v1/completions", json=body).status_code)

        lost = service.member(0)
        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        wait_until(
            lambda: running(service) == 4, PATIENCE, "two requests on each replica, and two behind them", service.said
        )
        os.kill(lost, signal.SIGKILL)
        assert service.complete(PROMPTS[0]) == expected[0]
        assert service.http.get("/health").status_code == 200
        for thread in asking:
            thread.join(PATIENCE)
        assert set(found) == {200, 503}
        assert found.count(200) >= 4


def test_no_process_of_a_group_shows_its_secret(service: Service) -> None:
    for number in (0, 1):
        assert b"a secret of this test" not in cmdline(service.member(number))
