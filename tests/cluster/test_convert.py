"""Whole conversions of SmolLM2 on a Ray cluster of four hosts, bucket to bucket, while processes are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from podquant.app.demo.model import write_smollm2_checkpoint
from podquant.artifact.merge import merge_artifact
from podquant.artifact.verify import verify_artifact
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from tests.cluster.conftest import RayCluster
from tests.group.hosts import PATIENCE, wait_until
from tests.matrix import MATRIX
from tests.storage.gcs.emulator import GcsEmulator

JOB = Path(__file__).parents[2] / "jobs" / "convert.py"
NUM_UNITS = 5
RULES = ("--quantization-config-path", "int8.yaml")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("smollm2") / "smollm2"
    write_smollm2_checkpoint(place)
    return place


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> dict[str, bytes]:
    """The files of the artifact, made in this process from a local disk."""
    checkpoint = Checkpoint.open(str(smollm2))
    plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name="smollm2")
    assert len(plan.units) == NUM_UNITS
    convert(checkpoint, plan, str(smollm2.parent / "out"), threads=2)
    checkpoint.close()
    return {path.name: path.read_bytes() for path in (smollm2.parent / "out").iterdir()}


@pytest.fixture
def emulator(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsEmulator]:
    """A bucket with SmolLM2."""
    with GcsEmulator("b") as emulator:
        for path in smollm2.iterdir():
            emulator.put("b", f"smollm2/{path.name}", path.read_bytes())
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        yield emulator


@pytest.fixture
def hosts(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    """The cluster; a host that a test kills is replaced after it."""
    yield ray_cluster
    while sum(node["alive"] for node in ray_cluster.nodes()) < 5:
        ray_cluster.add_node()


class Driver:
    """A driver on the head: podquant, or a script."""

    def __init__(self, hosts: RayCluster, *arguments: str) -> None:
        command = [sys.executable, *arguments] if arguments[0].endswith(".py") else podquant(*arguments)
        self._output = Path(hosts.ready["folder"]) / f"driver-{uuid.uuid4().hex}"  # a pipe that nobody reads fills up
        with self._output.open("w") as output:
            environment = os.environ | hosts.environment
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def finish(self) -> str:
        """Wait for its end, which must be a good one; what it has printed."""
        status = self.process.wait(timeout=PATIENCE)
        assert status == 0, self.output
        return self.output


def podquant(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "podquant.cli.main", *arguments]


def converting(target: str, *flags: str) -> list[str]:
    return ["convert", "gs://b/smollm2", target, *RULES, "--threads", "1", "--address", "auto", *flags]


def artifact(emulator: GcsEmulator, name: str = "out") -> dict[str, bytes]:
    """What is below a place; and nothing may be left beside it."""
    data = emulator.data("b")
    assert not [key for key in data if key.startswith((f"{name}.", f"{name}/."))]
    return {key.removeprefix(f"{name}/"): value for key, value in data.items() if key.startswith(f"{name}/")}


def bytes_read(emulator: GcsEmulator) -> int:
    return sum(record.bytes_out for record in emulator.requests("/o/smollm2.*alt=media"))


def write_job(place: Path, **options: object) -> str:
    lines = ["source: gs://b/smollm2", "target: gs://b/out", "quantization_config_path: int8.yaml", "cluster:"]
    lines += [f"  {key}: {value}" for key, value in {"threads_per_worker": 1, **options}.items()]
    path = place / "job.yaml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def stall(emulator: GcsEmulator, hosts: RayCluster, *, skip: int = 1) -> Callable[..., int]:
    """Hold the read of one worker for ever. Returns a function that waits until it is held and all others have done
    what they could, and tells the held worker's pid."""
    # The first range read is the header's, by the driver.
    fault = emulator.fail("stall", "/o/smollm2/model.safetensors.*alt=media", after=1 << 20, skip=skip)

    def held(driver: Driver | None = None) -> int:
        deadline = time.monotonic() + PATIENCE
        while True:
            receipts = [name for name in emulator.data("b") if re.match(r"out\.receipts/model", name)]
            workers = [pid for pid in hosts.pids() if _title(pid).startswith("ray::_call")]
            # Whose process has begun may not have said so yet; who reads has.
            if fault.times == 0 and len(receipts) == NUM_UNITS - 1 and len(workers) == 1:
                return workers[0]
            is_over = driver is not None and driver.process.poll() is not None
            assert not is_over, driver and driver.output
            assert time.monotonic() < deadline, (receipts, workers, driver and driver.output)
            time.sleep(0.1)

    return held


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def assert_one_redone(emulator: GcsEmulator, expected: dict[str, bytes], source: Path) -> None:
    assert artifact(emulator) == expected
    size = sum(path.stat().st_size for path in source.iterdir())
    assert bytes_read(emulator) <= size * 1.02 + 2 * (64 << 20)  # the unit's windows may have been read ahead


