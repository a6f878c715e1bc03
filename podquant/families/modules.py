"""What a module of a Hugging Face checkpoint is, and how else it can be spelled: from its name alone.

A module's name is the name of its weight less `.weight`: `model.layers.0.self_attn.q_proj`. Knows nothing of rules, of
files or of any architecture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

ModuleKind = Literal["dense", "embedding", "lm_head", "router", "expert", "norm"]
Spelling = Literal["dotted", "slash", "bracket"]

_EMBEDDINGS = frozenset({"embed_tokens", "tok_embeddings", "wte"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_INDEX = re.compile(r"\.(\d+)(?![^.])")


def kind_of(module: str) -> ModuleKind:
    """The kind of a module.

    * `expert`: a routed expert, below `experts` (`mlp.experts.7.up_proj`, or the fused `mlp.experts.gate_up_proj`).
    * `router`: `gate`, `router` or `shared_expert_gate`, or a part of one.
    * `embedding` (`embed_tokens`, `tok_embeddings`, `wte`) and `lm_head`: by their last component; an `output` below
      nothing is an lm_head too.
    * `dense`: everything else: attention, MLP and shared experts (`mlp.shared_experts.up_proj`).
    """
    parts = module.split(".")
    if "experts" in parts:
        return "expert"
    if not _ROUTERS.isdisjoint(parts):
        return "router"
    if parts[-1] in _EMBEDDINGS:
        return "embedding"
    return "lm_head" if parts[-1] == "lm_head" or module == "output" else "dense"


def spell(module: str, spelling: Spelling) -> str:
    """`a.b.0.c` (dotted), `a/b/0/c` (slash) or `a/b[0]/c` (bracket)."""
    if spelling == "dotted":
        return module
    return (_INDEX.sub(r"[\1]", module) if spelling == "bracket" else module).replace(".", "/")


def unspell(module: str) -> str:
    """The dotted name of a module in any spelling."""
    return re.sub(r"\[(\d+)\]", r".\1", module).replace("/", ".")


def router_neighbours(router: str) -> Sequence[str]:
    """Names like this router's that are no router: projections in its place, and its own name backwards.

    A pattern that matches the router and none of these means the router; one that matches any of them is a wide one.
    """
    parts = router.split(".")
    at = next(i for i, part in enumerate(parts) if part in _ROUTERS)
    words = ("up_proj", "w1", "dense", "shared_expert.up_proj", parts[at][::-1])
    return [".".join((*parts[:at], word, *parts[at + 1 :])) for word in words]
