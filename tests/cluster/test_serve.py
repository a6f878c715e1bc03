"""From bfloat16 in a bucket to an answered request by one job, on the four hosts of a slice; and losses there."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.cli.test_serve import free_port
from tests.cluster.conftest import RayCluster
from tests.cluster.ray_cluster import SECRETS, descendants
from tests.group.hosts import PATIENCE, cmdline, is_alive, wait_until
from tests.group.references import GOLDENS, PROMPTS, expected_tokens
from tests.storage.gcs.emulator import GcsEmulator

JOBS = Path(__file__).parents[2] / "jobs"

JOB = """
source: gs://b/llama
target: gs://b/out
quantization_config_path: int8.yaml
tp_size: 4
serve:
  host: {host}
  port: {port}
  tp_size: 8
  device: cpu
  dtype: float32
  max_running_requests: 2
  chunked_prefill_size: 32
  max_total_tokens: 2048
  skip_tokenizer_init: true
  skip_server_warmup: true
  liveness_seconds: 15
cluster:
  accelerator: v5e-16
  threads_per_worker: 1
  env: {{JAX_COMPILATION_CACHE_DIR: "{cache}", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS: "0"}}
"""


@pytest.fixture
def emulator() -> Iterator[GcsEmulator]:
    with GcsEmulator("b") as emulator:
        for path in (GOLDENS / "llama").glob("*"):
            if path.suffix in (".json", ".safetensors"):
                emulator.put("b", f"llama/{path.name}", path.read_bytes())
        yield emulator


def members(cluster: RayCluster) -> list[int]:
    """The processes of the group, wherever Ray has put them."""
    return [pid for pid in cluster.pids() if b"podquant.group.member" in cmdline(pid)]


def places_of(secrets: Iterable[str], cluster: RayCluster, emulator: GcsEmulator) -> list[str]:
    """Where secrets can be read that only the environment of processes should hold."""
    texts = {str(path): path.read_bytes() for path in Path(cluster.ready["folder"]).rglob("*") if path.is_file()}
    texts |= {f"command of {pid}": cmdline(pid) for pid in cluster.pids()}
    texts |= {f"request {number}": repr(record).encode() for number, record in enumerate(emulator.log)}
    return [place for place, text in texts.items() if any(secret.encode() in text for secret in secrets)]


@pytest.mark.slow
def test_one_job_quantizes_and_serves_and_a_lost_host_is_replaced(
    ray_cluster: RayCluster, emulator: GcsEmulator, tmp_path: Path
) -> None:
    expected = expected_tokens(GOLDENS / "llama", "int8.yaml")
    port = free_port()
    (tmp_path / "job.yaml").write_text(JOB.format(host=ray_cluster.ips[0], port=port, cache=tmp_path / "cache"))
    command = [sys.executable, str(JOBS / "quantize_and_serve.py"), str(tmp_path / "job.yaml")]
    job = ray_cluster.submit_no_wait(command, {"STORAGE_EMULATOR_HOST": emulator.url})
    try:
        url, key = f"http://{ray_cluster.ips[0]}:{port}", {"Authorization": f"Bearer {SECRETS['PODQUANT_API_KEY']}"}
        with httpx.Client(base_url=url, headers=key, timeout=PATIENCE) as http:

            def is_ready() -> bool:
                try:
                    return http.get("/ready").status_code == 200
                except httpx.TransportError:
                    return False

            def answers() -> list[list[int]]:
                bodies = [{"prompt": p, "max_tokens": 12, "temperature": 0, "ignore_eos": True} for p in PROMPTS]
                replies = [http.post("/v1/completions", json=body) for body in bodies]
                return [reply.json()["choices"][0]["token_ids"] for reply in replies]

            wait_until(is_ready, PATIENCE, "the job serves", lambda: ray_cluster.logs(job))
            assert "out/podquant.json" in emulator.data("b")
            assert answers() == expected
            assert httpx.get(f"{url}/v1/models").status_code == 401
            assert len(members(ray_cluster)) == 4
            nodes = {node["raylet_pid"]: node for node in ray_cluster.nodes() if node["alive"]}
            by_worker = {
                node["labels"]["ray.io/tpu-worker-id"]: [
                    pid for pid in descendants(raylet) if b"podquant.group.member" in cmdline(pid)
                ]
                for raylet, node in nodes.items()
                if "ray.io/tpu-worker-id" in node["labels"]
            }
            assert {worker: len(found) for worker, found in by_worker.items()} == dict.fromkeys("0123", 1)
            ray_cluster.kill_host(ray_cluster.ips[2])
            wait_until(lambda: http.get("/health").status_code == 503, PATIENCE, "/health says so")
            ray_cluster.add_node()
            begin = time.monotonic()
            wait_until(is_ready, PATIENCE, "the group serves again", lambda: ray_cluster.logs(job))
            print(f"served again {time.monotonic() - begin:.1f} s after the host was replaced")
            assert answers() == expected
        assert places_of(SECRETS.values(), ray_cluster, emulator) == []
        assert "HF_TOKEN: not sent to the hosts, since Ray would write it into its logs" in ray_cluster.logs(job)
    finally:
        left = members(ray_cluster)
        ray_cluster.stop(job)
    wait_until(lambda: not any(is_alive(pid) for pid in left), PATIENCE, "no process of the job is left")


@pytest.mark.slow
def test_a_job_that_cannot_serve_is_refused_before_it_converts(
    ray_cluster: RayCluster, emulator: GcsEmulator, tmp_path: Path
) -> None:
    text = JOB.format(host=ray_cluster.ips[0], port=1, cache=tmp_path).replace("port: 1", "prt: 1")
    (tmp_path / "job.yaml").write_text(text)
    command = [sys.executable, str(JOBS / "quantize_and_serve.py"), str(tmp_path / "job.yaml")]
    done = ray_cluster.submit(command, {"STORAGE_EMULATOR_HOST": emulator.url})
    assert done.returncode == 1
    assert "job.yaml:8: unknown key 'prt' in serve: expected one of" in done.stdout
    assert emulator.log == []
    text = JOB.format(host=ray_cluster.ips[0], port=1, cache=tmp_path).replace("tp_size: 8", "tp_size: 5")
    (tmp_path / "job.yaml").write_text(text)
    done = ray_cluster.submit(command, {"STORAGE_EMULATOR_HOST": emulator.url})
    assert done.returncode == 1
    assert "LlamaForCausalLM cannot be cut into tp_size 5" in done.stdout
    key = "  port: 1\n  api_key_file: /of/no/host"
    text = JOB.format(host=ray_cluster.ips[0], port=1, cache=tmp_path).replace("  port: 1", key)
    (tmp_path / "job.yaml").write_text(text)
    done = ray_cluster.submit(command, {"STORAGE_EMULATOR_HOST": emulator.url})
    assert done.returncode == 1
    assert "error: --api-key-file /of/no/host: cannot be read as a key: No such file or directory. Mount" in done.stdout
    assert {record.request.split()[0] for record in emulator.log} == {"GET"}
