"""Whether a checkpoint is worth converting: what serving it would refuse is refused before a byte is converted."""

from __future__ import annotations

from podquant.checkpoint.check import check_model
from podquant.checkpoint.extras import further_note, sort_extras
from podquant.checkpoint.index import Checkpoint
from podquant.conversion.contents import refuse_quantized
from podquant.errors import MeshError
from podquant.families.config import ModelConfig
from podquant.families.layout import plan_layout
from podquant.foreign import MOST_JSON_BYTES
from podquant.tokenizer.jsonfile import GENERATION, decode_object


def check_fitness(
    checkpoint: Checkpoint, tp_size: int = 1, *, weights_only: bool = False, allow_extra: bool = False
) -> tuple[str, ...]:
    """What a user should know of a checkpoint that could be served once it is converted, a sentence each.

    Args:
        tp_size: slices it is to be cut into. An artifact is served on any number of shards, however it is cut, so one
            that the model cannot be laid out over is no reason to refuse, but is told.
        weights_only: convert the weights of any model, whether or not podquant can serve it.
        allow_extra: go on where tensors are there that no weight of the model is in.

    Raises:
        UnsupportedModelError: it is quantized already.
        PodquantError: as `check_model` says, in the words of serving.
    """
    refuse_quantized(checkpoint)
    if not weights_only:
        if GENERATION in checkpoint.other_files:
            decode_object(checkpoint.store.read(GENERATION, MOST_JSON_BYTES), f"{checkpoint.store.uri}/{GENERATION}")
        model = check_model(checkpoint.config, checkpoint.tensors, checkpoint.store.uri, allow_extra=allow_extra)
        return (*model.notes, *_layout_notes(model.config, tp_size))
    count = checkpoint.config.get("num_hidden_layers")
    left_out = sort_extras(checkpoint.tensors, count).further if isinstance(count, int) else ()
    return (
        "only the weights are converted: whether podquant can serve the model was not looked at",
        *map(further_note, left_out),
    )


def _layout_notes(config: ModelConfig, tp_size: int) -> tuple[str, ...]:
    """What to say of slices that are not the shards of any server."""
    try:
        plan_layout(config, tp_size)
    except MeshError as error:
        return (f"{error}. The slices are written all the same, and are served at those sizes",)
    return ()
