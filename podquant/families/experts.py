"""What routed experts are called in a checkpoint where each has tensors of its own, and where config.json counts them.

It stands here, as the names of architectures do, because converting and serving both read checkpoints whose experts are
fused, and give each its own name. Only families stand here whose fused form is known, see `checkpoint.experts`.
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

    @property
    def renames(self) -> dict[str, str]:
        """Words of module names as most families have them → as this one has them."""
        usual = ExpertNames()
        words = {usual.block: self.block, usual.gate: self.gate, usual.up: self.up, usual.down: self.down}
        return {word: own for word, own in words.items() if word != own}


EXPERT_NAMES: Mapping[str, ExpertNames] = {
    "MixtralForCausalLM": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen2MoeForCausalLM": ExpertNames(),
    "Qwen3MoeForCausalLM": ExpertNames(),
    "Glm4MoeForCausalLM": ExpertNames(),
    "DeepseekV2ForCausalLM": ExpertNames(),
    "DeepseekV3ForCausalLM": ExpertNames(),
}


def expert_names(config: Mapping[str, Any]) -> ExpertNames | None:
    """The names in the family of a config.json, None if it has no experts that podquant runs."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return EXPERT_NAMES.get(name) if isinstance(name, str) else None


def count_key(config: Mapping[str, Any]) -> str:
    """The key that says how many routed experts a layer has: of those that are there, the first; else the usual one."""
    return next((key for key in COUNT_KEYS if config.get(key) is not None), COUNT_KEYS[0])
