"""Hosts of a service as processes of this machine, started by flags as a user would, and what a caller sees of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.cli.test_serve import free_port
from tests.cluster.ray_cluster import descendants

SECRET = "a secret of this test, 32 characters"
PATIENCE = 300.0
"""Seconds in which what is waited for comes to pass on however busy a machine."""
QUICK = ("--device", "cpu", "--max-running-requests", "2", "--chunked-prefill-size", "32", "--max-total-tokens", "2048")


class Service:
    """`with Service(model, 2, "--tp-size", "2") as service:` starts host 0 and the others, and ends them.

    Attributes:
        hosts: the process of each host; `logs` are what they print.
        http: a client of host 0.
    """

    def __init__(
        self,
        model: Path | str,
        num_hosts: int,
        *flags: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        absent: Sequence[int] = (),
    ) -> None:
        self.port, self.meeting = free_port(), f"127.0.0.1:{free_port()}"
        self.logs = [folder / f"host-{number}.log" for number in range(num_hosts)]
        self._command = ["--model-path", str(model), "--nnodes", str(num_hosts), "--port", str(self.port)]
        self._command += ["--dist-init-addr", self.meeting, *QUICK, *flags]
        self._folder = folder
        self._environment = os.environ | {"PODQUANT_GROUP_SECRET": SECRET} | dict(environment or {})
        self.hosts: dict[int, subprocess.Popen[bytes]] = {}
        for number in reversed(range(num_hosts)):
            if number not in absent:
                self.start(number)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)

    def start(self, number: int, *flags: str, **environment: str) -> None:
        """Start a host, again if it has ended."""
        command = [sys.executable, "-m", "podquant.launch_server", *self._command, "--node-rank", str(number), *flags]
        with self.logs[number].open("ab") as log:
            self.hosts[number] = subprocess.Popen(
                command,
                env=self._environment | environment,
                cwd=self._folder,  # not this checkout, which Python would put before PYTHONPATH
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End all hosts; no process of theirs may be left."""
        self.http.close()
        pids = [pid for host in self.hosts.values() for pid in (host.pid, *descendants(host.pid))]
        for host in self.hosts.values():
            host.send_signal(signal.SIGCONT)
            host.send_signal(signal.SIGTERM)
        for host in self.hosts.values():
            try:
                host.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                host.kill()
                host.wait()
                assert error, "a host did not end in time"
        if error is None:
            wait_until(lambda: not any(is_alive(pid) for pid in pids), PATIENCE, "no process of the hosts is left")

    def member(self, number: int) -> int:
        """The process on a host that owns its devices."""
        found = [pid for pid in descendants(self.hosts[number].pid) if b"podquant.group.member" in cmdline(pid)]
        assert found, self.said()
        return found[0]

    def wait_until_ready(self, seconds: float = PATIENCE) -> float:
        """Until requests are taken; how long that took."""
        begin = time.monotonic()

        def ready() -> bool:
            assert self.hosts[0].poll() is None, self.said()
            try:
                return self.http.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, seconds, "the service is ready", self.said)
        return time.monotonic() - begin

    def complete(self, prompt: list[int], **options: Any) -> list[int]:
        """Greedy tokens."""
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **options}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text + self.said()
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def said(self) -> str:
        """What all hosts have printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs if log.exists())


def wait_until(holds: Callable[[], bool], seconds: float, what: str, said: Callable[[], str] = str) -> None:
    """Look again and again; fails with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{said()}"
        time.sleep(0.05)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except (FileNotFoundError, ProcessLookupError):
        return b""


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and no mere zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
