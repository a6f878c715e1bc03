"""Every weight of a decoder, declared once: its shape, its axes, where it is on disk, how it is cut and what it is.

What the model is built of, what a checkpoint must hold, which rows are read and where slices are cut all follow from
this. Made of a `ModelConfig` alone: knows nothing of files, devices or rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from podquant.families.config import ModelConfig, MoEConfig
from podquant.families.latent import LatentConfig
from podquant.families.modules import ModuleKind

AXES: Mapping[str, bool] = {
    "vocab": True,  # embedding rows, logits
    "heads": True,  # query heads x head dim: q's output, o's input
    "kv_heads": True,  # key/value heads x head dim: k's and v's output
    "query_heads": True,  # latent attention: query heads x (nope + rope)
    "key_value_heads": True,  # ... x (nope + value): kv_b_proj's rows
    "value_heads": True,  # ... x value: o's input
    "ffn": True,  # gate's and up's output, down's input
    "shared_ffn": True,  # the same of a shared expert
    "expert_ffn": True,  # ... of a routed expert
    "experts": False,  # the router's outputs
    "embed": False,  # the residual stream
    "head_dim": False,
    "latent": False,  # what every shard computes and caches whole
    "q_rank": False,
    "kv_rank": False,
    "one": False,
}
"""The logical axes of weights, and whether tensor parallelism cuts them."""


def axis_sizes(config: ModelConfig) -> Mapping[str, int]:
    """The size of each axis that weights of this model have."""
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "ffn": config.ffn_size,
        "head_dim": config.head_dim,
        "one": 1,
    }
    if config.moe is not None:
        moe = config.moe
        sizes |= {"experts": moe.num_experts, "expert_ffn": moe.ffn_size, "shared_ffn": moe.shared_ffn_size}
    return sizes if config.latent is None else {**sizes, **config.latent.axis_sizes(config.num_heads)}


@dataclass(frozen=True)
class Rows:
    """Where a weight lies: all of a tensor on disk, or some of its rows.

    Attributes:
        module: the tensor's name, without that of the parameter.
        shape: of all of the tensor.
        offset, run, pitch: the weight has `run` of every `pitch` rows, from `offset` on.
    """

    module: str
    shape: tuple[int, ...]
    offset: int
    run: int
    pitch: int

    def ranges(self, first: int, last: int) -> list[tuple[int, int]]:
        """Where in the tensor rows `[first, last)` of the weight are."""
        found = []
        while first < last:
            strip, row = divmod(first, self.run)
            count = min(last - first, self.run - row)
            start = self.offset + strip * self.pitch + row
            found.append((start, start + count))
            first += count
        return found


@dataclass(frozen=True)
class DeclaredWeight:
    """One weight of the decoder, in one layer.

    Attributes:
        layer: its index; None outside the layers.
        module: the decoder's, below the layer: `self_attn.q_proj`; of all routed experts, `mlp.experts.up_proj`.
        name: of the parameter: `weight`, `bias`.
        axes: the logical axis of each dimension, see `AXES`.
        shape: without padding, copies or stacking; of each expert.
        kind: what it is, which decides which rules may quantize it; a bias is of its module's kind.
        places: where it lies: in one place, or in one for each routed expert.
    """

    layer: int | None
    module: str
    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    kind: ModuleKind
    places: tuple[Rows, ...]

    @property
    def cut(self) -> int | None:
        """The axis that tensor parallelism cuts; None: every shard has all of it."""
        return next((number for number, axis in enumerate(self.axes) if AXES[axis]), None)


class DiskTensor(NamedTuple):
    """A tensor that a checkpoint must have.

    Attributes:
        module: its name without that of the parameter.
        shape: of all of it.
        kind: of the weights in it.
        cut: the axis along which an artifact cuts it into slices; None: not at all.
    """

    module: str
    shape: tuple[int, ...]
    kind: ModuleKind
    cut: int | None


@dataclass(frozen=True)
class Declaration:
    """All weights of a model.

    Attributes:
        architecture: the class name in config.json.
        weights: in the order in which the decoder uses them.
    """

    architecture: str
    weights: tuple[DeclaredWeight, ...]

    @cached_property
    def modules(self) -> Mapping[int | None, Mapping[str, Mapping[str, DeclaredWeight]]]:
        """Of each layer (None: outside the layers), its modules by name, and their weights by parameter name."""
        layers: dict[int | None, dict[str, dict[str, DeclaredWeight]]] = {}
        for weight in self.weights:
            layers.setdefault(weight.layer, {}).setdefault(weight.module, {})[weight.name] = weight
        return layers

    @cached_property
    def tensors(self) -> Mapping[str, DiskTensor]:
        """What must be on disk, by name."""
        return {
            f"{rows.module}.{weight.name}": DiskTensor(rows.module, rows.shape, weight.kind, _slice_axis(weight))
            for weight in self.weights
            for rows in weight.places
        }


def declare(config: ModelConfig) -> Declaration:
    """Declare all weights of a model."""
    sizes, names = axis_sizes(config), config.names
    outside = [_Spec("embed_tokens", ("vocab", "embed"), "embedding"), _Spec("norm", ("embed",), "norm")]
    if not config.tied_embeddings:
        outside.append(_Spec("lm_head", ("vocab", "embed"), "lm_head"))
    first, *last = (_whole(None, spec, sizes, [names.outside(spec.module)]) for spec in outside)
    layers = (weight for layer in range(config.num_layers) for weight in _layer(config, layer, sizes))
    return Declaration(config.architecture, (first, *layers, *last))


class _Spec(NamedTuple):
    """A weight before it is known where it is; fields as in `DeclaredWeight`."""

    module: str
    axes: tuple[str, ...]
    kind: ModuleKind = "dense"
    name: str = "weight"


def _whole(layer: int | None, spec: _Spec, sizes: Mapping[str, int], modules: list[str]) -> DeclaredWeight:
    shape = tuple(sizes[axis] for axis in spec.axes)
    places = tuple(Rows(module, shape, 0, shape[0], shape[0]) for module in modules)
    return DeclaredWeight(layer, spec.module, spec.name, spec.axes, shape, spec.kind, places)


def _layer(config: ModelConfig, layer: int, sizes: Mapping[str, int]) -> Iterator[DeclaredWeight]:
    specs = list(_specs(config, layer))
    rows_of = {(spec.module, spec.name): sizes[spec.axes[0]] for spec in specs}
    for spec in specs:
        if spec.kind == "expert" and config.moe is not None:
            block, _, projection = spec.module.rpartition(".")
            experts = (f"{block}.{number}.{projection}" for number in range(config.moe.num_experts))
            yield _whole(layer, spec, sizes, [config.names.in_layer(layer, each).module for each in experts])
            continue
        place = config.names.in_layer(layer, spec.module)
        rows = [rows_of[part, spec.name] for part in place.parts]
        weight = _whole(layer, spec, sizes, [place.module])
        turns = config.num_kv_heads if place.by_head else 1
        run, offset, pitch = (count // turns for count in (rows[place.part], sum(rows[: place.part]), sum(rows)))
        shared = Rows(place.module, (sum(rows), *weight.shape[1:]), offset, run, pitch)
        yield weight if len(rows) == 1 else replace(weight, places=(shared,))


def _specs(config: ModelConfig, layer: int) -> Iterator[_Spec]:
    """The weights of a layer."""
    norms = ["input_layernorm", "post_attention_layernorm"] if config.input_norms else []
    norms += ["attention_output_norm", "mlp_output_norm"] if config.output_norms else []
    yield from (_Spec(name, ("embed",), "norm") for name in norms)
    yield from _attention(config) if config.latent is None else _latent_attention(config, config.latent)
    if config.moe is not None and config.has_experts(layer):
        yield from _experts(config, config.moe)
    else:
        yield from _mlp("mlp", "ffn", bias=config.mlp_bias)


def _linear(module: str, axes: tuple[str, str], *, bias: bool = False) -> Iterator[_Spec]:
    yield _Spec(module, axes)
    if bias:
        yield _Spec(module, axes[:1], name="bias")


def _attention(config: ModelConfig) -> Iterator[_Spec]:
    for name, axis in (("q_proj", "heads"), ("k_proj", "kv_heads"), ("v_proj", "kv_heads")):
        yield from _linear(f"self_attn.{name}", (axis, "embed"), bias=config.qkv_bias)
    yield from _linear("self_attn.o_proj", ("embed", "heads"), bias=config.o_bias)
    if config.qk_norm:
        for name, axis in (("q_norm", "heads"), ("k_norm", "kv_heads")):
            yield _Spec(f"self_attn.{name}", (axis if config.qk_norm_whole else "head_dim",), "norm")


def _latent_attention(config: ModelConfig, latent: LatentConfig) -> Iterator[_Spec]:
    if latent.q_rank is None:
        yield _Spec("self_attn.q_proj", ("query_heads", "embed"))
    else:
        yield from _linear("self_attn.q_a_proj", ("q_rank", "embed"), bias=config.o_bias)
        yield _Spec("self_attn.q_a_layernorm", ("q_rank",), "norm")
        yield _Spec("self_attn.q_b_proj", ("query_heads", "q_rank"))
    yield from _linear("self_attn.kv_a_proj_with_mqa", ("latent", "embed"), bias=config.o_bias)
    yield _Spec("self_attn.kv_a_layernorm", ("kv_rank",), "norm")
    yield _Spec("self_attn.kv_b_proj", ("key_value_heads", "kv_rank"))
    yield from _linear("self_attn.o_proj", ("embed", "value_heads"), bias=config.o_bias)


def _mlp(block: str, axis: str, *, bias: bool = False) -> Iterator[_Spec]:
    yield from _linear(f"{block}.gate_proj", (axis, "embed"), bias=bias)
    yield from _linear(f"{block}.up_proj", (axis, "embed"), bias=bias)
    yield from _linear(f"{block}.down_proj", ("embed", axis), bias=bias)


def _experts(config: ModelConfig, moe: MoEConfig) -> Iterator[_Spec]:
    yield _Spec("mlp.gate", ("experts", "embed"), "router")
    if moe.correction_bias:
        yield _Spec("mlp.gate", ("experts",), "router", "e_score_correction_bias")
    for spec in _mlp("mlp.experts", "expert_ffn"):
        yield spec._replace(kind="expert")
    if moe.shared_ffn_size:
        yield from _mlp("mlp.shared_experts", "shared_ffn", bias=config.mlp_bias)
    if moe.shared_gate:
        yield _Spec("mlp.shared_expert_gate", ("one", "embed"), "router")


def _slice_axis(weight: DeclaredWeight) -> int | None:
    """Every matrix but a router's: along its input where that comes in slices, else along its output."""
    if weight.name != "weight" or len(weight.axes) != 2 or weight.kind == "router":
        return None
    return int(AXES[weight.axes[1]])