@pytest.mark.slow
def test_a_submitted_job_makes_the_same_bytes_and_moves_each_once(
    hosts: RayCluster, emulator: GcsEmulator, expected: dict[str, bytes], smollm2: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path, accelerator="v5e-16")
    environment = {"STORAGE_EMULATOR_HOST": emulator.url}
    done = hosts.submit([sys.executable, str(JOB), job], environment)
    assert done.returncode == 0, done.stdout
    assert "5 of 5 units" in done.stdout
    assert "gs://b/out: 269.03 MB converted to 137.63 MB in 5 units" in done.stdout
    assert artifact(emulator) == expected
    assert verify_artifact("gs://b/out") == []
    emulator.log = emulator.log[: -len(emulator.requests("/o/out/.*alt=media"))]
    assert bytes_read(emulator) <= 1.02 * sum(path.stat().st_size for path in smollm2.iterdir())
    written = sum(record.bytes_in for record in emulator.requests("^(POST|PUT) .*upload"))
    assert written <= 1.02 * sum(map(len, expected.values()))
    # The driver at the beginning and the end, each unit before and after it reads: whether the source has changed.
    assert len(emulator.requests(r"^GET .*/o\?prefix=smollm2/")) == 2 + 2 * NUM_UNITS
    assert not [each for each in emulator.requests("^GET .*/o/smollm2") if "alt=media" not in each.request]
    units = re.compile(r'^ray_podquant_units_done_total\{.*host="(127[^"]*)".*\} ([\d.]+)$', re.MULTILINE)
    pages = [urllib.request.urlopen(node["metrics"]).read().decode() for node in hosts.nodes() if node["alive"]]
    counted = [(host, float(number)) for page in pages for host, number in units.findall(page)]
    assert sum(number for _, number in counted) >= NUM_UNITS
    assert {host for host, _ in counted} <= {node["ip"] for node in hosts.nodes()[1:]}
    again = hosts.submit([sys.executable, str(JOB), job], environment)
    assert again.returncode == 1
    assert "error: gs://b/out: already exists. Choose another place" in again.stdout


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_slices_put_together_are_the_same_bytes(
    hosts: RayCluster, emulator: GcsEmulator, expected: dict[str, bytes], tmp_path: Path, tp_size: int
) -> None:
    Driver(hosts, *converting("gs://b/cut", "--tp-size", str(tp_size))).finish()
    assert len([name for name in artifact(emulator, "cut") if name.startswith("tp-")]) == tp_size * NUM_UNITS
    merge_artifact("gs://b/cut", str(tmp_path / "merged"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == expected


@pytest.mark.slow
def test_a_killed_worker(hosts: RayCluster, emulator: GcsEmulator, expected: dict[str, bytes], smollm2: Path) -> None:
    held = stall(emulator, hosts)
    driver = Driver(hosts, *converting("gs://b/out"))
    os.kill(held(driver), signal.SIGKILL)
    driver.finish()
    assert_one_redone(emulator, expected, smollm2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "what"),
    [
        (signal.SIGKILL, r"was killed from outside 2 times, last: process \d+ on 127[\d.]+, by SIGKILL or an exit"),
        (signal.SIGSEGV, r"crashed 2 times, last: process \d+ on 127[\d.]+, by SIGSEGV; its log there: /tmp/\S+\.err"),
    ],
)
def test_a_unit_that_kills_its_workers(
    hosts: RayCluster, emulator: GcsEmulator, tmp_path: Path, number: signal.Signals, what: str
) -> None:
    held = stall(emulator, hosts)
    driver = Driver(hosts, str(JOB), write_job(tmp_path, max_retries=1))
    workers = []
    for _ in range(2):
        workers.append(held(driver))
        held = stall(emulator, hosts, skip=0)
        os.kill(workers[-1], number)
        wait_until(lambda: not _title(workers[-1]), PATIENCE, "it is dead")
    assert driver.process.wait(timeout=PATIENCE) == 1
    assert len(set(workers)) == 2
    (last,) = [line for line in driver.output.splitlines() if line.startswith("error: ")]
    unit = r"model-0000\d-of-00005\.safetensors \((\d+ tensors, )?model\.\S+ .*a worker holds up to \d+ MB for it"
    assert re.search(rf"{unit}.*\): its worker {what}", last), last
    assert last.endswith("4 of 5 units are done and kept: run the same again, and it goes on from there")


@pytest.mark.slow
@pytest.mark.parametrize("what", [pytest.param("raylet", marks=MATRIX), "host"])
def test_a_killed_host(
    hosts: RayCluster, emulator: GcsEmulator, expected: dict[str, bytes], smollm2: Path, what: str
) -> None:
    held = stall(emulator, hosts)
    driver = Driver(hosts, *converting("gs://b/out", "--workers-per-host", "2"))
    (raylet,) = map(int, re.findall(r"PPid:\t(\d+)", Path(f"/proc/{held(driver)}/status").read_text()))
    (ip,) = [node["ip"] for node in hosts.nodes() if node["raylet_pid"] == raylet]
    (hosts.kill_raylet if what == "raylet" else hosts.kill_host)(ip)
    driver.finish()
    assert_one_redone(emulator, expected, smollm2)


@pytest.mark.slow
def test_a_killed_driver_and_a_second_run(
    hosts: RayCluster, emulator: GcsEmulator, expected: dict[str, bytes], smollm2: Path
) -> None:
    held = stall(emulator, hosts)
    driver = Driver(hosts, *converting("gs://b/out"))
    held(driver)
    driver.process.kill()
    driver.process.wait()
    assert "out/podquant.json" not in emulator.data("b")
    output = Driver(hosts, *converting("gs://b/out")).finish()
    assert "gs://b/out: locked by process" in output
    assert "in 5 units; 4 units were done before" in output
    assert_one_redone(emulator, expected, smollm2)


@pytest.mark.slow
def test_a_stopped_job_and_a_second_run(
    hosts: RayCluster, emulator: GcsEmulator, expected: dict[str, bytes], smollm2: Path, tmp_path: Path
) -> None:
    held = stall(emulator, hosts)
    command = [sys.executable, str(JOB), write_job(tmp_path)]
    job = hosts.submit_no_wait(command, {"STORAGE_EMULATOR_HOST": emulator.url})
    worker = held()
    hosts.stop(job)
    assert "out/podquant.json" not in emulator.data("b")
    assert "out.lock" not in emulator.data("b")
    assert not _title(worker).startswith("ray::_call")
    output = Driver(hosts, *converting("gs://b/out")).finish()
    assert "4 units were done before" in output
    assert_one_redone(emulator, expected, smollm2)


@pytest.mark.slow
def test_a_worker_that_hangs(
    hosts: RayCluster, emulator: GcsEmulator, expected: dict[str, bytes], smollm2: Path, tmp_path: Path
) -> None:
    held = stall(emulator, hosts)
    driver = Driver(hosts, str(JOB), write_job(tmp_path, unit_deadline_seconds=45))
    worker = held(driver)
    os.kill(worker, signal.SIGSTOP)
    output = driver.finish()
    assert "given to another worker: its worker gave no answer in time: not within 45 s" in output
    assert_one_redone(emulator, expected, smollm2)
    assert not _title(worker)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=MATRIX)])
