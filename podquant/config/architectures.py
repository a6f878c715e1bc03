"""The architectures podquant runs, by the class name in config.json. How each differs is `model.families`' business.

It stands here so that converting can refuse, before an hour of work, what serving would refuse after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podquant.errors import UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError if config.json names an architecture that podquant does not run."""
    names = config.get("architectures")
    if isinstance(names, list) and names and names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: architecture {names[0]!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
