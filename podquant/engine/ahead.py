"""Steps compiled ahead of time for a slice of TPUs that is not there, and what the compiler says of them.

libtpu compiles for chips by a description of them. It can abort the process that loads it, so this runs in one of its
own (`podquant.app.compile_child`). What runs on the chips is the same program; how fast, nothing here knows.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from podquant.engine.cache_size import cache_tokens
from podquant.engine.capacity import ServingPlan
from podquant.engine.compiled import Programs
from podquant.engine.compiler import compiler_options
from podquant.engine.hlo import Instruction, Program
from podquant.engine.programs import Bucket, lower_step, step_sizes
from podquant.engine.roofline import StepCost, decode_cost
from podquant.model.axes import TP
from podquant.model.layout import CacheShape, Model
from podquant.model.moe import tile_rows
from podquant.model.paged_attention import CHUNK_TOKENS, TILE_ROWS, tile_tokens

_NUM_TOP = 20
"""Log-probabilities of top tokens that programs report, as `podquant serve` has it by default."""

_EXCEEDED = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)|Exceeded hbm capacity by ([\d.]+)([KMG])")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step; bytes are of one device.

    Attributes:
        name: of the step.
        seconds: that compiling took.
        lacking: bytes of memory that it needs and a device does not have; 0 if it fits.
        argument_bytes: weights, cache and what the host sends.
        temp_bytes: beside them, while it runs.
        hbm_bytes: read and written by a run that does what `load_of` says.
        bound_bytes: what such a run must read: weights once, and the keys and values of its rows.
        decodes, context: rows of one token in that run, and tokens of each.
        collectives: by kind, of a run.
    """

    name: str
    seconds: float
    lacking: int = 0
    argument_bytes: int = 0
    temp_bytes: int = 0
    hbm_bytes: int = 0
    bound_bytes: int = 0
    decodes: int = 0
    context: int = 0
    collectives: dict[str, float] | None = None


def cache_shape(plan: ServingPlan) -> CacheShape:
    """The cache that the engine would make. Raises CapacityError where there is no room for a page."""
    settings = plan.settings
    tokens = cache_tokens(plan.model, settings, plan.cache_dtype, plan.memory, plan.context_length, None)
    num_pages = tokens // settings.page_size + 1  # one for what is padding
    slots = settings.max_running_requests
    return CacheShape(num_pages, settings.page_size, slots, plan.context_length, plan.cache_dtype)


def compile_steps(plan: ServingPlan) -> Iterator[Compiled]:
    """Compile every step that the engine runs, the largest first.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refused for another reason than memory.
    """
    generation = plan.tpu.generation
    description = topologies.get_topology_desc(f"{generation.compiler_name}:{plan.tpu.topology}", "tpu")
    devices = sorted(description.devices, key=_place)[: plan.tp_size]
    subject, mesh = plan.subject, Mesh(np.array(devices), (TP,))
    numerics = replace(plan.model.numerics, device_kind=generation.device_kind)
    model = Model(subject.config, subject.scheme_of, numerics, mesh, plan.ep_size, subject.declaration)
    sizes = step_sizes("tpu", plan.settings.step_tokens)
    for bucket in Programs(model, cache_shape(plan), sizes, _NUM_TOP).buckets:
        yield _compile(plan, model, bucket)


def _place(device: Any) -> tuple[int, int]:
    return device.process_index, device.id


@dataclass(frozen=True)
class Load:
    """What a step is taken to do when its bytes are counted: it generates for as many sequences as it can.

    Attributes:
        num_decodes: rows of one token.
        context: tokens of each of these, which are read.
        num_prompt: tokens of a prompt that is at its beginning: the others.
    """

    num_decodes: int
    context: int
    num_prompt: int

    def trips(self, model: Model, loop: Instruction) -> float:
        """How often a loop of the program runs, which goes by the rows or by the experts that tokens go to."""
        *_, scope, _ = f"//{loop.op_name}".split("/")
        size = tile_tokens(self.num_decodes + self.num_prompt)
        tiles = -(-self.num_prompt // size)
        if scope == "short_rows":
            return -(-self.num_decodes // TILE_ROWS)
        if scope == "long_rows":
            return tiles
        if scope == "walk" and "/short_rows/" in loop.op_name:
            return -(-self.context // CHUNK_TOKENS)
        if scope == "walk":
            ends = range(size, (tiles + 1) * size, size)
            return sum(-(-min(end, self.num_prompt) // CHUNK_TOKENS) for end in ends) / max(1, tiles)
        if scope == "experts":
            return self._expert_tiles(model)
        return 1.0

    def _expert_tiles(self, model: Model) -> float:
        """Of all experts of a device, if tokens go to all alike: the rows of an expert have Poisson's distribution."""
        moe = model.config.moe
        assert moe is not None
        choices = (self.num_decodes + self.num_prompt) * moe.top_k
        size, mean = tile_rows(choices, moe.num_experts), choices / moe.num_experts
        chances = [
            math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(int(mean + 12 * mean**0.5 + 12))
        ]
        tiles = sum(chance * -(-n // size) for n, chance in enumerate(chances))
        return tiles * moe.num_experts / model.layout.ep_size


def load_of(plan: ServingPlan, bucket: Bucket) -> Load:
    """As many sequences as run at a time and have a token in the step, of `plan.shortest` tokens if there is room."""
    decodes = min(bucket.num_tokens, plan.settings.max_running_requests)
    context = min(plan.shortest, max(1, plan.cache_tokens // decodes))
    return Load(decodes, context, bucket.num_tokens - decodes)


def _compile(plan: ServingPlan, model: Model, bucket: Bucket) -> Compiled:
    began = time.monotonic()
    try:
        options = dict(compiler_options(model.numerics.device_kind, model.numerics.dtype))
        compiled = lower_step(model, cache_shape(plan), bucket, _NUM_TOP).compile(options)
    except jax.errors.JaxRuntimeError as error:
        exceeded = _EXCEEDED.search(str(error))
        if exceeded is None:
            raise
        held, most, by, unit = exceeded.groups()
        lacking = float(by) * _UNITS[unit] if by else (float(held) - float(most)) * _UNITS["G"]
        return Compiled(str(bucket), time.monotonic() - began, lacking=int(lacking))
    seconds = time.monotonic() - began
    memory, text, load = compiled.memory_analysis(), compiled.as_text(), load_of(plan, bucket)
    assert memory is not None  # as the TPU compiler always says
    assert text is not None
    program = Program(text, lambda loop: load.trips(model, loop))
    return Compiled(
        str(bucket),
        seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        hbm_bytes=int(program.hbm_bytes),
        bound_bytes=_bound(plan, model, load),
        decodes=load.num_decodes,
        context=load.context,
        collectives=program.collectives,
    )


def _bound(plan: ServingPlan, model: Model, load: Load) -> int:
    """What a step must read: the weights its tokens need, and the keys and values of its rows."""

    def cost(batch: int, context: int) -> StepCost:
        return decode_cost(
            model, plan.subject.scheme_of, plan.tpu.generation, plan.token_bytes, batch=batch, context=context
        )

    weights = cost(load.num_decodes + load.num_prompt, 0).weight_bytes
    return weights + cost(load.num_decodes, load.context).cache_bytes + cost(1, load.num_prompt).cache_bytes
