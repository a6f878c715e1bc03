"""A checkpoint and the plan for it, from what a user names: a place or a Hugging Face id, and rules."""

from __future__ import annotations

import os
from dataclasses import dataclass

from podquant.checkpoint.index import Checkpoint
from podquant.config.job import MOST_SLICES, is_hugging_face_id
from podquant.config.rules import load_quantization_config
from podquant.conversion.fitness import check_fitness
from podquant.conversion.plan import Plan, plan_conversion
from podquant.errors import ConfigError
from podquant.foreign import shown
from podquant.storage.hub.ids import download_model, is_offline


@dataclass(frozen=True)
class SourceOptions:
    """What to convert, and by which rules.

    Attributes:
        model: `gs://…`, a local directory or a Hugging Face id.
        rules_path: a path, or the bare name of a file that podquant ships.
        revision: branch, tag or commit of a Hugging Face id.
        download_dir: download a Hugging Face id whole, to there, first.
        tp_size: tensor-parallel slices to cut every weight into.
        strict_rules: a rule that matches nothing is an error.
        weights_only: convert the weights of any model, whether or not podquant can serve it.
        allow_extra_tensors: go on where tensors are there that no weight of the model is in.
    """

    model: str
    rules_path: str
    revision: str | None = None
    download_dir: str | None = None
    tp_size: int = 1
    strict_rules: bool = False
    weights_only: bool = False
    allow_extra_tensors: bool = False


def open_source(options: SourceOptions) -> tuple[Checkpoint, Plan]:
    """The checkpoint and the plan for it. The rules are read first: what is wrong there costs no connection.

    Raises:
        PodquantError: the rules, the checkpoint or the two together are wrong.
    """
    if not 1 <= options.tp_size <= MOST_SLICES:
        raise ConfigError(f"tp_size: expected 1 to {MOST_SLICES:,}, got {shown(options.tp_size)}")
    rules = load_quantization_config(options.rules_path)
    uri, name = locate_model(options.model, options.revision, options.download_dir)
    checkpoint = Checkpoint.open(uri)
    try:
        notes = check_fitness(
            checkpoint,
            options.tp_size,
            weights_only=options.weights_only,
            allow_extra=options.allow_extra_tensors,
        )
        plan = plan_conversion(
            checkpoint,
            rules,
            source_name=name or checkpoint.store.uri.removeprefix("hf://"),
            tp_size=options.tp_size,
            notes=notes,
        )
        if options.strict_rules:
            plan.refuse_unmatched()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint, plan


def locate_model(model: str, revision: str | None, download_dir: str | None) -> tuple[str, str]:
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
    if download_dir is None and not is_offline():
        return f"hf://{model}" + (f"@{revision}" if revision else ""), ""
    snapshot = download_model(model, revision=revision, directory=download_dir)
    return snapshot.path, snapshot.name
