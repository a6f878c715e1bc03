"""The MODEL of a command line (a directory, gs:// or a Hugging Face id) and its quantization rules."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from podquant.config.job import ClusterOptions, is_hugging_face_id
from podquant.errors import ConfigError

if TYPE_CHECKING:
    from podquant.checkpoint.index import Checkpoint
    from podquant.convert.plan import Plan

_HOST_THREADS = ClusterOptions().threads_per_worker
_FORWARDED = ("STORAGE_EMULATOR_HOST", "NO_GCE_CHECK", "GOOGLE_CLOUD_PROJECT", "FSSPEC_GCS_", "FSSPEC_GS_", "HF_")
"""Beginnings of the environment variables that say how storage is reached: workers get them too."""

_MOST_THREADS = 8  # by default: each takes some GB/s, more than most storage gives


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to find it, the rules, and how many threads."""
    parser.add_argument("model", metavar="MODEL", help="a local directory, gs://…, or a Hugging Face id (org/name)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--download-dir", metavar="DIR", help="download a Hugging Face id whole, to this cache, first")
    parser.add_argument(
        "--quantization-config-path",
        metavar="YAML",
        required=True,
        help="the rules: a path, or the name of a file that podquant ships, such as int8.yaml",
    )
    parser.add_argument("--strict-rules", action="store_true", help="a rule that matches nothing is an error")
    parser.add_argument(
        "--tp-size", metavar="N", type=positive, default=1, help="cut every weight into N tensor-parallel slices"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=positive,
        help="threads of a process that read and quantize (default: one for each CPU it may use, at most "
        f"{_MOST_THREADS}; {_HOST_THREADS} on the hosts of a cluster)",
    )


def num_threads(arguments: argparse.Namespace, *, is_here: bool) -> int:
    """As asked for; else what suits this machine if it is the one that works, and hosts of a cluster otherwise."""
    return arguments.threads or (_own_threads() if is_here else _HOST_THREADS)


def _own_threads() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


def open_source(
    model: str,
    rules_path: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    tp_size: int = 1,
    strict_rules: bool = False,
) -> tuple[Checkpoint, Plan]:
    """The checkpoint and the plan for it. The rules are read first: what is wrong there costs no connection.

    Raises:
        PodquantError: the rules, the checkpoint or the two together are wrong.
    """
    from podquant.checkpoint.index import Checkpoint
    from podquant.config.rules import load_quantization_config
    from podquant.convert.plan import plan_conversion

    rules = load_quantization_config(rules_path)
    uri, name = _locate(model, revision, download_dir)
    checkpoint = Checkpoint.open(uri)
    plan = plan_conversion(
        checkpoint, rules, source_name=name or checkpoint.store.uri.removeprefix("hf://"), tp_size=tp_size
    )
    if strict_rules:
        plan.refuse_unmatched()
    return checkpoint, plan


def _locate(model: str, revision: str | None, download_dir: str | None) -> tuple[str, str]:
    """Where MODEL is, and a name for it that is the same on every machine ("": as its store is called).

    A Hugging Face id is read from the hub by ranges, unless it is to be downloaded or there is to be no connection.
    """
    if not is_hugging_face_id(model):
        if revision is not None or download_dir is not None:
            raise ConfigError(
                f"--revision and --download-dir are for Hugging Face ids, but {model} is a directory: leave them out"
            )
        if model.startswith("hf://"):
            return model, ""
        return model, os.path.basename(os.path.abspath(os.path.expanduser(model.rstrip("/"))))
    from podquant.storage.hub.ids import download_model, is_offline

    if download_dir is None and not is_offline():
        return f"hf://{model}" + (f"@{revision}" if revision else ""), ""
    snapshot = download_model(model, revision=revision, directory=download_dir)
    return snapshot.path, snapshot.name


def worker_environment(options: ClusterOptions) -> dict[str, str]:
    """Variables for processes on the hosts of a cluster: how storage is reached from here, and what the job says."""
    return {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)} | dict(options.env)


def positive(text: str) -> int:
    """An integer from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text}")
    return value
