"""What a decoder is, read from a Hugging Face `config.json` in its old and its transformers-5 spelling.

Knows nothing of arrays or devices. What a family adds to the common fields is declared in `families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.disk import DiskNames
from podquant.families.latent import LatentConfig
from podquant.foreign import shown

_MOST = 2**31 - 1
"""Of any count or id: what the arrays of a program index by."""

MOST_LAYERS = 10_000
MOST_EXPERTS = 1 << 16
"""Of a layer. Both are some fifty times what any model has; tables of so many take no time to make."""

FULL_ATTENTION = 1 << 30
"""A window no position reaches past: attention over everything before."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: `default`, `linear`, `llama3`, `yarn`, `dynamic` (as default, in a context that is no longer than the
            trained one), `dynamic_ntk` (see `rope.dynamic_ntk`) or `none`: no rotation.
        theta: the base wavelength.
        parameters: the other numbers of that kind, under their names in config.json.
        rotated: the share of a head's dimensions that turn, the first ones; the others stay as they are.
    """

    kind: str
    theta: float
    parameters: Mapping[str, float | bool]
    rotated: float = 1.0

    @property
    def depends_on_prompt(self) -> bool:
        """Whether a token's keys depend on more of the prompt than the tokens before it: on its length."""
        return self.kind == "dynamic_ntk"


NO_ROPE = RopeConfig("none", 1.0, {})
"""Of a layer without positions."""


@dataclass(frozen=True)
class MoEConfig:
    """The layers whose MLP is a mixture of experts, and how a token finds its experts; see `routing.route`.

    Attributes:
        num_experts: E, routed experts of a layer.
        top_k: experts that a token goes to.
        ffn_size: F, inner width of a routed expert.
        shared_ffn_size: inner width of the expert that every token goes to; 0 for none.
        shared_gate: its output is scaled by the sigmoid of a projection of the token.
        layers: for each layer, whether it has experts; the others have an ordinary MLP.
        scoring: what makes scores of the router's logits.
        normalize: the scores of a token's experts are made to add up to 1 ...
        scaling: ... and multiplied by this.
        num_groups: groups of experts, of which a token chooses `top_groups` first.
        group_score: a group's score: its best expert's, or the sum of its best two.
        correction_bias: a bias for each expert is added to its score when experts are chosen, and only then.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    layers: tuple[bool, ...]
    shared_ffn_size: int = 0
    shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction_bias: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer.

    Attributes:
        architecture: the class name in config.json.
        vocab_size: V, rows of the embedding.
        hidden_size: D.
        ffn_size: F, the MLP's inner width.
        num_layers: decoder layers.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K.
        head_dim: H; under latent attention, of the part that is rotated.
        norm_eps: added to the mean square in RMSNorm.
        rope: rotary embedding.
        windows: for each layer, how many positions it attends over, itself included; FULL_ATTENTION for all.
        tied_embeddings: the embedding is the output projection too.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm on each head of q and k.
        activation: `silu`, `gelu` or `gelu_tanh`, on the MLP's gate.
        max_positions: the context length the model was trained for.
        dtype: the dtype the checkpoint says it is in.
        eos_token_ids: tokens that end a text.
        bos_token_id: the token that begins one, if any.
        latent: latent attention; None: every head has keys and values of its own.
        moe: the layers with experts, if any.
        names: what its modules are called on disk.
        other_ropes: rotary embeddings of layers that do not have `rope`.
        layer_ropes: for each layer 0 for `rope`, i for `other_ropes[i - 1]`; empty: `rope` for all.
        norm_offset: added to the weight of each RMSNorm.
        input_norms: RMSNorm in front of attention and MLP.
        output_norms: RMSNorm behind attention and MLP, before the residual is added.
        qk_norm_whole: the RMSNorm on q and k is over all heads together.
        score_scale: what q k^T is multiplied by; None: 1 / sqrt(H).
        score_cap: c in c tanh(score / c), None for no cap.
        logit_cap: the same for logits.
        logit_scale, embedding_scale, residual_scale: on the logits, on the embedding's rows, and on what attention and
            MLP add to the residual stream.
        logn_length: from this position on, counted from 1, queries are multiplied by the logarithm of their position to
            this base; None: not.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    activation: str
    max_positions: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    latent: LatentConfig | None = None
    moe: MoEConfig | None = None
    names: DiskNames = field(default_factory=DiskNames)
    other_ropes: tuple[RopeConfig, ...] = ()
    layer_ropes: tuple[int, ...] = ()
    norm_offset: float = 0.0
    input_norms: bool = True
    output_norms: bool = False
    qk_norm_whole: bool = False
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logn_length: int | None = None

    @property
    def compute_dtype(self) -> Literal["bfloat16", "float32"]:
        """What it is computed in unless a user says otherwise."""
        return "float32" if self.dtype in ("float32", "float64") else "bfloat16"

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.moe is not None and self.moe.layers[layer]


class ConfigReader:
    """Typed access to config.json whose errors name the key.

    Args:
        values: the parsed file.
        where: the file, for messages.
        spelled: keys that this family spells otherwise → how.
        defaults: what keys stand for that are left out.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        spelled: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._spelled = dict(spelled or {})
        own = {key: values[spelling] for key, spelling in self._spelled.items() if values.get(spelling) is not None}
        others = {key: value for key, value in values.items() if key not in self._spelled}
        self.values: Mapping[str, Any] = {**(defaults or {}), **others, **own}
        self.where = where

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        got = shown(self.values[key]) if key in self.values else "nothing"
        key = self._spelled.get(key, key)
        return CheckpointError(f"{self.where}: `{key}` must be {expected}, got {got}; is the checkpoint complete?")

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
        """An integer from `least` to `most`."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(key, f"an integer from {least} on")
        if value > most:
            raise self._wrong(key, f"at most {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._wrong(key, "a positive number")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A positive number, or null or nothing."""
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and abs(i) <= _MOST for i in ids):
            raise self._wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def refuse_unless(self, key: str, allowed: Sequence[object]) -> None:
        """Refuse an option podquant would have to ignore."""
        if self.values.get(key) not in (None, *allowed):
            said = f"{self._spelled.get(key, key)}: {shown(self.values[key])}"
            raise UnsupportedModelError(
                f"{self.where}: `{said}` is not supported (supported: {list(allowed)!r} or absent)"
            )


