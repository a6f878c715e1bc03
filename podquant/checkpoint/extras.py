"""What the tensors of a checkpoint are that no weight of its model is in: known and harmless, or a sign of a mistake.

By their names alone. Knows nothing of any family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"^((?:[a-z_]+\.)*(?:layers|h))\.(\d+)\.")

_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|position_ids)")
_CACHE_SCALES = re.compile(r".+\.(k_scale|v_scale|q_scale|kv_scale|prob_output_scale)")
_FURTHER = re.compile(r"(.*\.)?(mtp|mtp_block|mtp_layers|nextn|nextn_predict_layers)\..+")
_OTHER_SENSES = re.compile(
    r"(.*\.)?(visual|vision_tower|vision_model|vision_encoder|vision_embed_tokens|patch_merger|multi_modal_projector|"
    r"mm_projector|image_newline|audio_tower|audio_model|audio_encoder|embed_vision|embed_audio|speech_encoder)(\..+)?"
)
_FURTHER_MARKS = ("eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens", "e_norm", "h_norm")
"""Modules that a layer which predicts further tokens has, and an ordinary one has not."""

_ADAPTER = re.compile(r".+\.(lora_[A-Za-z_]+|base_layer|modules_to_save|ia3_l|hada_w1_a)(\..+)?")


@dataclass(frozen=True)
class Extras:
    """Tensors that no weight is in, by what they are.

    Attributes:
        further: layers that predict further tokens, by name (`model.layers.61`, `mtp`).
        other_senses: parts that see or hear (`visual`), by the first words of their names.
        adapter: tensors of an adapter that is not merged.
        unknown: all others that podquant cannot explain.
    """

    further: tuple[str, ...] = ()
    other_senses: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def sort_extras(extras: Iterable[str], num_layers: int) -> Extras:
    """Sort tensors that no weight is in; buffers and scales of caches are nothing to speak of.

    Args:
        extras: their names.
        num_layers: of the model.
    """
    extras = list(extras)
    marked = further_layers(extras, num_layers)
    further: dict[str, None] = {}
    senses: dict[str, None] = {}
    adapter, unknown = [], []
    for name in extras:
        layer = _LAYER.match(name)
        if _BUFFERS.fullmatch(name) or _CACHE_SCALES.fullmatch(name):
            continue
        if _ADAPTER.fullmatch(name):
            adapter.append(name)
        elif layer is not None and f"{layer[1]}.{layer[2]}" in marked:
            further[f"{layer[1]}.{layer[2]}"] = None
        elif match := _FURTHER.fullmatch(name):
            further[(match[1] or "") + match[2]] = None
        elif match := _OTHER_SENSES.fullmatch(name):
            senses[(match[1] or "") + match[2]] = None
        else:
            unknown.append(name)
    return Extras(tuple(further), tuple(senses), tuple(adapter), tuple(unknown))


def further_layers(names: Iterable[str], num_layers: int) -> tuple[str, ...]:
    """Layers beyond `num_layers` that predict further tokens: known by modules that no ordinary layer has."""
    found: dict[str, None] = {}
    for name in names:
        match = _LAYER.match(name)
        if match and int(match[2]) >= num_layers and name[match.end() :].partition(".")[0] in _FURTHER_MARKS:
            found[f"{match[1]}.{match[2]}"] = None
    return tuple(found)


def is_further(name: str, layers: Iterable[str]) -> bool:
    """Whether a tensor is of a part that predicts further tokens, in one of these layers or under a name of its own."""
    match = _LAYER.match(name)
    return _FURTHER.fullmatch(name) is not None or (match is not None and f"{match[1]}.{match[2]}" in layers)


def further_note(layer: str) -> str:
    """What to say of a layer that predicts further tokens."""
    return f"{layer} is left out: podquant runs no layers that predict further tokens"
