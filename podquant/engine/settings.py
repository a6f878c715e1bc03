"""What the flags that depend on the device come to: as given, else as `device_defaults` has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

from podquant.engine.device_defaults import DeviceDefaults


class Flags(Protocol):
    """What has these flags, as `EngineOptions` has; None: they are not given."""

    @property
    def max_running_requests(self) -> int | None: ...
    @property
    def chunked_prefill_size(self) -> int | None: ...
    @property
    def page_size(self) -> int | None: ...
    @property
    def mem_fraction_static(self) -> float | None: ...
    @property
    def ep_size(self) -> int | None: ...


@dataclass(frozen=True)
class Settings:
    """The same flags, each with a value."""

    max_running_requests: int
    chunked_prefill_size: int
    page_size: int
    mem_fraction_static: float
    ep_size: int

    @property
    def step_tokens(self) -> int:
        """Of a step at the most: at least half of them are for prompts, however many sequences are generating."""
        return max(self.chunked_prefill_size, 1 << (2 * self.max_running_requests - 1).bit_length())


def settle(options: Flags, defaults: DeviceDefaults) -> Settings:
    """The options as given, and the defaults for those that are not."""
    values: dict[str, Any] = {}
    for field in fields(Settings):
        given = getattr(options, field.name)
        values[field.name] = getattr(defaults, field.name).value if given is None else given
    return Settings(**values)


def notes(options: Flags, defaults: DeviceDefaults) -> Iterator[str]:
    """For each option that was not given, a line with its flag, its value, and why."""
    given = {f"--{field.name.replace('_', '-')}" for field in fields(Settings) if getattr(options, field.name)}
    return (line for line in defaults.lines if line.partition(" ")[0] not in given)