def test_a_lost_head(emulator: GcsEmulator, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "24")
    with RayCluster("--plain", "--hosts", "1") as cluster:
        held = stall(emulator, cluster)
        driver = Driver(cluster, *converting("gs://b/out", "--workers-per-host", "2"))
        held(driver)
        (head,) = [pid for pid in cluster.pids() if "gcs_server" in _title(pid).partition("\0")[0]]
        os.kill(head, number)
        assert driver.process.wait(timeout=PATIENCE) == 1, driver.output
        assert "\nerror: " in driver.output, driver.output
        (last,) = [line for line in driver.output.splitlines() if line.startswith("error: ")]
        assert f"error: Ray's head {cluster.address}: no answer for 8 s: it has ended, or cannot be reached" in last
        assert "submit the same job there. 4 of 5 units are done and kept: run the same again, and" in last
        assert "Traceback" not in driver.output
        assert "out.lock" not in emulator.data("b")


SCRIPT = """
import sys
from podquant.cluster.ray_hosts import RayHosts
from podquant.cluster.topology import parse_slice
from podquant.errors import ClusterError
try:
    with RayHosts(accelerator=parse_slice(sys.argv[1]) if sys.argv[1] else None, cpus_per_worker=int(sys.argv[2]),
                  reserve_seconds=2.0):
        print("entered")
except ClusterError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accelerator", "cpus", "message"),
    [
        ("v6e-16", 1, r"expected a free TPU slice v6e-16 \(4x4, 4 hosts\) with 1 x 1 free CPUs on each host, got none"),
        (
            "v5e-16",
            3,
            r"expected a free TPU slice v5litepod-16 .* with 1 x 3 free CPUs on each host, got none within 2",
        ),
        ("", 3, r"expected 1 x 3 free CPUs on each TPU host, got 127[.0-9]* with 2 CPUs, 4 TPU chips, 127"),
    ],
)
def test_hosts_that_are_not_there(hosts: RayCluster, accelerator: str, cpus: int, message: str) -> None:
    command = [sys.executable, "-c", SCRIPT, accelerator, str(cpus)]
    done = subprocess.run(command, env=os.environ | hosts.environment, capture_output=True, text=True, check=True)
    assert re.search(message, done.stdout), done.stdout + done.stderr


RESERVING = """
import sys, threading, time
from podquant.app.signals import exiting_on_sigterm
from podquant.cluster.ray_hosts import RayHosts
from podquant.cluster.topology import parse_slice
from podquant.errors import ClusterError

