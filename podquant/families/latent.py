"""The sizes of multi-head latent attention. Knows nothing of config files or arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_LANES = 128
"""Columns of a TPU's tiles."""


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (arXiv:2405.04434): all heads' keys and values are made of one small vector a token.

    Attributes:
        q_rank: width of the vector that queries are made of; None: they are projected directly.
        kv_rank: width of the latent vector that keys and values are made of.
        nope_dim: numbers of a head's query and key that are not rotated.
        rope_dim: numbers that are; the rotated part of the key is the same for all heads.
        value_dim: numbers of a head's value.
        interleaved: whether the pairs that are rotated lie side by side on disk, or half the width apart.
        score_scale: multiplies q k^T.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool
    score_scale: float

    @property
    def cached_dim(self) -> int:
        """Numbers that the cache keeps of a token in a layer: its latent vector, its rotated key, and zeros.

        The zeros fill up the last 128 lanes. Without them libtpu 0.0.50 gives a cache 576 wide another layout outside
        the loop over the layers than inside, and copies all of it in every step.
        """
        width = self.kv_rank + self.rope_dim
        return width if width < _LANES else -(-width // _LANES) * _LANES

    def axis_sizes(self, num_heads: int) -> Mapping[str, int]:
        """The sizes of the logical axes that this attention's weights have."""
        return {
            "q_rank": self.q_rank or 0,
            "kv_rank": self.kv_rank,
            "latent": self.kv_rank + self.rope_dim,
            "query_heads": num_heads * (self.nope_dim + self.rope_dim),
            "key_value_heads": num_heads * (self.nope_dim + self.value_dim),
            "value_heads": num_heads * self.value_dim,
        }
