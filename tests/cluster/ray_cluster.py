"""A Ray cluster on this machine, its head and its hosts processes of their own: what a TPU slice looks like to Ray.

`python ray_cluster.py` prints one line of JSON when the cluster is ready, then answers commands, each a line of JSON:
{"do": "nodes"}, {"do": "add_node"}, {"do": "kill_raylet", "ip": …}, {"do": "kill_host", "ip": …}. It ends, and ends
every process it started, on SIGTERM and when its stdin closes, so it never outlives the test that asked for it.
Each host has an address of the loopback network and, unless `--plain`, what GKE gives a host of a TPU v5e-16 slice;
Ray itself derives resources and labels from that. Knows no chips, no network between hosts and no container.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

NETWORK = f"127.{1 + os.getpid() // 254 % 254}.{1 + os.getpid() % 254}"
"""A loopback network of this process's own: clusters of other runs on the same machine never meet it."""
HEAD_IP = f"{NETWORK}.10"
HOSTS_PER_SLICE = 4
CHIPS_PER_HOST = 4
OBJECT_STORE_BYTES = 80 << 20
SECRETS = {"HF_TOKEN": "hf_planted_5f1c", "PODQUANT_API_KEY": "planted-key-77ab"}
"""What head and hosts have in their environment, as pods have it from a Secret; nobody else may get to see it."""
_PR_SET_CHILD_SUBREAPER = 36
_CHILD_ENDS_SECONDS = 20.0


def _host_ip(number: int) -> str:
    return f"{NETWORK}.{11 + number}"


def _slice_environment(number: int) -> dict[str, str]:
    """What GKE's webhook sets in the pod of the host: the fifth host is the first of a second slice."""
    index, worker = divmod(number, HOSTS_PER_SLICE)
    names = [_host_ip(index * HOSTS_PER_SLICE + other) for other in range(HOSTS_PER_SLICE)]
    return {
        "TPU_NAME": f"slice-{index}",
        "TPU_WORKER_ID": str(worker),
        "TPU_ACCELERATOR_TYPE": f"v5litepod-{HOSTS_PER_SLICE * CHIPS_PER_HOST}",
        "TPU_TOPOLOGY": "4x4",
        "TPU_WORKER_HOSTNAMES": ",".join(names),
    }


def _prepare_environment(folder: Path) -> dict[str, str]:
    """Make this process's environment depend on nothing outside `folder`; returns what clients need of it."""
    for name in [name for name in os.environ if name.startswith(("RAY_", "TPU_"))]:
        del os.environ[name]
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    tpu_logs = folder / "tpu_logs"
    tpu_logs.mkdir()
    shared = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # tests run by `uv run` are not to start workers by it
        # Ray streams the logs found here to every driver, and a driver without it names the machine's own folder.
        "TPU_LOG_DIR": str(tpu_logs),
        "JAX_PLATFORMS": "cpu",
    }
    os.environ.update(SECRETS)
    quick = {"RAY_metrics_report_interval_ms": "1000"}  # a test does not wait ten seconds for a counter
    os.environ.update(shared | quick)
    return shared


