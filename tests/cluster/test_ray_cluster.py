"""The cluster that the tests run on behaves as a TPU slice does to Ray: placement, loss of a host, metrics, an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.conftest import RayCluster, wait_for
from tests.group.hosts import PATIENCE

ONE_TASK_PER_HOST = """
import json, os, ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.tpu import slice_placement_group

ray.init()
reserved = slice_placement_group(topology="4x4", accelerator_version="v5litepod")
ray.get(reserved.slice_placement_group.ready(), timeout=300)

@ray.remote(num_cpus=0, resources={"TPU": 4})
def where():
    context = ray.get_runtime_context()
    return ray.util.get_node_ip_address(), context.get_node_labels(), os.environ["TPU_WORKER_ID"]

def strategy(bundle):
    return PlacementGroupSchedulingStrategy(reserved.slice_placement_group, placement_group_bundle_index=bundle)

found = ray.get([where.options(scheduling_strategy=strategy(bundle)).remote() for bundle in range(reserved.num_hosts)])
print("FOUND " + json.dumps(found))
reserved.shutdown()
"""

A_TASK_THAT_SLEEPS_AT_FIRST = """
import pathlib, ray, sys, time

ray.init()
folder = pathlib.Path(sys.argv[1])

def write(name, text):
    (folder / "part").write_text(text)
    (folder / "part").rename(folder / name)

@ray.remote(num_cpus=0, resources={"TPU": 4}, max_retries=1)
def task():
    ip = ray.util.get_node_ip_address()
    if not (folder / "first").exists():
        write("first", ip)
        time.sleep(600)
    return ip

last = ray.get(task.remote())
print("AT LAST " + last, flush=True)
write("last", last)
"""

COUNT = """
import ray, sys, time, urllib.request
from ray.util.metrics import Counter

ray.init()

@ray.remote(resources={sys.argv[1]: 0.01})
class Counting:
    def count(self):
        self.counter = Counter("harness_counted", description="things", tag_keys=("kind",))
        self.counter.inc(3, tags={"kind": "thing"})

counting = Counting.remote()
ray.get(counting.count.remote())
for _ in range(200):
    text = urllib.request.urlopen(sys.argv[2]).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_harness_counted")]
    if lines:
        break
    time.sleep(0.1)
print("\\n".join(lines))
"""


@pytest.mark.slow
def test_a_job_runs_one_task_on_each_host_of_the_slice(ray_cluster: RayCluster) -> None:
    done = ray_cluster.submit([sys.executable, "-c", ONE_TASK_PER_HOST])

    assert done.returncode == 0, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found = {ip: (labels, worker) for ip, labels, worker in json.loads(line.removeprefix("FOUND "))}
    assert sorted(found) == ray_cluster.ips
    for number, ip in enumerate(sorted(found)):
        labels, worker = found[ip]
        assert worker == str(number)
        assert {name: value for name, value in labels.items() if name != "ray.io/node-id"} == {
            "ray.io/tpu-slice-name": "slice-0",
            "ray.io/tpu-worker-id": str(number),
            "ray.io/tpu-topology": "4x4",
            "ray.io/tpu-pod-type": "v5litepod-16",
            "ray.io/accelerator-type": "TPU-V5LITEPOD",
        }


@pytest.mark.slow
def test_a_failing_job_is_reported(ray_cluster: RayCluster) -> None:
    done = ray_cluster.submit('echo "$GREETING"; exit 3', {"GREETING": "from the environment"})

    assert done.returncode == 1
    assert "from the environment" in done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.matrix
def test_a_task_on_a_killed_raylet_is_retried_elsewhere(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job = ray_cluster.submit_no_wait([sys.executable, "-c", A_TASK_THAT_SLEEPS_AT_FIRST, str(tmp_path)])
    first = wait_for(tmp_path / "first")
    ray_cluster.kill_raylet(first)
    try:
        last = wait_for(tmp_path / "last")
    finally:
        ray_cluster.stop(job)
        added = ray_cluster.add_node()

    assert last != first
    assert f"AT LAST {last}" in ray_cluster.logs(job).splitlines()
    assert added["ip"] == first
    alive = [node["alive"] for node in ray_cluster.nodes()]
    assert alive[:5] == [True] * 5
    assert not any(alive[5:])  # other tests may have killed hosts before


@pytest.mark.slow
def test_a_driver_outside_a_job_needs_the_environment_alone(ray_cluster: RayCluster) -> None:
    host = ray_cluster.nodes()[2]
    counted = subprocess.run(
        [sys.executable, "-c", COUNT, f"node:{host['ip']}", host["metrics"]],
        env=os.environ | ray_cluster.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert counted.returncode == 0, counted.stderr
    assert 'kind="thing"' in counted.stdout, counted.stderr
    assert counted.stdout.split()[-1] == "3.0"


@pytest.mark.slow
def test_a_cluster_that_cannot_start_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"ray_cluster\.py ended with code 2; stderr says why"):
        RayCluster("--no-such-option")
    assert "unrecognized arguments: --no-such-option" in capfd.readouterr().err


def test_a_client_without_the_token_is_refused(ray_cluster: RayCluster) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(f"{ray_cluster.dashboard}/api/jobs/")
    refused.value.close()


@pytest.mark.slow
def test_a_second_cluster_ends_alone_and_whole(ray_cluster: RayCluster) -> None:
    with RayCluster("--plain", "--hosts", "1", "--cpus", "1") as second:
        head, host = second.nodes()
        assert [name for name in host["labels"] if "tpu" in name] == []
        with pytest.raises(
            AssertionError, match=rf"no living host has the address 127\.0\.0\.99; have \['{host['ip']}'\]"
        ):
            second.kill_host("127.0.0.99")
        second.kill_host(host["ip"])
        assert not Path(f"/proc/{host['raylet_pid']}").exists()
        pids = second.pids()
        second.process.send_signal(signal.SIGTERM)
        second.process.wait(timeout=PATIENCE)

    assert head["raylet_pid"] in pids
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert sum(node["alive"] for node in ray_cluster.nodes()) == 5
