"""A child process of test_tpu_aot: compiles steps of models in the shape of Llama-3-8B and 70B with the TPU compiler.

`python tpu_aot_child.py TOPOLOGY PROGRAM...` compiles the named programs for the chips of that topology and writes one
JSON object to stdout: for each program what `_facts` says of it. No TPU is needed. It is a process of its own because
libtpu can abort the one that loads it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
# Without these three libtpu asks the network what machine it is on.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from podquant.cluster.topology import GENERATIONS
from podquant.config.scheme import Scheme
from podquant.engine import hlo
from podquant.engine.ahead import Load
from podquant.engine.memory import leaf_bytes, slot_bytes, token_bytes
from podquant.engine.programs import Bucket, lower_step
from podquant.engine.roofline import decode_cost
from podquant.engine.slots import slot_arrays
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.decoder import Decoder
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from tests.engine.shapes import LLAMA_3_8B, LLAMA_3_70B

CONTEXT, PAGE_SIZE, CHUNK, NUM_TOP = 2048, 64, 512, 20
BATCHES = {32: 32, 80: 48}
"""By layers of the model: the pages that attention gathers must not happen to have as many elements as a weight."""
NUMERICS = Numerics("bfloat16", "tpu")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_FLOAT_ARRAY = re.compile(r"\b(?:bf16|f16|f32)\[([\d,]+)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=(%[\w.-]+)")
_NAME = re.compile(r"%[\w.-]+")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line of HLO: its name, the text of its result type, its opcode, and operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations it runs."""
        branches = _BRANCHES.search(self.rest)
        return _CALLED.findall(self.rest) + (branches[1].split(", ") if branches else [])


