"""How large the KV cache is: as told, or what a device's memory has room for beside weights and slots.

Arithmetic, done before a weight is loaded. Knows nothing of devices that are there.
"""

from __future__ import annotations

from podquant.config.scheme import CacheDtype
from podquant.engine.memory import leaf_bytes, slot_bytes, token_bytes
from podquant.engine.settings import Settings
from podquant.errors import CapacityError
from podquant.model.layout import Model

CPU_CACHE_TOKENS = 32768
"""KV-cache tokens on a CPU, whose memory is shared with everything else, unless told otherwise."""


def cache_tokens(
    model: Model, settings: Settings, dtype: CacheDtype, memory: int | None, context_length: int, wanted: int | None
) -> int:
    """Tokens of the cache, a page at least.

    Args:
        model: laid out.
        settings: how it is served.
        dtype: of keys and values.
        memory: bytes of each device for weights, slots and cache; None where that is not known.
        context_length: tokens of the longest sequence.
        wanted: tokens that were asked for; None: as many as there is room for, and can be used.

    Raises:
        CapacityError: there is no room for one page; says what would fit.
    """
    if wanted is not None:
        tokens = wanted
    else:
        tokens = settings.max_running_requests * context_length
        if memory is None:
            tokens = min(tokens, CPU_CACHE_TOKENS)
        else:
            room = memory - sum(leaf_bytes(model)) - slot_bytes(model, settings.max_running_requests)
            tokens = min(tokens, room // token_bytes(model, dtype))
    if tokens >= settings.page_size:
        return tokens
    advice = (
        "give --max-total-tokens a page at least" if wanted is not None else _advice(model, settings, dtype, memory)
    )
    raise CapacityError(
        f"the KV cache would hold {max(tokens, 0):,} tokens, less than one page of {settings.page_size}: {advice}"
    )


def _advice(model: Model, settings: Settings, dtype: CacheDtype, memory: int | None) -> str:
    if memory is None:
        return "raise --context-length or lower --page-size"
    weights, slots = sum(leaf_bytes(model)), settings.max_running_requests
    left = memory - weights - settings.page_size * token_bytes(model, dtype)
    each = slot_bytes(model, slots) / slots
    fitting = int(left // each) if left > 0 else 0
    why = f"of {memory:,} bytes of a device (--mem-fraction-static {settings.mem_fraction_static:g}) "
    if fitting > 0:
        return f"{why}weights take {weights:,} and slots the rest; --max-running-requests {fitting} would fit"
    return f"{why}weights take {weights:,}; use more devices (--tp-size), quantize the weights, or raise the share"