_ROPE_NEEDS: Mapping[str, Sequence[str]] = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_ROPE_TAKES: Mapping[str, Sequence[str]] = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    ),
}


def read_rope(reader: ConfigReader, partial: float | None = None) -> RopeConfig:
    """Read the rotary embedding: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    Args:
        reader: config.json.
        partial: the share of a head that is rotated if the file does not say; None: all of it, and less is refused.
    """
    new = reader.values.get("rope_parameters")
    old = reader.values.get("rope_scaling")
    key = "rope_parameters" if new is not None else "rope_scaling"
    raw = new if new is not None else old
    if raw is not None and not isinstance(raw, Mapping):
        raise CheckpointError(f"{reader.where}: `{key}` must be a mapping, got {shown(raw)}")
    values: dict[str, Any] = dict(raw or {})
    if values.get("rope_type", values.get("type")) == "yarn":
        values.setdefault("original_max_position_embeddings", reader.count("max_position_embeddings"))
    inner = ConfigReader(values, f"{reader.where}: {key}")
    theta = inner.number("rope_theta", reader.number("rope_theta", 10000.0))
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        known = ", ".join(_ROPE_NEEDS)
        raise UnsupportedModelError(
            f"{reader.where}: rope type {shown(kind)} in `{key}` is not supported; supported are {known}"
        )
    rotated = inner.number("partial_rotary_factor", reader.number("partial_rotary_factor", partial or 1.0))
    if rotated > 1.0 or (rotated < 1.0 and partial is None):
        raise UnsupportedModelError(
            f"{reader.where}: a `partial_rotary_factor` other than 1.0 is not supported here, got {rotated:g}"
        )
    missing = [name for name in _ROPE_NEEDS[kind] if values.get(name) is None]
    if missing:
        raise CheckpointError(f"{reader.where}: `{key}` of type {kind!r} lacks {', '.join(missing)}")
    parameters: dict[str, float | bool] = {}
    for name in (*_ROPE_NEEDS[kind], *_ROPE_TAKES.get(kind, ())):
        value = values.get(name)
        if value is None or (value == 0 and name.startswith("mscale")):  # some write 0 for a scale they do not use
            continue
        parameters[name] = inner.flag(name, True) if name == "truncate" else inner.number(name)
    return RopeConfig(kind, theta, parameters, rotated)


def read_windows(
    reader: ConfigReader, num_layers: int, window: int | None, first_windowed: int = 0, full_every: int = 0
) -> tuple[int, ...]:
    """The attention window of each layer, from `layer_types` if given, else from the family's rule.

    Args:
        reader: config.json.
        num_layers: how many layers there are.
        window: the sliding window, None if the model does not use one.
        first_windowed: without `layer_types`, the first layer that slides.
        full_every: without `layer_types`, every n-th layer uses full attention; 0: all from `first_windowed` on slide.
    """

    def slides(layer: int) -> bool:
        return layer >= first_windowed and not (full_every and (layer + 1) % full_every == 0)

    kinds = reader.values.get("layer_types")
    if kinds is None or window is None:
        return tuple(window if window and slides(i) else FULL_ATTENTION for i in range(num_layers))
    legal = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in legal for kind in kinds):
        raise UnsupportedModelError(
            f"{reader.where}: `layer_types` must name full_attention or sliding_attention for each of the "
            f"{num_layers} layers, got {shown(kinds)}"
        )
    return tuple(window if kind == "sliding_attention" else FULL_ATTENTION for kind in kinds)
