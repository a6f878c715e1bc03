"""The sizes of a model on a number of shards, and which numbers it can be cut into. Arithmetic only, no devices."""

from __future__ import annotations

from dataclasses import dataclass

from podquant.errors import MeshError
from podquant.families.config import ModelConfig

MOST_SHARDS = 1 << 14
"""No slice of TPUs has more chips."""


@dataclass(frozen=True)
class Layout:
    """A model's sizes on a number of shards.

    Attributes:
        tp_size: shards.
        num_kv_heads: key/value heads over all shards; each shard has a copy of one if there are fewer than shards.
        vocab_size: rows of the embedding over all shards, rounded up to a multiple of them.
        ep_size: groups of shards among which routed experts are shared out.
    """

    tp_size: int
    num_kv_heads: int
    vocab_size: int
    ep_size: int = 1


def plan_layout(config: ModelConfig, tp_size: int, ep_size: int = 1) -> Layout:
    """Lay a model out over `tp_size` shards, in `ep_size` groups that have some of its experts each.

    Raises:
        MeshError: heads, key/value heads, FFN width or experts do not divide; names them and the sizes that fit.
    """
    _check_experts(config, tp_size, ep_size)

    def misfit(size: int) -> list[str]:
        found = []
        if config.num_heads % size:
            found.append(f"{config.num_heads} attention heads")
        if config.num_kv_heads % size and size % config.num_kv_heads:
            found.append(f"{config.num_kv_heads} key/value heads")
        if config.ffn_size % size and not all(map(config.has_experts, range(config.num_layers))):
            found.append(f"an FFN width of {config.ffn_size}")
        if config.moe and size % ep_size == 0 and config.moe.ffn_size % (size // ep_size):
            found.append(f"an expert's inner width of {config.moe.ffn_size}")
        if config.moe and config.moe.shared_ffn_size % size:
            found.append(f"a shared expert's inner width of {config.moe.shared_ffn_size}")
        return found

    wrong = misfit(tp_size)
    if wrong:
        fitting = [size for size in range(ep_size, min(config.num_heads, MOST_SHARDS) + 1, ep_size) if not misfit(size)]
        raise MeshError(
            f"{config.architecture} cannot be cut into tp_size {tp_size}: {' and '.join(wrong)} do not divide; "
            f"tensor-parallel sizes that fit this model: {', '.join(map(str, fitting))}"
        )
    return Layout(tp_size, max(config.num_kv_heads, tp_size), -(-config.vocab_size // tp_size) * tp_size, ep_size)


def _check_experts(config: ModelConfig, tp_size: int, ep_size: int) -> None:
    if ep_size == 1:
        return
    if config.moe is None:
        raise MeshError(f"--ep-size {ep_size} shares out experts, and {config.architecture} has none: leave it out")
    if tp_size % ep_size or config.moe.num_experts % ep_size:
        fitting = [
            size
            for size in range(1, min(tp_size, MOST_SHARDS) + 1)
            if tp_size % size == config.moe.num_experts % size == 0
        ]
        raise MeshError(
            f"--ep-size {ep_size} must divide --tp-size {tp_size} and the {config.moe.num_experts} experts of "
            f"{config.architecture}; sizes that fit: {', '.join(map(str, fitting))}"
        )
