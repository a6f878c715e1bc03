"""The architectures podquant runs, by the class name in config.json. How each differs is `model.families`' business.

It stands here so that converting can refuse, before an hour of work, what serving would refuse after it. Planning
refuses none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podquant.errors import UnsupportedModelError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "QWenLMHeadModel",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
)


def unsupported_architecture(config: Mapping[str, Any]) -> str | None:
    """The architecture that config.json names, if podquant does not run it."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names and names[0] not in ARCHITECTURES else None


def refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError if config.json names an architecture that podquant does not run."""
    name = unsupported_architecture(config)
    if name is not None:
        raise UnsupportedModelError(
            f"{where}: architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
