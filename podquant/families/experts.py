"""What routed experts are called in a checkpoint where each has tensors of its own, and where config.json counts them.

Checkpoints may fuse the experts of a layer, see `checkpoint.experts`; each then gets the name that its family gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of config.json for the number of routed experts of a layer; which one depends on family and version."""


@dataclass(frozen=True)
class ExpertNames:
    """A family's names, parts of `{layer}.{block}.experts.{number}.{gate}.weight`."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def count_key(config: Mapping[str, Any]) -> str:
    """The key that says how many routed experts a layer has: of those that are there, the first; else the usual one."""
    return next((key for key in COUNT_KEYS if config.get(key) is not None), COUNT_KEYS[0])
