"""The TPUs podquant knows: what a chip of each generation has, and how its slices are divided into hosts.

Knows nothing of clusters: `ray_pool` finds out what one has right now.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from podquant.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """One generation of TPU.

    Attributes:
        name: in accelerator types, as Google Cloud and GKE write them: `v5litepod-16`, `v6e-16`, `tpu7x-16`.
        ray_name: what Ray calls it, in its resources and in `slice_placement_group`.
        cores_per_chip: what a chip adds to the number in an accelerator type.
        dimensions: of its slices' topologies, 2 (`4x4`) or 3 (`2x2x4`).
        most_chips_of_one_host: a slice of up to that many chips is one host; a larger one has 4 chips per host.
        hbm_bytes: of a chip.
        hbm_bandwidth: of a chip, in bytes per second.
        source: where the figures are from.
    """

    name: str
    ray_name: str
    cores_per_chip: int
    dimensions: int
    most_chips_of_one_host: int
    hbm_bytes: int
    hbm_bandwidth: float
    source: str


_DOCS = "https://cloud.google.com/tpu/docs"
GENERATIONS = (
    Generation("v4", "v4", 2, 3, 4, 32 << 30, 1200e9, f"{_DOCS}/v4"),
    Generation("v5litepod", "v5litepod", 1, 2, 8, 16 << 30, 819e9, f"{_DOCS}/v5e"),
    Generation("v5p", "v5p", 2, 3, 4, 95 << 30, 2765e9, f"{_DOCS}/v5p"),
    Generation("v6e", "v6e", 1, 2, 8, 32 << 30, 1638e9, f"{_DOCS}/v6e"),
    Generation("tpu7x", "v7x", 2, 3, 4, 192 << 30, 7380e9, f"{_DOCS}/tpu7x"),
)
"""One row per generation. Google writes GB for HBM; its devices report 2³⁰ bytes for each."""

_ALSO_CALLED = {"v5e": "v5litepod", "v5lite": "v5litepod", "v7x": "tpu7x", "trillium": "v6e", "ironwood": "tpu7x"}
_CHIPS_PER_HOST = 4


@dataclass(frozen=True)
class TpuSlice:
    """One TPU slice: its generation, how its chips are wired, and its hosts."""

    generation: Generation
    topology: str
    num_chips: int
    num_hosts: int

    @property
    def chips_per_host(self) -> int:
        """Chips each host owns."""
        return self.num_chips // self.num_hosts

    @property
    def accelerator_type(self) -> str:
        """As Google Cloud writes it; counts cores where a chip has two."""
        return f"{self.generation.name}-{self.num_chips * self.generation.cores_per_chip}"


def parse_slice(text: str) -> TpuSlice:
    """The TPU slice that `v6e-16`, `v5e-16`, `v6e:4x4` or `v5p:2x2x4` names.

    A number counts what Google counts: cores on generations with two per chip, else chips. A topology counts chips.

    Raises:
        ConfigError: no such generation, or no slice of that size.
    """
    name, separator, size = text.partition(":") if ":" in text else text.partition("-")
    name = _ALSO_CALLED.get(name.lower(), name.lower())
    generation = next((row for row in GENERATIONS if row.name == name), None)
    if generation is None or not size:
        known = ", ".join(row.name for row in GENERATIONS)
        raise ConfigError(
            f"accelerator {text!r}: expected a generation ({known}) with a size or a topology, such as v6e-16 or "
            "v6e:4x4"
        )
    sides = _sides(generation, size) if separator == ":" else _sides_of(generation, size)
    if sides is None:
        shape = "x".join("4" * generation.dimensions)
        number = 4**generation.dimensions * generation.cores_per_chip
        raise ConfigError(
            f"accelerator {text!r}: {name} has no slice of that size: expected one such as {name}-{number} or "
            f"{name}:{shape}, where each side of the topology is 1, 2 or a multiple of four"
        )
    chips = math.prod(sides)
    hosts = 1 if chips <= generation.most_chips_of_one_host else chips // _CHIPS_PER_HOST
    return TpuSlice(generation, "x".join(map(str, sides)), chips, hosts)


def _sides(generation: Generation, topology: str) -> tuple[int, ...] | None:
    parts = topology.lower().split("x")
    if len(parts) != generation.dimensions or not all(part.isascii() and part.isdecimal() for part in parts):
        return None
    sides = tuple(int(part) for part in parts)
    return sides if all(side in (1, 2) or (side > 0 and side % 4 == 0) for side in sides) else None


def _sides_of(generation: Generation, size: str) -> tuple[int, ...] | None:
    """The usual topology of that many cores: the smallest side is doubled until there are enough chips."""
    if not (size.isascii() and size.isdecimal()):
        return None
    sides = [1, 1] if generation.dimensions == 2 else [1, 2, 2]
    chips, rest = divmod(int(size), generation.cores_per_chip)
    while math.prod(sides) < chips:
        sides = sorted([sides[0] * 2, *sides[1:]])
    if rest or math.prod(sides) != chips:
        return None
    return (2, 2, 1) if sides == [1, 2, 2] else tuple(sides)
