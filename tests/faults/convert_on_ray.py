"""A conversion on a Ray cluster under faults, each followed by a second run: `python -m tests.faults.convert_on_ray`.

Run by hand; minutes. Prints a line for each fault: how the run ended and how many seconds after the fault, how a second
run did, how many units that found done, and how much was read more than once. Exits with 1 if an artifact ever is not
the right one, or a run does not end as it was meant to.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from podquant.app.demo.model import write_smollm2_checkpoint
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from tests.cluster.conftest import RayCluster
from tests.cluster.test_convert import NUM_UNITS, Driver, converting, stall
from tests.storage.gcs.emulator import GcsEmulator

READS = "/o/smollm2/model.safetensors.*alt=media"
FOREVER = 1 << 30
PATIENCE = 300.0


@dataclass(frozen=True)
class Outcome:
    """What a fault led to.

    Attributes:
        status: of the run that it met.
        seconds: from the fault to that run's end.
        message: its last words.
        again: status of the second run; None if there was none.
        kept: units that the second run found done.
        reread: MB of the source that were read more than once, over both.
    """

    status: int
    seconds: float
    message: str
    again: int | None
    kept: int
    reread: float


class Scene:
    """A cluster and a bucket with SmolLM2, in which one conversion after another is disturbed."""

    def __init__(self, cluster: RayCluster, emulator: GcsEmulator, source: Path) -> None:
        self.cluster, self.emulator, self._source = cluster, emulator, source
        self.emulator.buckets["b"].clear()
        self.emulator.faults.clear()
        self.emulator.log.clear()
        self.put_source()

    def put_source(self, change: int = 0) -> None:
        """Write the source, again; its last byte may be another one."""
        for path in self._source.iterdir():
            data = bytearray(path.read_bytes())
            if change and path.suffix == ".safetensors":
                data[-1] ^= change
            self.emulator.put("b", f"smollm2/{path.name}", bytes(data))

    @property
    def receipts(self) -> int:
        """Units that are done."""
        return sum(name.startswith("out.receipts/model") for name in self.emulator.data("b"))

    def drive(self, *flags: str) -> Driver:
        """Start a conversion."""
        return Driver(self.cluster, *converting("gs://b/out", *flags))

    def await_receipts(self, count: int, driver: Driver) -> None:
        """Until so many units are done, or the conversion is over."""
        while self.receipts < count and driver.process.poll() is None:
            time.sleep(0.002)

    def await_read(self, driver: Driver) -> None:
        """Until bytes of one more window are asked for, or the conversion is over."""
        before = len(self.emulator.requests(READS))
        while len(self.emulator.requests(READS)) == before and driver.process.poll() is None:
            time.sleep(0.002)

    def finish(self, driver: Driver, since: float, again: Callable[[], Driver] | None) -> Outcome:
        """Wait for the run's end, and for that of a second one."""
        status = driver.process.wait(PATIENCE)
        seconds = time.monotonic() - since
        self.emulator.faults.clear()
        second, kept = None, None
        if again is not None:
            other = again()
            second = other.process.wait(PATIENCE)
            kept = re.search(r"; (\d+) units were done before", other.output)
        size = (self._source / "model.safetensors").stat().st_size
        reread = sum(record.bytes_out for record in self.emulator.requests(READS)) - size
        lines = [line for line in driver.output.splitlines() if line.startswith(("error:", "gs://b/out: 2"))]
        return Outcome(
            status, seconds, lines[-1] if lines else "", second, int(kept[1]) if kept else 0, max(0, reread) / 1e6
        )


Fault = Callable[[Scene], Outcome]


def nothing(scene: Scene) -> Outcome:
    """No fault."""
    return scene.finish(scene.drive(), time.monotonic(), None)


def driver_killed(scene: Scene) -> Outcome:
    """SIGKILL for the driver, after two units."""
    driver = scene.drive()
    scene.await_receipts(2, driver)
    since = time.monotonic()
    driver.process.kill()
    return scene.finish(driver, since, scene.drive)


def source_changed(after: int, *, inside: bool = False) -> Fault:
    """Another version of the source, once so many units are done, or inside the next one."""

    def fault(scene: Scene) -> Outcome:
        driver = scene.drive()
        scene.await_receipts(after, driver)
        if inside or after == 0:
            scene.await_read(driver)
        since = time.monotonic()
        scene.put_source(change=1)
        return scene.finish(driver, since, lambda: scene.drive("--overwrite"))

    return fault


def poison(number: signal.Signals) -> Fault:
    """One unit's worker gets a signal, each time."""

    def fault(scene: Scene) -> Outcome:
        held = stall(scene.emulator, scene.cluster)
        driver = scene.drive("--workers-per-host", "2")
        since = 0.0
        while driver.process.poll() is None:
            try:
                worker = held(driver)
            except AssertionError:
                break  # the run is over
            stall(scene.emulator, scene.cluster, skip=0)
            since = since or time.monotonic()
            os.kill(worker, number)
            while Path(f"/proc/{worker}").exists():
                time.sleep(0.02)
        return scene.finish(driver, since, scene.drive)

    return fault


def host_killed(scene: Scene) -> Outcome:
    """SIGKILL for one of two hosts, after one unit; another comes."""
    driver = scene.drive()
    scene.await_receipts(1, driver)
    since = time.monotonic()
    scene.cluster.kill_host(next(node["ip"] for node in scene.cluster.nodes()[1:] if node["alive"]))
    scene.cluster.add_node()
    return scene.finish(driver, since, None)


