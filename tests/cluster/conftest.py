"""A Ray cluster of its own processes for the tests that ask for one; see ray_cluster.py for what it looks like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.cluster.ray_cluster import descendants
from tests.group.hosts import PATIENCE

_SCRIPT = Path(__file__).with_name("ray_cluster.py")
_RAY = str(Path(sys.executable).with_name("ray"))


class RayCluster:
    """`with RayCluster() as cluster:` starts it and ends it; `options` are those of ray_cluster.py.

    `address` is that of the GCS, for `ray.init`, `dashboard` that of the job server, and `ips` those of the hosts, in
    order of their place in the slice. `environment` is all that a
    driver or the `ray` command needs, in addition to its own, to find the cluster and to be let in.
    """

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._read()
        self.address: str = self.ready["gcs_address"]
        self.dashboard: str = self.ready["dashboard"]
        self.environment: dict[str, str] = self.ready["environment"]
        self.ips: list[str] = [node["ip"] for node in self.ready["nodes"][1:]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the cluster; nothing of it remains, which is checked."""
        pids = self.pids()
        self.process.communicate(timeout=PATIENCE)
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        assert not Path(self.ready["folder"]).exists()

    def pids(self) -> list[int]:
        """Every process of the cluster."""
        return [self.process.pid, *descendants(self.process.pid)]

    def nodes(self) -> list[dict[str, Any]]:
        """The head, the living hosts, the killed ones: node_id, ip, alive, raylet_pid, metrics (a URL), labels."""
        nodes: list[dict[str, Any]] = self._ask({"do": "nodes"})
        return nodes

    def add_node(self) -> dict[str, Any]:
        """Start a host in the place of the first that was killed, else a further one."""
        node: dict[str, Any] = self._ask({"do": "add_node"})
        return node

    def kill_raylet(self, ip: str) -> None:
        """SIGKILL the host's raylet alone."""
        self._ask({"do": "kill_raylet", "ip": ip})

    def kill_host(self, ip: str) -> None:
        """SIGKILL the host's raylet and all below it."""
        self._ask({"do": "kill_host", "ip": ip})

    def submit(
        self,
        entrypoint: Sequence[str] | str,
        env: Mapping[str, str] | None = None,
        working_dir: Path | None = None,
        *,
        timeout: float = PATIENCE,
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, awaited: its `stdout` has what the job printed, its `returncode` is 1 if the job failed.

        The command returns about five seconds after the job ends: Ray polls. A job that takes longer than `timeout`
        seconds is stopped, and subprocess.TimeoutExpired is raised.
        """
        job = f"job-{uuid.uuid4().hex}"
        try:
            return self._ray(*self._submission(job, entrypoint, env, working_dir), timeout=timeout)
        except subprocess.TimeoutExpired:
            self.stop(job)
            raise

    def submit_no_wait(
        self,
        entrypoint: Sequence[str] | str,
        env: Mapping[str, str] | None = None,
        working_dir: Path | None = None,
    ) -> str:
        """`ray job submit --no-wait`; returns the job's id."""
        job = f"job-{uuid.uuid4().hex}"
        submit, *rest = self._submission(job, entrypoint, env, working_dir)
        self._ray(submit, "--no-wait", *rest, timeout=PATIENCE).check_returncode()
        return job

    def stop(self, job: str) -> None:
        """`ray job stop`, which sends SIGTERM, and SIGKILL three seconds later, and returns when the job has ended."""
        self._ray("stop", job, timeout=PATIENCE).check_returncode()

    def logs(self, job: str) -> str:
        """What the job has printed so far."""
        return self._ray("logs", job, timeout=PATIENCE).stdout

    def _submission(
        self,
        job: str,
        entrypoint: Sequence[str] | str,
        env: Mapping[str, str] | None,
        working_dir: Path | None,
    ) -> list[str]:
        arguments = ["submit", "--submission-id", job, "--runtime-env-json", json.dumps({"env_vars": dict(env or {})})]
        if working_dir is not None:
            arguments += ["--working-dir", str(working_dir)]
        return [*arguments, "--", *(["sh", "-c", entrypoint] if isinstance(entrypoint, str) else entrypoint)]

    def _ray(self, command: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [_RAY, "job", command, "--address", self.dashboard, *arguments],
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def _ask(self, command: dict[str, str]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        assert "ok" in answer, answer["error"]
        return answer["ok"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate(timeout=PATIENCE)
            raise RuntimeError(f"{_SCRIPT.name} ended with code {self.process.returncode}; stderr says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def wait_for(path: Path, seconds: float = PATIENCE) -> str:
    """The text of a file that something else is about to write whole."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written in {seconds} s"
        time.sleep(0.05)
    return path.read_text()


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[RayCluster]:
    """Four hosts of a v5e-16 slice. A test that kills a host puts another in its place with `add_node()`.

    It ends with the tests of this folder, as it takes a quarter of a core even when it has nothing to do.
    """
    with RayCluster() as cluster:
        yield cluster
