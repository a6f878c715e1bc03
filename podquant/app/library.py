"""Conversion for Python: plan, convert, verify. Prints nothing, handles no signal, imports no JAX."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Unpack

from podquant.app import artifacts
from podquant.app import convert as conversions
from podquant.app import plan as plans
from podquant.app.environment import own_threads
from podquant.app.keywords import ConvertKeywords, PlanKeywords
from podquant.app.source import SourceOptions
from podquant.config.job import ClusterOptions, ConvertJob
from podquant.conversion.plan import Plan
from podquant.conversion.run import Conversion
from podquant.errors import ConfigError

Place = str | os.PathLike[str]
"""A directory, `gs://…`, or where a checkpoint is meant a Hugging Face id (`org/name`)."""


def plan(
    source: Place,
    quantization_config_path: Place,
    *,
    download_dir: str | None = None,
    **options: Unpack[PlanKeywords],
) -> Plan:
    """What `convert` would do, from the headers alone: no weight is read, nothing is written.

    >>> import podquant
    >>> plan = podquant.plan(MODEL, "int8.yaml")
    >>> plan.bytes_out < plan.bytes_in
    True

    Args:
        source: a Hugging Face checkpoint.
        quantization_config_path: the rules: a path, or the name of a file that podquant ships, such as `int8.yaml`.
        download_dir: download a Hugging Face id whole, to there, first.
        options: fields of `SourceOptions`, such as `tp_size`.

    Raises:
        PodquantError: the rules, the checkpoint or the two together are wrong.
    """
    places = (os.fspath(source), os.fspath(quantization_config_path))
    return plans.plan(SourceOptions(*places, download_dir=download_dir, **options))


def convert(
    source: Place,
    target: Place,
    quantization_config_path: Place,
    *,
    download_dir: str | None = None,
    threads: int | None = None,
    address: str | None = None,
    cluster: ClusterOptions | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Unpack[ConvertKeywords],
) -> Conversion:
    """Quantize a checkpoint into an artifact, here or on the hosts of a Ray cluster.

    It appears whole, or not at all; a conversion that was interrupted continues when it is asked for again.

    >>> import podquant
    >>> made = podquant.convert(MODEL, OUT, "int8.yaml")
    >>> sorted(made.manifest.files)[0], min(figures.sqnr_db for figures in made.quality.values()) > 30
    ('config.json', True)

    Args:
        source, quantization_config_path, download_dir: as for `plan`.
        target: the directory to write, another place than the source.
        threads: that read and quantize in this process; None for one for each CPU, up to 8.
        address: of the Ray cluster to work on, as `ray.init` takes it (`auto` for the one here); None for this process.
        cluster: how to use that cluster.
        on_progress: told the source bytes done so far, and in all; what it raises ends the conversion.
        options: fields of `ConvertJob`, such as `tp_size` or `overwrite`.

    Raises:
        ArtifactExistsError: the target is taken.
        PodquantError: the rules, the checkpoint, a place or the cluster are not what they should be.
    """
    places = (os.fspath(source), os.fspath(target), os.fspath(quantization_config_path))
    job = ConvertJob(*places, cluster=_workers(threads, address, cluster), **options)
    if address is None:
        return conversions.convert(job, download_dir=download_dir, on_progress=on_progress)
    from podquant.app.convert_on_ray import conversion_hosts  # noqa: PLC0415 - Ray takes a second to import

    hosts = conversion_hosts(job.cluster, address)
    return conversions.convert(job, hosts=hosts, download_dir=download_dir, on_progress=on_progress)


def verify(artifact: Place, *, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
    """Every problem of an artifact, each a sentence with its place; empty if it is whole to the last byte.

    >>> import podquant
    >>> podquant.verify(ARTIFACT)
    []

    Args:
        on_bytes: told the bytes checked since it was last called.

    Raises:
        StorageError: there is no such place.
    """
    return artifacts.verify(os.fspath(artifact), on_bytes)


def _workers(threads: int | None, address: str | None, cluster: ClusterOptions | None) -> ClusterOptions:
    if address is None:
        if cluster is not None:
            raise ConfigError("cluster is for a Ray cluster: give its address as well (auto for the one here)")
        return ClusterOptions(threads_per_worker=threads or own_threads())
    if threads is not None:
        raise ConfigError("threads is for this process: on a cluster, ClusterOptions has threads_per_worker")
    return cluster or ClusterOptions()
