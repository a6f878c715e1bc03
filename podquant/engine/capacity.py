"""What serving a model on a slice of TPUs takes: memory, room for sequences, the bytes a step reads, the bound's speed.

From the model's leaves on an abstract mesh: no weight is read, and no device is needed. Knows nothing of files or text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jax.sharding import AbstractMesh

from podquant.cluster.topology import TpuSlice
from podquant.config.scheme import CacheDtype
from podquant.engine.device_defaults import DeviceDefaults, device_defaults
from podquant.engine.memory import cache_copies, leaf_bytes, slot_bytes, token_bytes
from podquant.engine.roofline import StepCost, decode_cost
from podquant.engine.settings import Settings, settle
from podquant.errors import MeshError
from podquant.families.config import ModelConfig
from podquant.families.declaration import Declaration
from podquant.families.layout import plan_layout
from podquant.model.axes import TP
from podquant.model.decoder import SchemeOf
from podquant.model.layout import Model
from podquant.model.matmul import Numerics

SEQUENCE_TOKENS = 2048
"""Of the sequences that a plan counts and times."""

AT_ONCE = (1, 64, 256)
"""Sequences of the steps that a plan times."""


@dataclass(frozen=True)
class ServingOptions:
    """Flags of `podquant serve` that a plan depends on; None: what suits the device."""

    tp_size: int | None = None
    ep_size: int | None = None
    kv_cache_dtype: CacheDtype = "auto"
    mem_fraction_static: float | None = None
    context_length: int | None = None
    max_running_requests: int | None = None
    chunked_prefill_size: int | None = None
    page_size: int | None = None


class Subject:
    """A model that is to be served somewhere.

    Args:
        config: the model.
        declaration: its weights.
        scheme_of: how each module is quantized, by its name on disk.
    """

    def __init__(self, config: ModelConfig, declaration: Declaration, scheme_of: SchemeOf) -> None:
        self.config = config
        self.declaration = declaration
        self.scheme_of = scheme_of
        self._models: dict[tuple[int, int], Model] = {}

    def laid_out(self, tp_size: int, ep_size: int) -> Model:
        """Over so many devices. Raises MeshError if it cannot be."""
        key = tp_size, ep_size
        if key not in self._models:
            plan_layout(self.config, tp_size, ep_size)
            mesh = AbstractMesh((tp_size,), (TP,))
            numerics = Numerics(self.config.compute_dtype, "tpu")
            self._models[key] = Model(self.config, self.scheme_of, numerics, mesh, ep_size, self.declaration)
        return self._models[key]


@dataclass(frozen=True)
class ServingPlan:
    """A model on a slice. Bytes are of one device: of a chip, or of half a chip where JAX shows two devices for one.

    Attributes:
        tpu: the slice.
        subject: what is served.
        model: the same, laid out over the devices of a replica.
        dp_size: replicas.
        defaults: what flags mean that were not given.
        settings: what they come to.
        cache_dtype: of keys and values.
        context_length: tokens of the longest sequence.
        weight_bytes, slot_bytes: held.
        token_bytes: of a token in the KV cache.
        copies: how many devices keep the same part of a token.
    """

    tpu: TpuSlice
    subject: Subject = field(repr=False)
    model: Model = field(repr=False)
    dp_size: int
    defaults: DeviceDefaults = field(repr=False)
    settings: Settings
    cache_dtype: CacheDtype
    context_length: int
    weight_bytes: int
    slot_bytes: int
    token_bytes: int
    copies: float

    @property
    def tp_size(self) -> int:
        """Devices of a replica."""
        return self.model.layout.tp_size

    @property
    def ep_size(self) -> int:
        """Groups of them among which routed experts are shared out."""
        return self.model.layout.ep_size

    @property
    def memory(self) -> int:
        """For weights, slots and KV cache."""
        return int(self.tpu.generation.device_bytes * self.settings.mem_fraction_static)

    @property
    def cache_room(self) -> int:
        """What is left for the KV cache; negative if the weights alone do not fit."""
        return self.memory - self.weight_bytes - self.slot_bytes

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache of a replica has room for, in whole pages."""
        return max(0, self.cache_room // self.token_bytes) // self.settings.page_size * self.settings.page_size

    @property
    def shortest(self) -> int:
        """Tokens of the sequence that must have room: of `SEQUENCE_TOKENS`, or of the whole context if that is less."""
        return min(SEQUENCE_TOKENS, self.context_length)

    def sequences(self, length: int) -> int:
        """Sequences of so many tokens that the caches of all replicas have room for."""
        return self.dp_size * (self.cache_tokens // self._in_pages(length))

    @property
    def shortage(self) -> int:
        """Bytes that one sequence of `shortest` tokens lacks; 0 if it has room."""
        return max(0, self._in_pages(self.shortest) * self.token_bytes - self.cache_room)

    def step(self, at_once: int) -> StepCost:
        """Of a replica, if so many sequences of `shortest` tokens are shared out among the replicas."""
        return decode_cost(
            self.model,
            self.subject.scheme_of,
            self.tpu.generation,
            self.token_bytes,
            batch=-(-at_once // self.dp_size),
            context=self.shortest,
        )

    def tokens_per_second(self, at_once: int) -> float | None:
        """Of all replicas at the bound; None where the cache has no room for so many, or they do not run at a time."""
        if at_once > min(self.sequences(self.shortest), self.dp_size * self.settings.max_running_requests):
            return None
        return at_once / self.step(at_once).seconds

    def _in_pages(self, length: int) -> int:
        return -(-length // self.settings.page_size) * self.settings.page_size


def plan_serving(subject: Subject, tpu: TpuSlice, options: ServingOptions) -> ServingPlan:
    """Plan the serving of a model on a slice.

    Without a `tp_size` that is given, it is cut over all devices, or over as many of them as it can be cut over, and
    the others hold replicas.

    Raises:
        MeshError: the model cannot be cut so, or the slice has fewer devices, or they do not come out even.
    """
    model, defaults = _lay_out(subject, tpu, options)
    settings = settle(options, defaults)
    return ServingPlan(
        tpu=tpu,
        subject=subject,
        model=model,
        dp_size=tpu.num_devices // model.layout.tp_size,
        defaults=defaults,
        settings=settings,
        cache_dtype=options.kv_cache_dtype,
        context_length=options.context_length or subject.config.max_positions,
        weight_bytes=sum(leaf_bytes(model)),
        slot_bytes=slot_bytes(model, settings.max_running_requests),
        token_bytes=token_bytes(model, options.kv_cache_dtype),
        copies=cache_copies(model),
    )


def _lay_out(subject: Subject, tpu: TpuSlice, options: ServingOptions) -> tuple[Model, DeviceDefaults]:
    num_devices = tpu.num_devices
    sizes = [size for size in range(num_devices, 0, -1) if num_devices % size == 0]
    if options.tp_size is not None:
        if options.tp_size not in sizes:
            raise MeshError(
                f"--tp-size {options.tp_size}: {tpu.name} has {num_devices} devices; expected a size that divides "
                f"them: {', '.join(map(str, sorted(sizes)))}"
            )
        sizes = [options.tp_size]
    refused: MeshError | None = None
    for size in sizes:
        defaults = device_defaults(tpu.generation, subject.config, size)
        try:
            return subject.laid_out(size, options.ep_size or defaults.ep_size.value), defaults
        except MeshError as error:
            refused = refused or error
    assert refused is not None  # there is always a size to try
    raise refused
