"""What `podquant convert` on a Ray cluster costs: speed next to `cp`, bytes moved, and the memory of a worker.

    .venv/bin/python tests/benchmarks/convert_cluster.py /scratch [--workers 1 2 4] [--keep] [--tp-size 1]

Makes the 3 GB checkpoint of `convert.py` in a new directory below the one given. For each number of workers, a cluster
of that many hosts with one worker each converts it local to local and gs:// to gs://, the bucket being the emulator of
`tests/storage/gcs_emulator.py` in a process of its own, which counts. Driver, cluster, workers and emulator share this
machine's cores. The memory of a worker is its highest resident set, less that of one that converted a megabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.convert import make_checkpoint, run
from tests.cluster.conftest import RayCluster

EMULATOR = Path(__file__).parents[1] / "storage" / "gcs" / "emulator.py"
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}


class Watch:
    """The highest resident set of any Ray worker that runs podquant's tasks, seen from outside."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster, self.peak = cluster, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.2):
            for pid in self._cluster.pids():
                try:
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_call"):
                        status = Path(f"/proc/{pid}/status").read_text()
                        self.peak = max(self.peak, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024)  # type: ignore[index]
                except (FileNotFoundError, ProcessLookupError):
                    continue


@contextmanager
def emulator(*places: str) -> Iterator[str]:
    """A bucket `b` in a process of its own; `places` are DIRECTORY=PREFIX to fill it with."""
    command = [sys.executable, str(EMULATOR), "--bucket", "b", *(f"--load={place}" for place in places)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def log_of(url: str) -> list[dict[str, Any]]:
    """Every request so far."""
    with urllib.request.urlopen(f"{url}/_control") as answer:
        records: list[dict[str, Any]] = json.load(answer)
    return records


def convert(cluster: RayCluster, source: str, target: str, environment: dict[str, str], tp_size: int) -> dict[str, Any]:
    """One conversion by the command line: wall seconds, the workers' peak memory, and what it said of its time."""
    command = [sys.executable, "-m", "podquant.cli.main", "convert", source, target, "--address", "auto"]
    command += ["--quantization-config-path", "int8.yaml", "--threads", "1", "--tp-size", str(tp_size)]
    with Watch(cluster) as watch:
        begin = time.perf_counter()
        done = subprocess.run(
            command, env=os.environ | cluster.environment | environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    said = next(line for line in done.stdout.splitlines() if line.startswith("time in all workers"))
    return {"seconds": seconds, "peak": watch.peak, "said": said}


def counted(records: list[dict[str, Any]], source: int, artifact: int) -> str:
    """Bytes and requests, as the emulator saw them."""
    reads = [each for each in records if re.match("GET .*/o/source.*alt=media", each["request"])]
    writes = [each for each in records if re.match("(POST|PUT) .*upload", each["request"])]
    lists = sum(bool(re.match(r"GET .*/o\?prefix=source", each["request"])) for each in records)
    heads = sum(bool(re.match("GET .*/o/source(?!.*alt=media)", each["request"])) for each in records)
    return (
        f"read {sum(each['bytes_out'] for each in reads) / source:.4f} of the source in {len(reads)} requests, wrote "
        f"{sum(each['bytes_in'] for each in writes) / artifact:.4f} of the artifact in {len(writes)}; "
        f"{lists} listings and {heads} look-ups of the source"
    )


def main() -> None:
    """Measure, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint, and use one that is there")
    arguments = parser.parse_args()
    place = arguments.directory / "podquant-benchmark"
    source, small, copy, out = (place / name for name in ("source", "small", "copy", "artifact"))
    place.mkdir(parents=True, exist_ok=True)
    try:
        if not source.exists():
            make_checkpoint(source)
        if not small.exists():
            make_checkpoint(small, SMALL)
        total = sum(file.stat().st_size for file in source.iterdir())
        for workers in arguments.workers:
            with RayCluster("--plain", "--hosts", str(workers), "--cpus", "1") as cluster:
                base = convert(cluster, str(small), str(out), {}, arguments.tp_size)["peak"]
                shutil.rmtree(out)
                os.sync()
                copied, _, _ = run(["cp", "-r", str(source), str(copy)])
                shutil.rmtree(copy)
                os.sync()
                local = convert(cluster, str(source), str(out), {}, arguments.tp_size)
                artifact = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                shutil.rmtree(out)
                _print(f"{workers} workers, local to local", total, local, copied, base)
                with emulator(f"{source}=source", f"{small}=small") as url:
                    environment = {"STORAGE_EMULATOR_HOST": url}
                    base = convert(cluster, "gs://b/small", "gs://b/small-out", environment, arguments.tp_size)["peak"]
                    before = len(log_of(url))
                    remote = convert(cluster, "gs://b/source", "gs://b/artifact", environment, arguments.tp_size)
                    _print(f"{workers} workers, gs:// to gs://", total, remote, copied, base)
                    print(f"  {counted(log_of(url)[before:], total, artifact)}", flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(place)


def _print(what: str, total: int, found: dict[str, Any], copied: float, base: int) -> None:
    seconds, more = found["seconds"], (found["peak"] - base) / 1e6
    print(
        f"{what}: {seconds:.1f} s in all, {total / seconds / 1e9:.2f} GB/s of source, {seconds / copied:.1f} times cp "
        f"({copied:.1f} s); a worker {more:+.0f} MB over {base / 1e6:.0f} MB\n  {found['said']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