def tell():
    while all(thread.name != "reserve hosts" for thread in threading.enumerate()):
        time.sleep(0.1)
    print("reserving", flush=True)

threading.Thread(target=tell, daemon=True).start()
try:
    with exiting_on_sigterm(), RayHosts(accelerator=parse_slice("v6e-16")):
        pass
except ClusterError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.slow
def test_a_head_lost_or_a_signal_while_hosts_are_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "24")
    (tmp_path / "reserve.py").write_text(RESERVING)

    def reserving() -> Driver:
        driver = Driver(cluster, str(tmp_path / "reserve.py"))
        wait_until(lambda: "reserving" in driver.output, PATIENCE, "it reserves", lambda: driver.output)
        return driver

    with RayCluster("--plain", "--hosts", "1") as cluster:
        driver = reserving()
        driver.process.terminate()
        assert driver.process.wait(timeout=PATIENCE) == 143, driver.output
        driver = reserving()
        (head,) = [pid for pid in cluster.pids() if "gcs_server" in _title(pid).partition("\0")[0]]
        os.kill(head, signal.SIGKILL)
        assert driver.process.wait(timeout=PATIENCE) == 1, driver.output
        assert f"error: Ray's head {cluster.address}: no answer for 8 s: it has ended, or cannot be reached" in (
            driver.output
        )


@pytest.mark.slow
def test_no_cluster_there(smollm2: Path, tmp_path: Path) -> None:
    command = podquant("convert", str(smollm2), str(tmp_path / "out"), *RULES, "--address", "127.0.0.1:1")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        "error: Ray cluster 127.0.0.1:1: cannot connect: [Errno 111] Connection refused. Give the address"
        in done.stderr
    )