class Program:
    """The optimised HLO of one program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0]
                self.computations[name] = current = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif match := _INSTRUCTION.match(line):
                current.append(Instruction(*match.groups()))

    def reached(self, name: str, *, fusions: bool = False, without: str = "") -> Iterator[Instruction]:
        """The instructions that run when a computation does, each once, whatever branch or loop they are in.

        Args:
            name: the computation.
            fusions: also those inside fusions, whose results are no buffers.
            without: a computation to leave out.
        """
        for instruction in self.computations[name]:
            yield instruction
            if instruction.opcode != "fusion" or fusions:
                for called in instruction.called:
                    if called != without:
                        yield from self.reached(called, fusions=fusions, without=without)

    def collectives(self, name: str, *, without: str = "") -> list[str]:
        """The most collectives that one run of a computation meets: of a conditional those of one branch only."""
        found = []
        for instruction in self.computations[name]:
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                found.append(opcode)
            if opcode == "fusion":
                continue
            called = [self.collectives(each, without=without) for each in instruction.called if each != without]
            run = [max(called, key=len)] if opcode == "conditional" else called
            found += [each for collectives in run for each in collectives]
        return sorted(found)

    def products(self, name: str, *, without: str = "") -> list[str]:
        """For each matrix product that runs in a computation, the element types of its operands and its result."""
        reached = list(self.reached(name, fusions=True, without=without))
        types = {i.name: i.type.split("[", 1)[0] for i in reached}
        return [
            " ".join([types[operand] for operand in _NAME.findall(i.rest)[:2]] + [types[i.name]])
            for i in reached
            if i.opcode in ("convolution", "dot")
        ]


def _layer_body(program: Program, cache_pages: int) -> str:
    """The computation that is the body of the loop over the layers: the one outer loop that carries the cache."""
    loops = [i for i in program.computations[program.entry] if i.opcode == "while" and f"bf16[{cache_pages}," in i.type]
    assert len(loops) == 1, f"expected one loop over the layers, found {[i.name for i in loops]}"
    return loops[0].rest.split("body=", 1)[1].split(",", 1)[0]


def _repeated_collectives(program: Program, layer: str) -> list[str]:
    """Those in loops other than that over the layers."""
    loops = (i for i in program.reached(program.entry, without=layer) if i.opcode == "while")
    bodies = (name for loop in loops for name in loop.called if name != layer)
    return [collective for body in bodies for collective in program.collectives(body)]


def _wide_copies(program: Program, model: Model, rows: int) -> list[str]:
    """Floating-point buffers with as many elements as this chip's part of a quantized weight, of one layer or of all.

    By number and not by shape, so that no reshape hides one. Weights no larger than the residual stream of the step are
    left out: activations have their size.
    """
    sizes = set()
    for leaf, sharding in zip(model.leaves, model.shardings, strict=True):
        if leaf.dtype == np.int8:
            shape = sharding.shard_shape(leaf.shape)
            sizes |= {math.prod(shape), math.prod(shape[-2:])}
    sizes = {size for size in sizes if size > rows * model.config.hidden_size}
    return [
        f"{i.name} = {i.type[:80]} {i.opcode}"
        for i in program.reached(program.entry)
        if any(math.prod(map(int, dims.split(","))) in sizes for dims in _FLOAT_ARRAY.findall(i.type))
    ]


def _facts(model: Model, batch: int, bucket: Bucket) -> dict[str, Any]:
    """Compile a step and say what the compiler made of it; bytes are of one chip."""
    shape = CacheShape(1 + batch * CONTEXT // PAGE_SIZE, PAGE_SIZE, batch, CONTEXT)
    start = time.perf_counter()
    compiled = lower_step(model, shape, bucket, NUM_TOP).compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    program = Program(text)
    layer = _layer_body(program, model.config.num_layers * shape.num_pages)
    donated = (
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(model.cache_arrays(shape))
    )
    tallies = slot_arrays(model, shape).tallies
    rows, columns = tallies.sharding.shard_shape(tallies.shape)
    tokens = shape.num_pages * shape.page_size
    load = Load(batch, CONTEXT, 0)
    cost = decode_cost(model, lambda module: None, GENERATIONS[-1], token_bytes(model), batch=batch, context=CONTEXT)
    return {
        "planned_bytes": sum(leaf_bytes(model)) + slot_bytes(model, batch) + tokens * token_bytes(model),
        "hbm_bytes": hlo.Program(text, lambda loop: load.trips(model, loop)).hbm_bytes,
        "bound_bytes": cost.weight_bytes + cost.cache_bytes,
        "seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "donated_bytes": sum(donated) + -(-rows // 8) * 8 * -(-columns // 128) * 128 * 4,  # tallies in whole tiles
        "layer_collectives": program.collectives(layer),
        "other_collectives": program.collectives(program.entry, without=layer),
        "repeated_collectives": _repeated_collectives(program, layer),
        "layer_products": program.products(layer),
        "other_products": program.products(program.entry, without=layer),
        "wide_copies": _wide_copies(program, model, bucket.num_tokens),
    }


class Dequantizing(Model):
    """The planted fault: the scale of k_proj, the smallest weight, goes onto the weight in front of the product."""

    def decoder(self, weights: Sequence[jax.Array]) -> Decoder:
        """The module, with k_proj as an ordinary bfloat16 weight."""
        values = {leaf.path: weight for leaf, weight in zip(self.leaves, weights, strict=True)}
        plain = Model(self.config, _all_but_k_proj, self.numerics, self.mesh)

        def value(path: tuple[str | int, ...]) -> jax.Array:
            if path[-2:] != ("k_proj", "weight"):
                return values[path]
            return values[path].astype(jnp.bfloat16) * values[(*path[:-1], "weight_scale")].astype(jnp.bfloat16)

        return plain.decoder([value(leaf.path) for leaf in plain.leaves])


def _int8(module: str) -> Scheme | None:
    return Scheme("int8")


def _int8_w8a8(module: str) -> Scheme | None:
    return Scheme("int8", "int8")


def _all_but_k_proj(module: str) -> Scheme | None:
    return None if module.endswith(".k_proj") else Scheme("int8")


def main(topology: str, names: Sequence[str]) -> None:
    """Compile `names`, each "decode", "prefill" or "planted" and a scheme, for one topology, alone or over hosts."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    devices = topologies.get_topology_desc(topology, "tpu").devices
    config = read_model_config(LLAMA_3_8B if len(devices) == 8 else LLAMA_3_70B, ())
    mesh = Mesh(np.array(devices).reshape(-1), (TP,))
    found = {}
    for name in names:
        step, scheme = name.split(" ")
        kind = Dequantizing if step == "planted" else Model
        model = kind(config, {"int8": _int8, "int8_w8a8": _int8_w8a8}[scheme], NUMERICS, mesh)
        batch = BATCHES[config.num_layers]
        found[name] = _facts(model, batch, Bucket(CHUNK if step == "prefill" else batch))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
