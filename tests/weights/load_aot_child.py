"""A child process of test_load_tpu_aot: compiles what places the weights of a Llama-3-70B with the TPU compiler.

`python load_aot_child.py TOPOLOGY DTYPE` writes one JSON object to stdout: for each kind of window of layer 0 what
`_facts` says of its program. No TPU is needed; libtpu can abort the process that loads it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from podquant.config.scheme import Scheme
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.layout import Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import choose_devices
from podquant.weights.placement import placing
from podquant.weights.windows import Limits, Window, plan_windows

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)


class _Tensor(NamedTuple):
    shape: tuple[int, ...]


class Shapes:
    """An artifact at tp 1, as far as plans need one."""

    def __init__(self, model: Model, scheme: Scheme) -> None:
        self._scheme = scheme
        self.tensors: dict[str, _Tensor] = {}
        for leaf in model.leaves:
            for weight in leaf.weights:
                rows, *columns = weight.shape
                if leaf.name == "weight_scale":
                    columns = [leaf.shape[-1]]
                self.tensors[f"{weight.places[0].module}.{leaf.name}"] = _Tensor((rows, *columns))

    def scheme_of(self, module: str) -> Scheme | None:
        """How a weight is quantized."""
        return self._scheme if f"{module}.weight_scale" in self.tensors else None

    def itemsize_of(self, tensor: str) -> int:
        """Of int8 codes, float32 scales and bfloat16 norms."""
        return 4 if tensor.endswith("weight_scale") else 2 if "norm" in tensor else 1

    def quantizes(self, module: str) -> bool:
        """It is done."""
        return False

    def column_bounds(self, tensor: str) -> tuple[int, ...]:
        """Not cut."""
        return (0, self.tensors[tensor].shape[1])


def _facts(model: Model, window: Window) -> dict[str, Any]:
    """Compile a window's program and say what the compiler made of it; bytes are of one chip."""
    index = window.stream.leaves[0]
    leaf, sharding = model.leaves[index], model.shardings[index]
    block = window.shape_of(0)
    joined = (model.mesh.size * block[0], *block[1:])
    program: Any = placing(model, index, window)
    lowered = program.lower(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.ShapeDtypeStruct(joined, leaf.dtype, sharding=NamedSharding(model.mesh, PartitionSpec(TP))),
        jax.ShapeDtypeStruct((4,), np.int32, sharding=NamedSharding(model.mesh, PartitionSpec())),
    )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "spread": window.stream.spread.name,
        "block": block,
        "block_bytes": math.prod(block) * leaf.dtype.itemsize,
        "collectives": sorted(COLLECTIVES.findall(compiled.as_text())),
        "weight_bytes": math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def main(topology: str, dtype: str) -> None:
    """Compile the programs of layer 0, of the embedding and of the last norm."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    config = read_model_config(LLAMA_3_70B, ())
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(choose_devices(devices, "tpu", len(devices))), (TP,))
    scheme = Scheme(dtype)
    model = Model(config, lambda module: scheme, Numerics("bfloat16", "tpu"), mesh)
    found: dict[str, Window] = {}
    for window in plan_windows(model, Shapes(model, scheme), Limits()):  # type: ignore[arg-type]
        if window.stream.layer == 0:
            tensor = f"{window.stream.places[0].module}.{window.stream.name}"
            found.setdefault(f"{tensor} {window.rows} {window.num_rows}", window)
    json.dump({name: _facts(model, window) for name, window in found.items()}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
