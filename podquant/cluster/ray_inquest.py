"""What became of a worker that has died: a look at its host, for the signal in its log and for the kernel's OOM killer.

Ray itself only says that the worker died unexpectedly. Knows nothing of what the worker did.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from podquant.cluster.losses import Cause, Loss
from podquant.cluster.ray_meter import this_host

_TAIL_BYTES = 1 << 16
_SIGNAL = re.compile(r"\*\*\* (SIG[A-Z]+) received|Fatal Python error: ([^\n]*)")
_OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")
"""Files with a line `oom_kill COUNT` of processes killed: of the container (cgroup v2, v1), and of the machine."""


@dataclass(frozen=True)
class Worker:
    """A process that does a task.

    Attributes:
        host: its address.
        node: what Ray calls its host.
        pid: on its host.
        log: the file there that its stderr goes to, where a crash leaves its trace.
        oom_kills: by each of the kernel's counters, when the task began.
    """

    host: str
    node: str
    pid: int
    log: str
    oom_kills: Mapping[str, int]


def this_worker() -> Worker:
    """This process."""
    node = str(ray.get_runtime_context().get_node_id())
    return Worker(this_host(), node, os.getpid(), os.readlink("/proc/self/fd/2"), _oom_kills())


def begin_inquest(worker: Worker) -> Any:
    """Ask a worker's host what became of it. Returns a reference to a Loss; Ray's error if the host has gone, too."""
    strategy = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    return _examine.options(scheduling_strategy=strategy).remote(worker)


@ray.remote(num_cpus=0, max_retries=0)
def _examine(worker: Worker) -> Loss:
    return find_cause(worker, _oom_kills(), _tail(worker.log))


def find_cause(worker: Worker, oom_kills: Mapping[str, int], log: str) -> Loss:
    """What became of a dead worker, from what its host's counters and its log say now."""
    where = f"process {worker.pid} on {worker.host}"
    found = _SIGNAL.search(log)
    if found is not None:
        return Loss(Cause.CRASHED, f"{where}, by {found[1] or found[2]}; its log there: {worker.log}")
    if any(count > worker.oom_kills.get(name, count) for name, count in oom_kills.items()):
        return Loss(Cause.MEMORY, f"{where}, while the kernel's OOM killer was at work there")
    return Loss(Cause.KILLED, f"{where}, by SIGKILL or an exit of its own, without a trace in its log {worker.log}")


def _oom_kills() -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in _OOM_COUNTERS:
        with suppress(OSError):
            for line in Path(path).read_text().splitlines():
                if line.startswith("oom_kill "):
                    counts[path] = int(line.split()[1])
    return counts


def _tail(path: str) -> str:
    if not os.path.isfile(path):  # Ray can be told to leave stderr where it was
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