def read_only(scene: Scene) -> Outcome:
    """Every write is refused with 403, after two units."""
    driver = scene.drive()
    scene.await_receipts(2, driver)
    since = time.monotonic()
    message = "podquant@p does not have storage.objects.create access"
    scene.emulator.fail("status", "^(POST|PUT|DELETE) ", status=403, message=message, times=FOREVER)
    return scene.finish(driver, since, scene.drive)


def out_of_memory(scene: Scene) -> Outcome:
    """Ray's memory monitor kills every worker that does a unit; there is no better cluster for a second run."""
    return scene.finish(scene.drive(), time.monotonic(), None)


def head_lost(number: signal.Signals, second: Callable[[], RayCluster]) -> Fault:
    """A signal for the head's GCS, while one unit is held and all others are done; then another cluster."""

    def fault(scene: Scene) -> Outcome:
        held = stall(scene.emulator, scene.cluster)
        driver = scene.drive("--workers-per-host", "2")
        held(driver)
        (head,) = [pid for pid in scene.cluster.pids() if b"gcs_server" in _program(pid)]
        since = time.monotonic()
        os.kill(head, number)
        driver.process.wait(PATIENCE)
        seconds = time.monotonic() - since
        with second() as scene.cluster:
            outcome = scene.finish(driver, since, scene.drive)
        return replace(outcome, seconds=seconds)

    return fault


def _program(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return b""


def cluster_of_one() -> RayCluster:
    """A cluster of one host."""
    return RayCluster("--plain", "--hosts", "1")


FAULTS: dict[str, tuple[str, Fault, tuple[int, int | None]]] = {
    "no fault": ("shared", nothing, (0, None)),
    "driver SIGKILL": ("shared", driver_killed, (-9, 0)),
    "host SIGKILL": ("shared", host_killed, (0, None)),
    **{f"source changed after {n} units": ("shared", source_changed(n), (1, 0)) for n in range(NUM_UNITS)},
    "source changed inside the last": ("shared", source_changed(NUM_UNITS - 1, inside=True), (1, 0)),
    "poison unit, SIGKILL": ("shared", poison(signal.SIGKILL), (1, 0)),
    "poison unit, SIGSEGV": ("shared", poison(signal.SIGSEGV), (1, 0)),
    "bucket read-only after 2 units": ("shared", read_only, (1, 0)),
    "out of memory (Ray's monitor)": ("tight", out_of_memory, (1, None)),
    "head SIGKILL": ("own", head_lost(signal.SIGKILL, cluster_of_one), (1, 0)),
    "head SIGSTOP": ("own", head_lost(signal.SIGSTOP, cluster_of_one), (1, 0)),
}
"""By name: the cluster it needs, what happens, and the statuses that are meant."""


def expected_artifact(source: Path) -> dict[str, bytes]:
    """Made in this process."""
    checkpoint = Checkpoint.open(str(source))
    plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name="smollm2")
    convert(checkpoint, plan, str(source.parent / "out"), threads=2)
    checkpoint.close()
    return {path.name: path.read_bytes() for path in (source.parent / "out").iterdir()}


def wrong(outcome: Outcome, meant: tuple[int, int | None], scene: Scene, expected: dict[str, bytes], name: str) -> str:
    """What is not as it should be; empty if nothing is."""
    found = {key.removeprefix("out/"): data for key, data in scene.emulator.data("b").items() if key.startswith("out/")}
    if (outcome.status, outcome.again) != meant:
        return f"ended with {(outcome.status, outcome.again)} instead of {meant}"
    whole = "podquant.json" in found
    if whole != (0 in meant):
        return "an artifact is there" if whole else "no artifact is there"
    if whole and not name.startswith("source changed") and found != expected:
        return "the artifact is another one"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=".", help="a pattern of names")
    options = parser.parse_args()
    chosen = {name: fault for name, fault in FAULTS.items() if re.search(options.only, name)}
    failures = 0
    with tempfile.TemporaryDirectory(prefix="pq") as folder, GcsEmulator("b") as emulator:
        source = Path(folder) / "smollm2"
        write_smollm2_checkpoint(source)
        expected = expected_artifact(source)
        os.environ["STORAGE_EMULATOR_HOST"] = emulator.url
        print("| fault | status | seconds | second run | units kept | MB read again | last words |")
        print("|---|---|---|---|---|---|---|")
        for kind, cluster_options in {
            "shared": ("--plain", "--hosts", "2"),
            "tight": ("--plain", "--hosts", "1", "--memory-threshold", "0.01"),
            "own": ("--plain", "--hosts", "1"),
        }.items():
            faults = {name: row for name, row in chosen.items() if row[0] == kind}
            groups = [faults] if kind != "own" else [{name: row} for name, row in faults.items()]
            for group in groups:
                if not group:
                    continue
                with RayCluster(*cluster_options) as cluster:
                    for name, (_, fault, meant) in group.items():
                        scene = Scene(cluster, emulator, source)
                        outcome = fault(scene)
                        again = "" if outcome.again is None else outcome.again
                        problem = wrong(outcome, meant, scene, expected, name)
                        failures += bool(problem)
                        print(
                            f"| {name} | {outcome.status} | {outcome.seconds:.1f} | {again} | {outcome.kept} | "
                            f"{outcome.reread:.0f} | "
                            f"{outcome.message[:300]}{' WRONG: ' + problem if problem else ''} |",
                            flush=True,
                        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
