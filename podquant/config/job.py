"""The configuration of a conversion that runs as a Ray job: a YAML file in, frozen values out.

Knows nothing of clusters or storage: it does not check that the accelerator exists or the places can be reached.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NoReturn

from podquant.config.secrecy import INSTEAD, is_secret
from podquant.config.shipped import find_config
from podquant.config.yamlfile import Node, load_yaml

_ENVIRONMENT_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_REQUIRED = {
    "source": "gs://…, a directory that all hosts share, or a Hugging Face id (org/name)",
    "target": "gs://…, or a directory that all hosts share",
    "quantization_config_path": "a path, or the name of a shipped file such as int8.yaml",
}

MOST_SLICES = 16_384
MOST_HOSTS, MOST_WORKERS_PER_HOST, MOST_THREADS_PER_WORKER = 16_384, 256, 1024
"""More than any cluster has, and few enough to make plans for."""


@dataclass(frozen=True)
class ClusterOptions:
    """Where a job runs, and how it copes with losses. Whether there is such an accelerator is not checked here.

    Attributes:
        accelerator: the TPU slice to reserve whole: a type (`v5e-16`) or a topology (`v5e:4x4`). Without it, the TPU
            hosts that are there, else all nodes.
        workers_per_host: processes on each host that convert.
        threads_per_worker: threads of one process that read and quantize; it reserves as many CPUs.
        unit_deadline_seconds: a unit that takes longer is given to another host as well.
        max_retries: how often a unit is retried after errors that may pass and workers that died; those lost with their
            host do not count.
        env: environment variables of the processes, text to text: numbers in quotes. No secrets: see `secrecy`.
    """

    accelerator: str | None = None
    workers_per_host: int = 1
    threads_per_worker: int = 4
    unit_deadline_seconds: float = 1800.0
    max_retries: int = 3
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ConvertJob:
    """One conversion.

    Attributes:
        source: the checkpoint: `gs://…`, a directory that all hosts share, or a Hugging Face id (`org/name`).
        target: the artifact: `gs://…`, or a directory that all hosts share; another place than the source.
        quantization_config_path: the rules: a path, or the name of a file that podquant ships, such as `int8.yaml`.
        revision: branch, tag or commit of a Hugging Face id; the main branch without it.
        tp_size: cut every weight into as many tensor-parallel slices.
        strict_rules: a rule that matches no module is an error.
        overwrite: replace an artifact that is at the target, once the new one is complete, and discard an unfinished
            conversion of something else there.
        weights_only: convert the weights of any model, whether or not podquant can serve it.
        allow_extra_tensors: go on where tensors are there that no weight of the model is in.
        allow_nonfinite: keep NaN and infinities in what is not quantized, instead of refusing them.
        cluster: where it runs.
        name: the job, for messages: the file's name without its directory.
    """

    source: str
    target: str
    quantization_config_path: str
    revision: str | None = None
    tp_size: int = 1
    strict_rules: bool = False
    overwrite: bool = False
    weights_only: bool = False
    allow_extra_tensors: bool = False
    allow_nonfinite: bool = False
    cluster: ClusterOptions = ClusterOptions()
    name: str = "command line"


FlagType = type[bool] | type[int] | type[float] | type[str] | tuple[str, ...]
"""What a flag of the server takes: a type, or one of several words."""


@dataclass(frozen=True)
class ServeJob:
    """A model to serve.

    Attributes:
        model: an artifact or a checkpoint: `gs://…`, a directory that all hosts share, or a Hugging Face id.
        quantization_config_path: quantize a checkpoint by these rules while loading it. Without it, an artifact or a
            checkpoint is served as it is.
        revision: branch, tag or commit of a Hugging Face id; the main branch without it.
        flags: of `podquant serve`, by name, with values of their types.
        cluster: where it runs; only `accelerator` and `env` matter here.
        name: the job, for messages: the file's name without its directory.
    """

    model: str
    quantization_config_path: str | None = None
    revision: str | None = None
    flags: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    cluster: ClusterOptions = ClusterOptions()
    name: str = "command line"


_JOB_KEYS = tuple(entry.name for entry in fields(ConvertJob) if entry.name != "name")
_SERVE_KEYS = ("model", "quantization_config_path", "revision", "serve", "cluster")
_CLUSTER_KEYS = tuple(entry.name for entry in fields(ClusterOptions))


def load_convert_job(path_or_bare_name: str) -> ConvertJob:
    """Read a job file, by its path or by the bare name of one that podquant ships (`convert.yaml`).

    Relative paths in it are relative to the working directory.

    Raises:
        ConfigError: there is no such file, or anything in it is wrong; names file and line.
    """
    path = find_config(path_or_bare_name, what="job file", folder="jobs")
    root = load_yaml(path)
    return _convert_job(root, root.mapping(_JOB_KEYS), path.name)


def load_serve_job(path_or_bare_name: str, flags: Mapping[str, FlagType]) -> ServeJob:
    """Read a job file that serves a model (`serve.yaml`).

    Args:
        flags: what its section `serve` may hold.

    Raises:
        ConfigError: there is no such file, or anything in it is wrong; names file and line.
    """
    path = find_config(path_or_bare_name, what="job file", folder="jobs")
    root = load_yaml(path)
    entries = root.mapping(_SERVE_KEYS)
    if "model" not in entries:
        root.fail("expected the key model (an artifact or a checkpoint: gs://…, a shared directory, or org/name)")
    return ServeJob(
        model=entries["model"].text("an artifact or a checkpoint: gs://…, a shared directory, or org/name"),
        quantization_config_path=_text_or_null(
            entries, "quantization_config_path", _REQUIRED["quantization_config_path"]
        ),
        revision=_text_or_null(entries, "revision", "a branch, tag or commit as text, or null"),
        flags=_serve_flags(entries.get("serve"), flags),
        cluster=_cluster(entries.get("cluster")),
        name=path.name,
    )


def load_quantize_and_serve_job(path_or_bare_name: str, flags: Mapping[str, FlagType]) -> tuple[ConvertJob, ServeJob]:
    """Read a job file that converts and then serves the result (`quantize_and_serve.yaml`); as the other two."""
    path = find_config(path_or_bare_name, what="job file", folder="jobs")
    root = load_yaml(path)
    entries = dict(root.mapping((*_JOB_KEYS, "serve")))
    serve = entries.pop("serve", None)
    job = _convert_job(root, entries, path.name)
    chosen = {"tp_size": job.tp_size, **_serve_flags(serve, flags)}
    return job, ServeJob(job.target, None, None, chosen, job.cluster, path.name)


def _convert_job(root: Node, entries: Mapping[str, Node], name: str) -> ConvertJob:
    for key, what in _REQUIRED.items():
        if key not in entries:
            root.fail(f"expected the key {key} ({what}), got {'only ' + ', '.join(entries) if entries else 'no keys'}")
    source, target, rules = (entries[key].text(what) for key, what in _REQUIRED.items())
    if _place(source) == _place(target):
        entries["target"].expected("another place than the source")
    revision = _text_or_null(entries, "revision", "a branch, tag or commit as text, or null")
    if revision is not None and not is_hugging_face_id(source):
        entries["revision"].expected(f"null, since the source {source} is no Hugging Face id")
    return ConvertJob(
        source=source,
        target=target,
        quantization_config_path=rules,
        revision=revision,
        tp_size=_positive(entries, "tp_size", 1, MOST_SLICES),
        strict_rules=_flag(entries, "strict_rules"),
        overwrite=_flag(entries, "overwrite"),
        weights_only=_flag(entries, "weights_only"),
        allow_extra_tensors=_flag(entries, "allow_extra_tensors"),
        allow_nonfinite=_flag(entries, "allow_nonfinite"),
        cluster=_cluster(entries.get("cluster")),
        name=name,
    )


def is_hugging_face_id(source: str) -> bool:
    """Whether a source is neither a URI nor a path: it starts with no `.`, `/` or `~`, and nothing here has its name.

    Whether there is such a model is not checked.
    """
    return "://" not in source and not source.startswith((".", "/", "~")) and not os.path.exists(source)


def _cluster(node: Node | None) -> ClusterOptions:
    defaults = ClusterOptions()
    if node is None or node.is_null:  # null: every key below it is commented out
        return defaults
    entries = node.mapping(_CLUSTER_KEYS)
    seconds, retries = entries.get("unit_deadline_seconds"), entries.get("max_retries")
    return ClusterOptions(
        accelerator=_text_or_null(entries, "accelerator", "a TPU slice such as v5e-16, or null"),
        workers_per_host=_positive(entries, "workers_per_host", defaults.workers_per_host, MOST_WORKERS_PER_HOST),
        threads_per_worker=_positive(
            entries, "threads_per_worker", defaults.threads_per_worker, MOST_THREADS_PER_WORKER
        ),
        unit_deadline_seconds=(
            seconds.positive_number("a positive number of seconds") if seconds else defaults.unit_deadline_seconds
        ),
        max_retries=retries.natural_number("an integer from 0") if retries else defaults.max_retries,
        env=_environment(entries["env"]) if "env" in entries else defaults.env,
    )


def _serve_flags(node: Node | None, flags: Mapping[str, FlagType]) -> dict[str, bool | int | float | str]:
    if node is None or node.is_null:
        return {}
    for name, value in node.entries("a mapping of the server's flags").items():
        if is_secret(name, "?"):
            _refuse_secret(value, name)
    found = node.mapping(tuple(flags))
    return {name: _value(value, flags[name]) for name, value in found.items() if not value.is_null}


def _value(node: Node, kind: FlagType) -> bool | int | float | str:
    if isinstance(kind, tuple):
        return node.choice(kind, f"one of {', '.join(kind)}", {})
    if kind is bool:
        return node.boolean()
    if kind is int:
        return node.natural_number("an integer from 0")
    return node.positive_number("a positive number") if kind is float else node.text("text")


def _environment(node: Node) -> Mapping[str, str]:
    if node.is_null:
        return {}
    variables = {}
    for name, value in node.entries("a mapping of environment variables to text").items():
        if not _ENVIRONMENT_NAME.fullmatch(name):
            named = replace(value, place=node.place)  # the name itself is no place to read well
            named.fail(f"expected names of environment variables (letters, digits and _), got {name[:80]!r}")
        text = value.text("text, in quotes where YAML reads something else", may_be_empty=True)
        if "\0" in text:
            value.expected("text without NUL characters")
        if is_secret(name, text):
            _refuse_secret(value, name)
        variables[name] = text
    return variables


def _refuse_secret(node: Node, name: str) -> NoReturn:
    node.fail(f"{name} is a secret, and Ray logs what a job sends to hosts. Leave it out here, and {INSTEAD}")


def _positive(entries: Mapping[str, Node], key: str, default: int, most: int = 2**31 - 1) -> int:
    if key not in entries:
        return default
    value = entries[key].positive_integer("a positive integer")
    return value if value <= most else entries[key].expected(f"at most {most:,}")


def _flag(entries: Mapping[str, Node], key: str) -> bool:
    return entries[key].boolean() if key in entries else False


def _text_or_null(entries: Mapping[str, Node], key: str, what: str) -> str | None:
    return None if key not in entries or entries[key].is_null else entries[key].text(what)


def _place(uri: str) -> str:
    """A canonical spelling of a place, to compare."""
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
