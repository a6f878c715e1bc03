"""Seconds until a server is ready, and the most memory it takes: from an artifact, and quantizing a checkpoint at load.

    .venv/bin/python tests/benchmarks/start.py /scratch [--keep] [--hosts 1 2] [--repeat 2] [--tp-size 2]

Uses the 3 GB checkpoint of `convert.py` and its int8 artifact. Hosts are processes of this machine, which share its
cores; weights on a CPU lie in host memory. Shapes compile at their first use, so that loading is what is seen.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.convert import make_checkpoint, run
from tests.cli.test_serve import free_port
from tests.cluster.ray_cluster import descendants

RULES = ["--quantization-config-path", "int8.yaml"]


class Memory:
    """The highest resident set of each process below some, watched from outside."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self.peaks: dict[int, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> list[int]:
        """Bytes of each process, the largest first."""
        self._ended.set()
        self._thread.join()
        return sorted(self.peaks.values(), reverse=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for pid in [pid for top in self._pids for pid in (top, *descendants(top))]:
                try:
                    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if found:
                    self.peaks[pid] = int(found[1]) * 1024


def start(model: Path, flags: list[str], hosts: int, tp_size: int) -> tuple[float, list[int], str]:
    """Seconds to ready, peak memory by process, and what was said of the load."""
    port, meeting = free_port(), f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "podquant.launch_server", str(model), "--device", "cpu", "--port", str(port)]
    command += ["--tp-size", str(tp_size), "--skip-tokenizer-init", "--skip-server-warmup", "--context-length", "1024"]
    command += ["--nnodes", str(hosts), "--dist-init-addr", meeting, *flags]
    environment = os.environ | {"PODQUANT_GROUP_SECRET": "0123456789abcdef", "JAX_PLATFORMS": "cpu"}
    begin = time.perf_counter()
    processes = [
        subprocess.Popen(
            [*command, "--node-rank", str(rank)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(hosts)
    ]
    memory = Memory([process.pid for process in processes])
    try:
        while True:
            if processes[0].poll() is not None:
                sys.exit(processes[0].communicate()[1])
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        seconds = time.perf_counter() - begin
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        said = processes[0].communicate()[1]
        for process in processes:
            process.wait()
    loaded = re.search(r"loaded .*", said)
    return seconds, memory.end(), loaded[0] if loaded else ""


def main() -> None:
    """Measure, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the files, and use those that are there")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--tp-size", type=int, default=2)
    arguments = parser.parse_args()
    place = arguments.directory / "podquant-benchmark"
    source, artifact = place / "source", place / "int8"
    place.mkdir(parents=True, exist_ok=True)
    try:
        if not source.exists():
            make_checkpoint(source)
        if not artifact.exists():
            run([sys.executable, "-m", "podquant.cli.main", "convert", str(source), str(artifact), *RULES])
        for hosts in arguments.hosts:
            for _ in range(arguments.repeat):
                for what, model, flags in (("artifact", artifact, []), ("bf16 at load", source, RULES)):
                    seconds, peaks, said = start(model, flags, hosts, arguments.tp_size)
                    megabytes = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
                    print(f"{hosts} hosts, {what}: ready after {seconds:.1f} s; MB by process: {megabytes}; {said}")
    finally:
        if not arguments.keep:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
