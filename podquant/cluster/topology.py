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
        device_kind: what JAX calls it, `jax.Device.device_kind`; libtpu 0.0.50.
        compiler_name: what libtpu calls it in a topology; None: it describes other devices than its machines have.
        cores_per_chip: what a chip adds to the number in an accelerator type.
        devices_per_chip: that JAX shows for a chip, each with its share of the chip's memory.
        dimensions: of its slices' topologies, 2 (`4x4`) or 3 (`2x2x4`).
        most_chips_of_one_host: a slice of up to that many chips is one host; a larger one has 4 chips per host.
        device_bytes: of a device's HBM, what its programs may use: the limit of libtpu 0.0.50's compiler, below what
            the data sheet says of the chip.
        hbm_bandwidth: of a chip, in bytes per second.
        bf16_flops: of a chip, multiplications and additions in bfloat16 per second.
        fast_8_bit: the 8-bit type that its matrix unit multiplies faster than bfloat16, read off libtpu 0.0.50's
            programs; None: it has none, and upcasts.
        fast_8_bit_flops: of a chip, in that type.
        price: of a chip for an hour, in US dollars: Google's list price on demand in the USA, of no promise; what a
            reader pays differs, so it only puts slices in an order.
        source: where the figures are from.
    """

    name: str
    ray_name: str
    device_kind: str
    compiler_name: str | None
    cores_per_chip: int
    devices_per_chip: int
    dimensions: int
    most_chips_of_one_host: int
    device_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    fast_8_bit: str | None
    fast_8_bit_flops: float
    price: float
    source: str


_DOCS = "https://cloud.google.com/tpu/docs"
_GIB = 1 << 30
GENERATIONS = (
    Generation(
        name="v4",
        ray_name="v4",
        device_kind="TPU v4",
        compiler_name=None,
        cores_per_chip=2,
        devices_per_chip=1,
        dimensions=3,
        most_chips_of_one_host=4,
        device_bytes=int(30.5 * _GIB),
        hbm_bandwidth=1200e9,
        bf16_flops=275e12,
        fast_8_bit=None,
        fast_8_bit_flops=275e12,
        price=3.22,
        source=f"{_DOCS}/v4",
    ),
    Generation(
        name="v5litepod",
        ray_name="v5litepod",
        device_kind="TPU v5 lite",
        compiler_name="v5e",
        cores_per_chip=1,
        devices_per_chip=1,
        dimensions=2,
        most_chips_of_one_host=8,
        device_bytes=int(15.75 * _GIB),
        hbm_bandwidth=819e9,
        bf16_flops=197e12,
        fast_8_bit="int8",
        fast_8_bit_flops=393e12,
        price=1.20,
        source=f"{_DOCS}/v5e",
    ),
    Generation(
        name="v5p",
        ray_name="v5p",
        device_kind="TPU v5",
        compiler_name="v5p",
        cores_per_chip=2,
        devices_per_chip=1,
        dimensions=3,
        most_chips_of_one_host=4,
        device_bytes=int(95.73 * _GIB),
        hbm_bandwidth=2765e9,
        bf16_flops=459e12,
        fast_8_bit="int8",
        fast_8_bit_flops=918e12,
        price=4.20,
        source=f"{_DOCS}/v5p",
    ),
    Generation(
        name="v6e",
        ray_name="v6e",
        device_kind="TPU v6 lite",
        compiler_name="v6e",
        cores_per_chip=1,
        devices_per_chip=1,
        dimensions=2,
        most_chips_of_one_host=8,
        device_bytes=int(31.24 * _GIB),
        hbm_bandwidth=1638e9,
        bf16_flops=918e12,
        fast_8_bit="int8",
        fast_8_bit_flops=1836e12,
        price=2.70,
        source=f"{_DOCS}/v6e",
    ),
    Generation(
        name="tpu7x",
        ray_name="v7x",
        device_kind="TPU7x",
        compiler_name="tpu7x",
        cores_per_chip=2,
        devices_per_chip=2,
        dimensions=3,
        most_chips_of_one_host=4,
        device_bytes=int(94.74 * _GIB),
        hbm_bandwidth=7380e9,
        bf16_flops=2307e12,
        fast_8_bit="float8_e4m3fn",
        fast_8_bit_flops=4614e12,
        price=12.00,
        source=f"{_DOCS}/tpu7x",
    ),
)
"""One row per generation: all that podquant knows of its chips."""

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")

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
    def num_devices(self) -> int:
        """Devices that JAX shows on all hosts together."""
        return self.num_chips * self.generation.devices_per_chip

    @property
    def price(self) -> float:
        """US dollars an hour, see `Generation.price`."""
        return self.num_chips * self.generation.price

    @property
    def name(self) -> str:
        """As `parse_slice` reads it: `v6e:4x4`."""
        return f"{self.generation.compiler_name or self.generation.name}:{self.topology}"

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
            f"{name}:{shape}, where each side of the topology is 1, 2 or a multiple of four; the usual ones are "
            f"{', '.join(_usual(generation))}"
        )
    chips = math.prod(sides)
    hosts = 1 if chips <= generation.most_chips_of_one_host else chips // _CHIPS_PER_HOST
    return TpuSlice(generation, "x".join(map(str, sides)), chips, hosts)


def known_slices() -> list[TpuSlice]:
    """The slices of up to 256 chips that Google rents, each generation's from the smallest on."""
    return [
        parse_slice(f"{generation.name}:{topology}") for generation in GENERATIONS for topology in _usual(generation)
    ]


def _usual(generation: Generation) -> tuple[str, ...]:
    return _FLAT if generation.dimensions == 2 else _CUBIC


def generation_of(device_kind: str) -> Generation | None:
    """The generation that JAX calls so; None for a device that is no TPU, or one not known."""
    return next((row for row in GENERATIONS if row.device_kind == device_kind), None)


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
