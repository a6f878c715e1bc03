"""How a model is served on a device where the flags do not say: one choice for each of five flags, with its reason.

Arithmetic on the model's sizes and the table of TPUs. Knows nothing of memory, flags or devices that are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from podquant.cluster.topology import Generation
from podquant.families.config import ModelConfig

_LEAST_PREFILL_FLOPS = 250e12
"""A chip of fewer, in bfloat16, takes half as many prompt tokens a step, so that a step still ends in time."""


@dataclass(frozen=True)
class Choice[T]:
    """A value, and in a sentence why it is that one."""

    value: T
    reason: str


@dataclass(frozen=True)
class DeviceDefaults:
    """What a flag of this name means where it is not given.

    Attributes:
        max_running_requests: sequences that are computed at a time.
        chunked_prefill_size: prompt tokens that one step takes, of all prompts together.
        page_size: tokens of a KV-cache page.
        mem_fraction_static: share of a device's memory for weights and KV cache.
        ep_size: groups of devices among which routed experts are shared out.
    """

    max_running_requests: Choice[int]
    chunked_prefill_size: Choice[int]
    page_size: Choice[int]
    mem_fraction_static: Choice[float]
    ep_size: Choice[int]

    @property
    def lines(self) -> Iterator[str]:
        """Each flag with its value and the reason, for logs and plans."""
        for field in fields(self):
            choice: Choice[int] | Choice[float] = getattr(self, field.name)
            yield f"--{field.name.replace('_', '-')} {choice.value}: {choice.reason}"


def device_defaults(generation: Generation | None, config: ModelConfig, tp_size: int) -> DeviceDefaults:
    """The defaults for a model on `tp_size` devices of a generation of TPU; None for devices that are no TPUs."""
    if generation is None:
        return DeviceDefaults(
            max_running_requests=Choice(8, "a device that is no TPU is taken to be small, and not for it alone"),
            chunked_prefill_size=Choice(256, "a longer step would delay the requests beside it by seconds on a CPU"),
            page_size=Choice(64, "a short prompt leaves little of its last page empty"),
            mem_fraction_static=Choice(0.85, "the rest is for activations and for what else runs there"),
            ep_size=Choice(1, "every device has a part of each expert, so that none waits for a busy one"),
        )
    name = generation.name
    small = generation.bf16_flops < _LEAST_PREFILL_FLOPS
    return DeviceDefaults(
        max_running_requests=Choice(
            256, f"a step of {name} reads its weights once for all sequences: many cost little more than few"
        ),
        chunked_prefill_size=Choice(1024, f"{name} takes about as long for them as for 2,048 on larger chips")
        if small
        else Choice(2048, f"enough to keep the matrix unit of {name} busy, and a step short"),
        page_size=Choice(128, "a page of keys or values fills whole registers of 128 lanes"),
        mem_fraction_static=Choice(
            0.9, "the programs' own buffers take under 1 %; the rest is for the runtime and its collectives"
        ),
        ep_size=_ep_size(config, tp_size),
    )


def _ep_size(config: ModelConfig, tp_size: int) -> Choice[int]:
    moe = config.moe
    if moe is None:
        return Choice(1, "the model has no routed experts")
    ways = math.gcd(tp_size, moe.num_experts)
    fitting = [size for size in range(1, ways + 1) if ways % size == 0 and moe.ffn_size % (tp_size // size) == 0]
    size = max(fitting, default=1)
    if size == tp_size:
        return Choice(size, f"each device has {moe.num_experts // size} whole experts, and reads a chosen one at once")
    return Choice(
        size,
        f"the largest that divides both {tp_size} devices and {moe.num_experts} experts: whole ones are read at once",
    )
