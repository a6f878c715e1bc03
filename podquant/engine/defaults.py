"""How tokens are chosen where a request does not say: what a model's generation_config.json recommends.

Knows nothing of HTTP, or of where the file is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from podquant.engine.request import SamplingParams
from podquant.errors import RequestError
from podquant.foreign import shown
from podquant.tokenizer.jsonfile import GENERATION, decode_object

FILE = GENERATION

_KEYS: Mapping[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}
"""Keys of the file, the fields that they set, and their types."""


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for the fields of `SamplingParams` of the same names; `max_tokens` None: all that there is room for."""

    temperature: float = SamplingParams.temperature
    top_p: float = SamplingParams.top_p
    top_k: int = SamplingParams.top_k
    min_p: float = SamplingParams.min_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    max_tokens: int | None = None

    def params(self) -> SamplingParams:
        """Parameters that ask for nothing else."""
        own: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        return SamplingParams(**own)

    def __str__(self) -> str:
        """What differs from `PLAIN`, for people; empty if nothing does."""
        plain = asdict(PLAIN)
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items() if value != plain[name])


PLAIN = SamplingDefaults()
"""Of a model that recommends nothing."""


def read_defaults(data: bytes, where: str) -> tuple[SamplingDefaults, list[str]]:
    """What a generation_config.json recommends, and a line for each value that cannot be and is therefore left out.

    `do_sample` counts for nothing, as in other servers: whoever wants greedy decoding asks for temperature 0.

    Args:
        data: the file.
        where: its name in messages.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    settings = decode_object(data, where)
    found: dict[str, Any] = {}
    notes = []
    for key, (name, kind) in _KEYS.items():
        value = settings.get(key)
        if value is None:
            continue
        problem = _problem(name, kind, value)
        if problem is None:
            found[name] = value
        else:
            notes.append(f"{where}: {key} is ignored: {problem}")
    return SamplingDefaults(**found), notes


def _problem(name: str, kind: type, value: Any) -> str | None:
    """Why a field cannot have a value; None if it can."""
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return f"expected {'an integer' if kind is int else 'a number'}, got {shown(value)}"
    values: dict[str, Any] = {name: value}
    try:
        SamplingParams(**values)
    except RequestError as error:
        return str(error)
    return None