class Cluster:
    """The head and its hosts. Ray ties the life of what it starts to the thread that started it: use one thread."""

    def __init__(self, folder: Path, *, cpus: int, plain: bool) -> None:
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        self._node_class, self._params_class = Node, RayParams
        self._cpus, self._plain = cpus, plain
        self._hosts: dict[int, Any] = {}
        self._dead: list[Any] = []
        self._head = self._start(
            num_cpus=0,
            node_ip_address=HEAD_IP,
            temp_dir=str(folder / "ray"),
            include_dashboard=True,
            dashboard_host=HEAD_IP,
            dashboard_port=0,
            no_monitor=True,
        )
        self.gcs_address: str = self._head.gcs_address
        self.dashboard = f"http://{self._head.webui_url}"

    def add_node(self) -> dict[str, Any]:
        """Start a host: in the place, and with the address, of the first that was killed, else a further one."""
        number = next(number for number in range(240) if number not in self._hosts)
        resources = {}
        if not self._plain:
            os.environ.update(_slice_environment(number))  # Ray reads the slice from here, and the raylet inherits it
            resources = {"TPU": CHIPS_PER_HOST}
        self._hosts[number] = self._start(
            num_cpus=self._cpus,
            resources=resources,
            node_ip_address=_host_ip(number),
            gcs_address=self.gcs_address,
            include_log_monitor=False,  # the hosts share the head's log folder, which one monitor reads
        )
        return _describe(self._hosts[number])

    def nodes(self) -> list[dict[str, Any]]:
        """The head, the hosts in order of their place in the slice, then those that were killed."""
        return [_describe(node) for node in (self._head, *self._ordered(), *self._dead)]

    def kill_raylet(self, ip: str) -> dict[str, Any]:
        """SIGKILL the host's raylet and nothing else: its workers may finish what they are at."""
        number = self._number(ip)
        node = self._hosts.pop(number)
        self._dead.append(node)
        node.kill_raylet()
        return _describe(node)

    def kill_host(self, ip: str) -> dict[str, Any]:
        """SIGKILL the host's raylet, agents and workers, as when the machine is lost."""
        raylet = _raylet(self._hosts[self._number(ip)])
        workers = descendants(raylet.pid)
        answer = self.kill_raylet(ip)
        for pid in workers:
            _kill(pid)
        return answer

    def _start(self, **parameters: Any) -> Any:
        parameters = {
            "num_gpus": 0,
            "object_store_memory": OBJECT_STORE_BYTES,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "dashboard_agent_listen_port": 0,
            **parameters,
        }
        head = "gcs_address" not in parameters
        # Without Ray's own hooks, as they would answer SIGTERM; with its PR_SET_PDEATHSIG on every process.
        return self._node_class(self._params_class(**parameters), head=head, shutdown_at_exit=False, spawn_reaper=True)

    def _ordered(self) -> list[Any]:
        return [self._hosts[number] for number in sorted(self._hosts)]

    def _number(self, ip: str) -> int:
        for number in self._hosts:
            if _host_ip(number) == ip:
                return number
        raise LookupError(f"no living host has the address {ip}; have {[_host_ip(number) for number in self._hosts]}")


def _raylet(node: Any) -> Any:
    return node.all_processes["raylet"][0].process


def _describe(node: Any) -> dict[str, Any]:
    raylets = node.all_processes.get("raylet", [])  # Ray forgets a process once it has killed it
    return {
        "node_id": node.node_id,
        "ip": node.node_ip_address,
        "alive": bool(raylets) and _raylet(node).poll() is None,
        "raylet_pid": _raylet(node).pid if raylets else None,
        "metrics": f"http://{node.node_ip_address}:{node.metrics_export_port}/metrics",
        "labels": dict(node.node_labels),
    }


def descendants(pid: int) -> list[int]:
    """Every living process below `pid`."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(child) for child in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in direct:
            found += [child, *descendants(child)]
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _end_descendants() -> None:
    """SIGKILL what is left below this process, again and again as a dying process may have started another."""
    deadline = time.monotonic() + _CHILD_ENDS_SECONDS
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            _kill(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _exit(signum: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def _answer(cluster: Cluster, command: dict[str, str]) -> dict[str, Any]:
    actions: dict[str, Callable[..., Any]] = {
        "nodes": cluster.nodes,
        "add_node": cluster.add_node,
        "kill_raylet": cluster.kill_raylet,
        "kill_host": cluster.kill_host,
    }
    do = command.pop("do")
    try:
        return {"ok": actions[do](**command)}
    except Exception as error:
        return {"error": f"{do}: {type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=HOSTS_PER_SLICE)
    parser.add_argument("--cpus", type=int, default=2, help="of each host")
    parser.add_argument("--memory-threshold", help="share of the machine's memory above which Ray kills workers")
    parser.add_argument("--plain", action="store_true", help="hosts without chips and without a slice")
    options = parser.parse_args()

    # The processes started here must hold neither pipe: stdin's end says that the parent has gone, and stdout is read.
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    # A worker whose raylet was killed becomes a child of this process rather than of init, so it is found at the end.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)

    folder = Path(tempfile.mkdtemp(prefix="pq", dir="/tmp"))  # short: below it are sockets, whose paths have 107 bytes
    try:
        environment = _prepare_environment(folder)
        if options.memory_threshold is not None:
            os.environ.update({"RAY_memory_usage_threshold": options.memory_threshold})
        cluster = Cluster(folder, cpus=options.cpus, plain=options.plain)
        for _ in range(options.hosts):
            cluster.add_node()
        environment |= {"RAY_ADDRESS": cluster.gcs_address, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
        ready = {
            "gcs_address": cluster.gcs_address,
            "dashboard": cluster.dashboard,
            "environment": environment,
            "folder": str(folder),
            "nodes": cluster.nodes(),
        }
        print(json.dumps(ready), file=answers)
        for line in commands:
            print(json.dumps(_answer(cluster, json.loads(line))), file=answers)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the end is under way
        _end_descendants()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
