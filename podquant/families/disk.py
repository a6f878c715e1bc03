"""What the modules of a decoder are called in a checkpoint, and which of them are parts of one tensor there.

A family declares it once; which scheme a module has, which rows of which tensor fill it and what a checkpoint must have
follow from it. Knows nothing of shapes or of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Where a module is in a checkpoint.

    Attributes:
        module: its name there.
        parts: the decoder's modules, by their names in a layer, that share its tensors: their rows one after the
            other; a module that has its tensors for itself is the only part.
        part: which of them it is.
        by_head: their rows take turns: those of the first key/value head in all parts, then those of the next.
    """

    module: str
    parts: tuple[str, ...]
    part: int
    by_head: bool = False


@dataclass(frozen=True)
class DiskNames:
    """A family's names.

    Attributes:
        layers: what layers are below: `{layers}.{index}.{module}`.
        embed_tokens, norm, lm_head: the modules outside the layers.
        parts: names on disk, below a layer, that the decoder does not have → the decoder's modules that are there, in
            the order of their rows. Of one module: it is only called otherwise.
        by_head: those of `parts` whose rows take turns, see `Place`.
        renames: words of all other names, between dots → what they are on disk; others are called as in the decoder.
    """

    layers: str = "model.layers"
    embed_tokens: str = "model.embed_tokens"
    norm: str = "model.norm"
    lm_head: str = "lm_head"
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: frozenset[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)

    def in_layer(self, layer: int, module: str) -> Place:
        """Where `module`, such as `self_attn.q_proj`, of a layer is."""
        for name, parts in self.parts.items():
            if module in parts:
                return Place(f"{self.layers}.{layer}.{name}", parts, parts.index(module), name in self.by_head)
        words = (self.renames.get(word, word) for word in module.split("."))
        return Place(".".join([self.layers, str(layer), *words]), (module,), 0)

    def outside(self, module: str) -> str:
        """The name of `embed_tokens`, `norm` or `lm_head`."""
        return {"embed_tokens": self.embed_tokens, "norm": self.norm, "lm_head": self.lm_head}[module]
