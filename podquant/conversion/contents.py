"""Which tensors of a checkpoint are converted, and what makes it unfit, found from its headers and config alone.

Knows nothing of rules or of how a tensor is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from podquant.artifact.naming import module_of
from podquant.checkpoint.check import MISFIT_ADVICE
from podquant.checkpoint.extras import further_layers, is_further
from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.quantization import quant_method
from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.modules import kind_of
from podquant.families.registry import is_tied

_LAYER = re.compile(r"^((?:[a-z_]+\.)*(?:layers|h))\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Contents:
    """The tensors to convert.

    Attributes:
        tensors: by name, in the order of the source.
        modules: the module of every weight matrix → its tensor, in the same order.
        fused: the routed experts of a layer stored as one tensor, `…mlp.experts.down_proj`, by name, where they are
            not known to be what `checkpoint.experts` takes apart.
        tied: lm_head shares the embedding's tensor.
        redundant: an lm_head stored beside the embedding it is tied to, left out → that embedding.
    """

    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, TensorInfo]
    fused: Mapping[str, TensorInfo]
    tied: bool
    redundant: tuple[TensorInfo, TensorInfo] | None


def read_contents(checkpoint: Checkpoint) -> Contents:
    """Sort out a checkpoint's tensors; no weight is read.

    Raises:
        UnsupportedModelError: the checkpoint is already quantized.
        CheckpointError: tensors are missing, or contradict config.json.
    """
    where, config = checkpoint.store.uri, checkpoint.config
    refuse_quantized(checkpoint)
    matrices = {
        module: info
        for name, info in checkpoint.tensors.items()
        if (module := module_of(name)) is not None and len(info.shape) >= 2
    }
    _check_layers(where, config, matrices)
    count = config.get("num_hidden_layers")
    further = further_layers(checkpoint.tensors, count) if isinstance(count, int) else ()
    matrices = {module: info for module, info in matrices.items() if not is_further(info.name, further)}
    embedding = next((info for module, info in matrices.items() if kind_of(module) == "embedding"), None)
    head = next((info for module, info in matrices.items() if kind_of(module) == "lm_head"), None)
    tied = is_tied(config, checkpoint.tensors, f"{where}/config.json")
    if not tied and head is None and embedding is not None:
        raise CheckpointError(
            f"{where}: lm_head.weight is missing: config.json says tie_word_embeddings: false, so it must be there. "
            "Set it to true if the embedding is the head too"
        )
    redundant = None
    if tied and head is not None and embedding is not None:
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            raise CheckpointError(
                f"{where}: config.json ties {head.name} to {embedding.name}, but they are {head.dtype.disk} "
                f"{list(head.shape)} and {embedding.dtype.disk} {list(embedding.shape)}. "
                "Set tie_word_embeddings to false if both are meant"
            )
        redundant = (head, embedding)
        matrices = {module: info for module, info in matrices.items() if info is not head}
    tensors = {
        name: info
        for name, info in checkpoint.tensors.items()
        if (redundant is None or name != redundant[0].name) and not is_further(name, further)
    }
    fused = {
        name: info
        for name, info in tensors.items()
        if module_of(name) is None and len(info.shape) >= 3 and kind_of(name) == "expert"
    }
    return Contents(tensors, matrices, fused, tied, redundant)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError if a checkpoint is quantized already."""
    where = checkpoint.store.uri
    if method := quant_method(checkpoint.config):
        raise UnsupportedModelError(
            f"{where}: already quantized: config.json has {method}. Nothing is gained by quantizing it again: serve it "
            "as it is (podquant serve), or convert the original in bfloat16, float16 or float32"
        )


def _check_layers(where: str, config: Mapping[str, Any], matrices: Mapping[str, TensorInfo]) -> None:
    """Every layer the config counts is there, and none lacks a matrix that makes it otherwise equal to another."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for info in matrices.values():
        if match := _LAYER.match(info.name):
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    count = config.get("num_hidden_layers")
    if not stacks or not isinstance(count, int):
        return
    stack, layers = max(stacks.items(), key=lambda item: len(item[1]))
    for number in range(count):
        if number not in layers:
            raise CheckpointError(
                f"{where}: layer {stack}.{number} is missing: config.json says num_hidden_layers: {count}, the "
                f"files hold {len(layers)} layers. {MISFIT_ADVICE}"
            )
    # Layers beyond the count are of another kind (they predict further tokens) and hold more.
    fullest = max(range(count), key=lambda number: len(layers[number]), default=0)
    for number in range(count):
        if layers[number] < layers[fullest]:
            missing = min(layers[fullest] - layers[number])
            raise CheckpointError(
                f"{where}: {stack}.{number}.{missing} is missing: {stack}.{fullest} has it, and all else that "
                f"{stack}.{number} has. {MISFIT_ADVICE}"
            )
