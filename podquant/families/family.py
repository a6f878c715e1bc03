"""What a declaration of a family of models is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from podquant.families.config import ConfigReader, ModelConfig, RopeConfig, read_rope
from podquant.families.disk import DiskNames


class Sliding(NamedTuple):
    """Which layers have a sliding window, where config.json does not list them.

    Attributes:
        window: positions; None: no layer has one.
        first: the first layer that has.
        full_every: every n-th layer uses full attention, counted from 1; 0: only those before `first`.
    """

    window: int | None = None
    first: int = 0
    full_every: int = 0


@dataclass(frozen=True)
class Family:
    """How one architecture differs from a Llama.

    Attributes:
        qkv_bias: whether q, k and v carry a bias; None: config.json's `attention_bias` says so.
        o_bias: the same for the output projection.
        qk_norm: RMSNorm on each head of q and k.
        sliding: from config.json to its sliding windows.
        rope: from config.json to the rotary embedding.
        spelled: keys of config.json that it spells otherwise → how.
        defaults: values of keys that are left out, where they are not a Llama's.
        names: what its modules are called on disk.
        experts: it has routed experts, and fuses those of a layer, if at all, as `checkpoint.experts` knows.
        more: fields of `ModelConfig` that it sets, from config.json and what is read of it already.
    """

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    sliding: Callable[[ConfigReader], Sliding] = lambda reader: Sliding()
    rope: Callable[[ConfigReader], RopeConfig] = read_rope
    spelled: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: DiskNames = field(default_factory=DiskNames)
    experts: bool = False
    more: Callable[[ConfigReader, ModelConfig], Mapping[str, Any]] = lambda reader, config: {}


def read_sliding(reader: ConfigReader, default: int | None = None, full_every: int = 0) -> Sliding:
    """`sliding_window`: null for none, `default` if it is absent."""
    if reader.values.get("sliding_window", default) is None:
        return Sliding()
    return Sliding(reader.count("sliding_window", default), full_every=full_every)


def qwen_sliding(reader: ConfigReader) -> Sliding:
    """A window only if `use_sliding_window` says so, and from the layer `max_window_layers` on."""
    if not reader.flag("use_sliding_window", False) or reader.values.get("sliding_window", 4096) is None:
        return Sliding()
    return Sliding(reader.count("sliding_window", 4096), reader.count("max_window_layers", 28, least=0))
