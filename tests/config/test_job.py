"""A job file is read whole, or refused with the line that is wrong."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from podquant.config.job import (
    ClusterOptions,
    ConvertJob,
    FlagType,
    is_hugging_face_id,
    load_convert_job,
    load_quantize_and_serve_job,
    load_serve_job,
)
from podquant.config.rules import load_quantization_config
from podquant.config.yamlfile import load_yaml
from podquant.errors import ConfigError

JOBS = Path(__file__).parents[2] / "configs" / "jobs"
GOOD = "source: org/name\ntarget: gs://b/out\nquantization_config_path: int8.yaml\n"
HUB = GOOD + "revision: main\n"
CLUSTER = GOOD + "cluster:\n  "


def load(directory: Path, text: str) -> ConvertJob:
    path = directory / "my.yaml"
    path.write_text(text)
    return load_convert_job(str(path))


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD) == ConvertJob(
        source="org/name",
        target="gs://b/out",
        quantization_config_path="int8.yaml",
        revision=None,
        tp_size=1,
        strict_rules=False,
        overwrite=False,
        cluster=ClusterOptions(
            accelerator=None,
            workers_per_host=1,
            threads_per_worker=4,
            unit_deadline_seconds=1800.0,
            max_retries=3,
            env={},
        ),
        name="my.yaml",
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    text = (
        HUB
        + "tp_size: 16\nstrict_rules: true\noverwrite: true\n"
        + "weights_only: true\nallow_extra_tensors: true\nallow_nonfinite: true\ncluster:\n"
        + (
            "  accelerator: v6e:4x4\n  workers_per_host: 2\n  threads_per_worker: 8\n  unit_deadline_seconds: 0.5\n"
            "  max_retries: 0\n  env: {NAME: 'a b', _X1: ''}\n"
        )
    )
    cluster = ClusterOptions("v6e:4x4", 2, 8, 0.5, 0, {"NAME": "a b", "_X1": ""})
    job = ConvertJob("org/name", "gs://b/out", "int8.yaml", "main", 16, *(True,) * 5, cluster, "my.yaml")
    assert load(tmp_path, text) == job


@pytest.mark.parametrize(
    "more", ["cluster:\n", "cluster: {}\n", "cluster: {env: }\n", "cluster: {accelerator: null}\n"]
)
def test_nothing_said_of_the_cluster_is_the_default(tmp_path: Path, more: str) -> None:
    assert load(tmp_path, GOOD + more).cluster == ClusterOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # keys
        ("", "1: the file is empty: expected a mapping"),
        (
            "- source\n",
            "1: the file: expected a mapping with some of the keys source, target, quantization_config_path,",
        ),
        (
            "{}\n",
            "1: the file: expected the key source (gs://…, a directory that all hosts share, or a Hugging Face id",
        ),
        ("{}\n", "(org/name)), got no keys"),
        (
            GOOD.replace("target: gs://b/out\n", ""),
            "1: the file: expected the key target (gs://…, or a directory that all hosts share), "
            "got only source, quantization_config_path",
        ),
        ("source: a/b\ntarget: c\n", "1: the file: expected the key quantization_config_path (a path, or the name of"),
        (GOOD + "tp-size: 2\n", "4: unknown key 'tp-size' in the file: expected one of source, target,"),
        (GOOD + "tp-size: 2\n", "; did you mean tp_size?"),
        (GOOD + "name: x\n", "4: unknown key 'name' in the file"),
        (CLUSTER + "acelerator: v5e-16\n", "5: unknown key 'acelerator' in cluster: expected one of accelerator, work"),
        (CLUSTER + "acelerator: v5e-16\n", "; did you mean accelerator?"),
        (GOOD + "target: gs://b/other\n", "4: duplicate key 'target': it is already in line 2"),
        (CLUSTER + "env: {A: b, A: c}\n", "5: duplicate key 'A'"),
        # places
        (GOOD.replace("org/name", ""), "1: source: expected gs://…, a directory that all hosts share, or a Hugging"),
        (GOOD.replace("gs://b/out", "[a]"), "2: target: expected gs://…, or a directory that all hosts share, got a l"),
        (GOOD.replace("int8.yaml", "8"), "3: quantization_config_path: expected a path, or the name of a shipped file"),
        (GOOD.replace("int8.yaml", "''"), "got the text ''"),
        (
            GOOD.replace("org/name", "gs://b/out/"),
            "2: target: expected another place than the source, got the text 'gs://b/out'",
        ),
        (GOOD.replace("org/name", "/a/b/").replace("gs://b/out", "/a/x/../b"), "2: target: expected another place"),
        (GOOD.replace("org/name", "file:///a/b").replace("gs://b/out", "/a/b"), "2: target: expected another place"),
        (GOOD.replace("org/name", "~/b").replace("gs://b/out", "~/b/"), "2: target: expected another place"),
        (GOOD.replace("gs://b/out", "org/name"), "2: target: expected another place than the source"),
        # revision
        (
            HUB.replace("org/name", "gs://b/in"),
            "4: revision: expected null, since the source gs://b/in is no Hugging Face id, got the text 'main'",
        ),
        (HUB.replace("org/name", "/models/x"), "4: revision: expected null, since the source /models/x is no Hugging"),
        (HUB.replace("main", "123456"), "4: revision: expected a branch, tag or commit as text, or null, got the num"),
        (HUB.replace("main", "''"), "4: revision: expected a branch, tag or commit as text, or null, got the text ''"),
        # numbers and flags
        (GOOD + "tp_size: 0\n", "4: tp_size: expected a positive integer, got the number 0"),
        (GOOD + "tp_size:\n", "4: tp_size: expected a positive integer, got null"),
        (GOOD + "strict_rules: 1\n", "4: strict_rules: expected true or false, got the number 1"),
        (GOOD + "overwrite: 'true'\n", "4: overwrite: expected true or false, got the text 'true'"),
        # cluster
        (GOOD + "cluster: v5e-16\n", "4: cluster: expected a mapping with some of the keys accelerator, workers_per_h"),
        (
            CLUSTER + "accelerator: 16\n",
            "5: cluster.accelerator: expected a TPU slice such as v5e-16, or null, got the",
        ),
        (CLUSTER + "workers_per_host: -1\n", "5: cluster.workers_per_host: expected a positive integer, got the numbe"),
        (CLUSTER + "threads_per_worker: 1.5\n", "5: cluster.threads_per_worker: expected a positive integer, got the"),
        (CLUSTER + "max_retries: -1\n", "5: cluster.max_retries: expected an integer from 0, got the number -1"),
        (
            CLUSTER + "unit_deadline_seconds: 0\n",
            "5: cluster.unit_deadline_seconds: expected a positive number of seconds, got the number 0",
        ),
        (CLUSTER + "unit_deadline_seconds: 30m\n", "expected a positive number of seconds, got the text '30m'"),
        (CLUSTER + "env: [A=b]\n", "5: cluster.env: expected a mapping of environment variables to text, got a list"),
        (
            CLUSTER + "env:\n    A: 1\n",
            "6: cluster.env.A: expected text, in quotes where YAML reads something else, got the number 1",
        ),
        (CLUSTER + "env:\n    A:\n", "6: cluster.env.A: expected text, in quotes where YAML reads something else, got"),
        (
            CLUSTER + "env:\n    A=b: c\n",
            "6: cluster.env: expected names of environment variables (letters, digits and _), got 'A=b'",
        ),
        (
            CLUSTER + "env:\n    A: b\n    HF_TOKEN: hf_planted\n",
            "7: cluster.env.HF_TOKEN: HF_TOKEN is a secret, and Ray logs what a job sends to hosts. Leave it out here, "
            "and set it in the environment in which Ray is started on each host",
        ),
        (
            CLUSTER + "env: {HTTPS_PROXY: 'http://me:planted@proxy'}\n",
            "5: cluster.env.HTTPS_PROXY: HTTPS_PROXY is a secret",
        ),
        (
            CLUSTER + 'env: {A: "b\\0"}\n',
            "5: cluster.env.A: expected text without NUL characters, got the text 'b\\x00'",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/my.yaml:")
    if message[0].isdigit():
        assert str(caught.value).startswith(f"{tmp_path}/my.yaml:{message}")
    assert message in str(caught.value)


def test_the_good_texts_of_these_tests_are_good(tmp_path: Path) -> None:
    assert load(tmp_path, HUB).revision == "main"
    assert load(tmp_path, CLUSTER + "max_retries: 1\n").cluster.max_retries == 1


def test_a_directory_that_exists_is_no_hugging_face_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hugging_face_id("org/name")
    assert not any(map(is_hugging_face_id, ("gs://org/name", "/org/name", "./org/name", "~/name", str(tmp_path))))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected null, since the source org/name is no Hugging Face id"):
        load(tmp_path, HUB)


FLAGS: dict[str, FlagType] = {"port": int, "host": str, "tp_size": int, "enable_metrics": bool, "drain_seconds": float}
FLAGS |= {"device": ("tpu", "cpu")}


def test_every_shipped_job_is_found_by_name_and_loads() -> None:
    both, serving = load_quantize_and_serve_job("quantize_and_serve.yaml", FLAGS)
    for job in (load_convert_job("convert.yaml"), both):
        assert load_quantization_config(job.quantization_config_path).rules
    assert replace(both, name="convert.yaml") == load_convert_job("convert.yaml")
    alone = load_serve_job("serve.yaml", FLAGS)
    assert (serving.model, alone.model) == (both.target, both.target)
    assert serving.flags == alone.flags == {"host": "0.0.0.0", "port": 30000, "tp_size": 16}
    assert {path.name for path in JOBS.glob("*.yaml")} == {"convert.yaml", "serve.yaml", "quantize_and_serve.yaml"}


def test_flags_of_a_server_are_of_their_kinds(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "model: org/name\nserve: {port: 0, enable_metrics: false, drain_seconds: 2.5, device: cpu, host: null}\n"
    )
    job = load_serve_job(str(tmp_path / "my.yaml"), FLAGS)
    assert job.flags == {"port": 0, "enable_metrics": False, "drain_seconds": 2.5, "device": "cpu"}
    assert (job.quantization_config_path, job.revision, job.cluster) == (None, None, ClusterOptions())
    text = GOOD + "tp_size: 4\n"
    (tmp_path / "both.yaml").write_text(text)
    assert load_quantize_and_serve_job(str(tmp_path / "both.yaml"), FLAGS)[1].flags == {"tp_size": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("serve: {port: 1}\n", "1: the file: expected the key model"),
        ("model: m\nserve: {prt: 1}\n", "2: unknown key 'prt' in serve: expected one of port, .* did you mean port"),
        ("model: m\nserve: {port: x}\n", "2: serve.port: expected an integer from 0, got the text 'x'"),
        ("model: m\nserve: {enable_metrics: 1}\n", "2: serve.enable_metrics: expected true or false"),
        ("model: m\nserve: {device: gpu}\n", "2: serve.device: expected one of tpu, cpu"),
        ("model: m\ntarget: t\n", "2: unknown key 'target'"),
    ],
)
def test_what_is_wrong_with_a_server_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_serve_job(str(tmp_path / "my.yaml"), FLAGS)


def test_the_shipped_job_shows_every_key() -> None:
    keys = [entry.name for entry in fields(ConvertJob) if entry.name != "name"]
    cluster_keys = [entry.name for entry in fields(ClusterOptions)]
    shown = load_yaml(JOBS / "convert.yaml").mapping(keys)
    assert set(shown) == set(keys)
    assert set(shown["cluster"].mapping(cluster_keys)) == set(cluster_keys)


def test_the_defaults_are_what_the_comments_of_the_shipped_job_say(tmp_path: Path) -> None:
    said, kept = "", []
    for line in (JOBS / "convert.yaml").read_text().splitlines():
        if match := re.search(r"# .*Default ([^.:]+)[.:]", line):
            said = match[1]
        elif said and "#" not in line:
            kept.append(line.partition(":")[0] + f": {said}\n")
            said = ""
        elif line.startswith("cluster:"):
            kept.append("cluster:\n")
    assert len(kept) == 6 + 1 + len(fields(ClusterOptions))
    assert load(tmp_path, GOOD + "".join(kept)) == load(tmp_path, GOOD)


def test_an_unknown_bare_name_lists_the_shipped_jobs_and_no_others() -> None:
    with pytest.raises(ConfigError) as caught:
        load_convert_job("convrt.yaml")
    message = str(caught.value)
    assert message.startswith("'convrt.yaml': no such job file; looked for convrt.yaml, ")
    assert "podquant/configs/jobs/convrt.yaml" in message
    assert message.endswith(
        "; expected a path, or one of the shipped files convert.yaml, quantize_and_serve.yaml, "
        "serve.yaml; did you mean convert.yaml?"
    )


def test_a_key_does_not_stand_in_a_job(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: m\nserve:\n  api_key: planted\n")
    with pytest.raises(ConfigError, match=r"my\.yaml:3: serve\.api_key: api_key is a secret") as caught:
        load_serve_job(str(tmp_path / "my.yaml"), FLAGS)
    assert "planted" not in str(caught.value)
