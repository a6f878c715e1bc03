"""What infra/ asks Google Cloud for is what podquant asks Ray for: a drift of either side fails here.

Pods are checked against Kubernetes' own schemas, RayCluster and RayJob against those of kuberay_schemas.py. Nothing
here talks to a cluster or to Google.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jax
import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray._private import ray_constants
from ray._private.accelerators.tpu import TPUAcceleratorManager, infer_tpu_pod_type_from_topology
from ray.autoscaler._private.util import prepare_config, validate_config

from podquant.app.environment import FORWARDED
from podquant.app.options import API_KEY_VARIABLE, ServeOptions, flag_kinds
from podquant.app.serve import options_of
from podquant.cluster.ray_hosts import OFF_CHIPS
from podquant.cluster.ray_pool import _SLICE_LABEL
from podquant.cluster.topology import TpuSlice, parse_slice
from podquant.config.job import ConvertJob, load_quantize_and_serve_job
from tests.infra.kuberay_schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SLICES = ("v6e-16", "v5e-16")
CLUSTERS = [f"{kind}-{name}" for kind in ("raycluster", "rayjob") for name in SLICES]
OTHERS = ("service-account", "network-policy")
KUBERNETES = "1.33"  # later ones take what this one takes
GKE_ACCELERATORS = {"v6e": "tpu-v6e-slice", "v5litepod": "tpu-v5-lite-podslice"}  # cloud.google.com/kubernetes-engine
SERVE: dict[str, Any] = {entry.name: entry.default for entry in dataclasses.fields(ServeOptions)}
DOCKERFILE = (INFRA / "Dockerfile").read_text()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kuberay" / f"{name}.yaml").read_text()))


def cluster_of(name: str) -> dict[str, Any]:
    spec = documents(name)[-1]["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return cluster


def slice_of(name: str) -> TpuSlice:
    return parse_slice(name.partition("-")[2])


def pods_of(name: str) -> dict[str, dict[str, Any]]:
    """The specs of the head, of a host of the slice and, of a job, of its submitter."""
    cluster = cluster_of(name)
    (group,) = cluster["workerGroupSpecs"]
    pods = {"head": cluster["headGroupSpec"]["template"]["spec"], "host": group["template"]["spec"]}
    if submitter := documents(name)[-1]["spec"].get("submitterPodTemplate"):
        pods["submitter"] = submitter["spec"]
    return pods


def ports_of(pod: dict[str, Any]) -> dict[str, int]:
    (container,) = pod["containers"]
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}


def validate(document: dict[str, Any]) -> None:
    if document["kind"] in SCHEMAS:
        jsonschema.validate(document, SCHEMAS[document["kind"]])
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def validate_pod(spec: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", [*CLUSTERS, *OTHERS])
def test_documents_are_valid(name: str) -> None:
    for document in documents(name):
        validate(document)


def test_every_manifest_is_tested() -> None:
    assert {path.stem for path in (INFRA / "kuberay").iterdir()} == {*CLUSTERS, *OTHERS}


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_are_valid(name: str) -> None:
    for spec in pods_of(name).values():
        validate_pod(spec)


def test_what_a_cluster_would_drop_is_refused() -> None:
    job = documents("rayjob-v6e-16")[-1]
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["numOfHost"] = 4
    with pytest.raises(jsonschema.ValidationError, match="'numOfHost' was unexpected"):
        validate(job)
    pod = copy.deepcopy(pods_of("rayjob-v6e-16")["host"])
    pod["containers"][0]["securityContext"]["runAsNonroot"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="'runAsNonroot' was unexpected"):
        validate_pod(pod)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_slice_is_the_one_that_podquant_reserves(name: str) -> None:
    tpu, pod = slice_of(name), pods_of(name)["host"]
    (group,) = cluster_of(name)["workerGroupSpecs"]
    assert group["numOfHosts"] == tpu.num_hosts
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 1
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": GKE_ACCELERATORS[tpu.generation.name],
        "cloud.google.com/gke-tpu-topology": tpu.topology,
    }
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["google.com/tpu"] == str(tpu.chips_per_host)  # KubeRay makes Ray's TPU of it


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_finds_there_what_podquant_asks_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tpu = slice_of(name)
    (group,) = cluster_of(name)["workerGroupSpecs"]
    for variable in [variable for variable in os.environ if variable.startswith("TPU_")]:
        monkeypatch.delenv(variable)
    granted = {  # by GKE's device plugin, then by its webhook
        "TPU_ACCELERATOR_TYPE": tpu.accelerator_type,
        "TPU_TOPOLOGY": group["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"],
        "TPU_NAME": f"{group['groupName']}-0",
        "TPU_WORKER_ID": "0",
    }
    for variable, value in granted.items():
        monkeypatch.setenv(variable, value)
    labels = TPUAcceleratorManager.get_current_node_accelerator_labels()
    assert labels[_SLICE_LABEL] == granted["TPU_NAME"]
    # The two labels and the resource by which slice_placement_group finds a slice.
    pod_type = infer_tpu_pod_type_from_topology(tpu.topology, tpu.generation.ray_name)
    raylet: Any = ray._raylet
    assert labels[raylet.RAY_NODE_TPU_POD_TYPE_KEY] == pod_type
    assert labels[raylet.RAY_NODE_TPU_WORKER_ID_KEY] == "0"
    assert TPUAcceleratorManager.get_current_node_additional_resources() == {
        granted["TPU_NAME"]: 1,
        f"TPU-{pod_type}-head": 1,
    }
    (container,) = pods_of(name)["host"]["containers"]
    assert not [entry["name"] for entry in container["env"] if entry["name"].startswith("TPU_")]
    assert group["rayStartParams"] == {}  # resources or labels given here would replace what is found


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_has_no_work_to_give(name: str) -> None:
    head = cluster_of(name)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    (container,) = head["template"]["spec"]["containers"]
    assert "google.com/tpu" not in container["resources"]["limits"]
    assert {"name": "JAX_PLATFORMS", "value": OFF_CHIPS["JAX_PLATFORMS"]} in container["env"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_environment_variables_are_read_by_somebody(name: str) -> None:
    for pod in pods_of(name).values():
        for entry in pod["containers"][0].get("env", []):
            variable = entry["name"]
            assert variable.startswith((*FORWARDED, API_KEY_VARIABLE)) or variable.lower() in jax.config.values, (
                variable
            )
            assert "value" in entry or set(entry["valueFrom"]) == {"secretKeyRef"}, variable
            assert "TOKEN" not in variable or "value" not in entry, f"{variable}: a secret in a manifest"


@pytest.mark.parametrize("name", CLUSTERS)
def test_ports_are_the_defaults(name: str) -> None:
    pods = pods_of(name)
    assert ports_of(pods["host"]) == {"http": SERVE["port"]}
    assert ports_of(pods["head"]) == {
        "gcs": ray_constants.DEFAULT_PORT,
        "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
        "client": 10001,  # `ray start --head` has it as a literal
    }
    assert f"EXPOSE {SERVE['port']}\n" in DOCKERFILE


@pytest.mark.parametrize("name", CLUSTERS)
def test_nobody_is_root_or_unknown(name: str) -> None:
    assert cluster_of(name)["authOptions"] == {"mode": "token"}
    (account,) = documents("service-account")
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    for kind, pod in pods_of(name).items():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
        assert int(user) > 0
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert "ephemeral-storage" in container["resources"]["limits"]
        if kind != "submitter":  # it opens no bucket
            assert pod["serviceAccountName"] == account["metadata"]["name"]


def gibibytes(size: str) -> float:
    return int(size[:-2]) * {"Gi": 1.0, "Mi": 1 / 1024}[size[-2:]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_no_pod_that_answers_callers_starts_without_a_key(name: str) -> None:
    for kind in ("head", "host"):
        (container,) = pods_of(name)[kind]["containers"]
        (key,) = [entry for entry in container["env"] if entry["name"] == API_KEY_VARIABLE]
        assert not key["valueFrom"]["secretKeyRef"].get("optional", False)


@pytest.mark.parametrize("name", CLUSTERS)
def test_only_http_is_reached_from_outside_of_a_slice(name: str) -> None:
    (policy,) = [one for one in documents("network-policy") if one["metadata"]["name"].endswith(name.partition("-")[2])]
    own = policy["spec"]["podSelector"]
    cluster = cluster_of(name)
    templates = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    if submitter := documents(name)[-1]["spec"].get("submitterPodTemplate"):
        templates.append(submitter)
    assert all(template["metadata"]["labels"] == own["matchLabels"] for template in templates)
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    among, anybody, operator = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": own}]}
    assert anybody == {"ports": [{"protocol": "TCP", "port": SERVE["port"]}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": ray_constants.DEFAULT_DASHBOARD_PORT}]
    assert operator["from"][0]["podSelector"]["matchLabels"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_volumes_fit(name: str) -> None:
    for pod in pods_of(name).values():
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        assert mounted == set(volumes)
        limit = int(container["resources"]["limits"]["ephemeral-storage"].removesuffix("Gi"))
        sizes = [volume["emptyDir"]["sizeLimit"] for volume in volumes.values() if "emptyDir" in volume]
        assert sum(gibibytes(size) for size in sizes) < limit


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_server_has_time_to_drain(name: str) -> None:
    assert pods_of(name)["host"]["terminationGracePeriodSeconds"] > SERVE["drain_seconds"] + 5


def job_of(name: str, directory: Path) -> tuple[ConvertJob, ServeOptions]:
    """The job as podquant reads it."""
    config, _ = documents(name)
    path = directory / "job.yaml"
    path.write_text(config["data"]["job.yaml"])
    conversion, serving = load_quantize_and_serve_job(str(path), flag_kinds())
    return conversion, options_of(serving)


@pytest.mark.parametrize("name", [f"rayjob-{name}" for name in SLICES])
def test_the_job_is_one_that_podquant_can_do_there(name: str, tmp_path: Path) -> None:
    tpu = slice_of(name)
    job, serve = job_of(name, tmp_path)
    assert job.cluster.accelerator is not None
    assert parse_slice(job.cluster.accelerator) == tpu
    assert job.tp_size == tpu.num_chips
    (container,) = pods_of(name)["host"]["containers"]
    assert job.cluster.workers_per_host * job.cluster.threads_per_worker <= int(container["resources"]["limits"]["cpu"])
    assert (serve.host, serve.port, serve.tp_size) == ("0.0.0.0", SERVE["port"], tpu.num_chips)


@pytest.mark.parametrize("name", [f"rayjob-{name}" for name in SLICES])
def test_the_entrypoint_is_in_the_image_and_its_file_in_the_pod(name: str) -> None:
    config, job = documents(name)
    python, script, file = shlex.split(job["spec"]["entrypoint"])
    assert (python, script) == ("python", "/app/jobs/quantize_and_serve.py")
    assert "COPY jobs /app/jobs\n" in DOCKERFILE
    head = pods_of(name)["head"]
    (mount,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "job"]
    (volume,) = [volume for volume in head["volumes"] if volume["name"] == "job"]
    assert file == f"{mount['mountPath']}/job.yaml"
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    assert list(config["data"]) == ["job.yaml"]
    assert (ROOT / "jobs" / Path(script).name).exists()


def test_images_are_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    texts = [(INFRA / "kuberay" / f"{name}.yaml").read_text() for name in CLUSTERS]
    assert {tag for text in texts for tag in re.findall(r"podquant/podquant:(\S+)", text)} == {version}
    assert set(re.findall(r"podquant/podquant:(\S+)", (INFRA / "README.md").read_text())) == {version}


def test_ray_is_of_one_version() -> None:
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert {cluster_of(name)["rayVersion"] for name in CLUSTERS} == {version}
    pinned = re.findall(r"ray\[default\]==([\d.]+)", (INFRA / "tpu-vm" / "cluster.yaml").read_text())
    assert pinned == [version, version]
    assert f'"ray[default]=={version}"' in (INFRA / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = [entry for text in project["dependencies"] if (entry := Requirement(text)).name == "ray"]
    assert Version(version) in asked.specifier
    assert Version(version) >= Version("2.52")  # the first with RAY_AUTH_MODE


def test_the_image_takes_only_what_it_names() -> None:
    allowed = (INFRA / "Dockerfile.dockerignore").read_text().split()
    assert allowed[0] == "*"
    copied = [
        line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ") and "--from" not in line
    ]
    sources = {source for line in copied for source in line}
    assert {f"!{source}" for source in sources} == {line for line in allowed if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    stages = re.findall(r"^FROM python:(3\.\d+)-slim\S*", DOCKERFILE, re.MULTILINE)
    assert set(stages) == {"3.13"}


@pytest.fixture
def launcher() -> dict[str, Any]:
    """cluster.yaml as `ray up` fills it in."""
    config = yaml.safe_load((INFRA / "tpu-vm" / "cluster.yaml").read_text())
    prepared: dict[str, Any] = prepare_config(config)
    return prepared


def test_the_launcher_takes_its_file(launcher: dict[str, Any]) -> None:
    validate_config(launcher)
    assert launcher["provider"]["availability_zone"].startswith(launcher["provider"]["region"] + "-")


def test_the_launcher_makes_the_slice(launcher: dict[str, Any]) -> None:
    head, slice_type = launcher["available_node_types"].values()
    node = slice_type["node_config"]
    tpu = parse_slice(node["acceleratorType"])
    assert tpu == parse_slice("v6e-16")
    assert node["acceleratorType"] == tpu.accelerator_type
    assert node["runtimeVersion"] == "v2-alpha-tpuv6e"  # cloud.google.com/tpu/docs/runtimes
    assert slice_type["resources"]["TPU"] == tpu.chips_per_host
    assert "CPU" not in slice_type["resources"]  # counted by Ray
    assert slice_type["min_workers"] == slice_type["max_workers"] == launcher["max_workers"] == 1
    assert head["resources"]["CPU"] == 0


def test_the_launcher_starts_ray_as_the_manifests_do(launcher: dict[str, Any]) -> None:
    head, worker = launcher["head_start_ray_commands"][-1], launcher["worker_start_ray_commands"][-1]
    assert f"--port={ray_constants.DEFAULT_PORT} " in head
    assert f"--dashboard-port={ray_constants.DEFAULT_DASHBOARD_PORT} " in head
    assert "--dashboard-host=127.0.0.1 " in head
    assert f"--address=$RAY_HEAD_IP:{ray_constants.DEFAULT_PORT} " in worker
    assert "JAX_PLATFORMS=cpu ray start" in head
    assert "JAX_PLATFORMS=tpu,cpu ray start" in worker
    commands = "\n".join(launcher["setup_commands"])
    assert "RAY_AUTH_MODE=token" in commands
    assert launcher["file_mounts"].keys() == {"~/podquant-src", "~/.ray/auth_token"}
    (python,) = re.findall(r"uv venv --python (\S+)", commands)
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Version(python) in Requirement(f"python{requires}").specifier


def test_the_readme_names_what_is_there() -> None:
    text = (INFRA / "README.md").read_text()
    for path in re.findall(r"(?<![\w/.~-])(?:infra|configs|jobs|tests)/[\w./*-]+\w", text):
        assert list(ROOT.glob(path)), path
    for name in SLICES:
        tpu = parse_slice(name)
        (pool,) = re.findall(rf"node-pools create {name} .*?(?=\n\n|\Z)", text.replace("\\\n", " "), re.DOTALL)
        assert f"--tpu-topology={tpu.topology}" in pool
        assert f"--max-nodes={tpu.num_hosts}" in pool
        (machine,) = re.findall(r"--machine-type=(\S+)", pool)
        assert f"a {machine}:" in (INFRA / "kuberay" / f"raycluster-{name}.yaml").read_text()
    assert f"http://127.0.0.1:{SERVE['port']}/v1/chat/completions" in text
