"""One of the processes of test_load_processes: loads models over a mesh that spans them all, and says what it got.

`python load_child.py PORT PROCESSES RANK CASES OUT` reads a JSON list of cases (`Case` as objects) from one file and
writes a JSON object to another: for each case what `load_case` says, or the error. XLA_FLAGS must give it devices.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from podquant.config.rules import load_quantization_config
from podquant.errors import PodquantError
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.layout import Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import choose_devices
from podquant.weights.load import load_weights
from podquant.weights.source import WeightSource, open_source
from podquant.weights.windows import Limits


@dataclass(frozen=True)
class Case:
    """A source to load over `tp` devices, as many of each process."""

    uri: str
    tp: int
    rules: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Tells it from the others of a run."""
        return f"{self.uri} {self.rules} {self.tp} {dict(self.limits)}"


def open_case(case: Case, devices: list[Any]) -> tuple[WeightSource, Model]:
    """The source, and the model laid out over these devices."""
    source = open_source(case.uri, load_quantization_config(case.rules) if case.rules else None)
    mesh = Mesh(np.array(devices), (TP,))
    return source, Model(
        read_model_config(source.config, source.tensors), source.scheme_of, Numerics(case.dtype, "cpu"), mesh
    )


def digest(array: Any) -> str:
    """Of an array's bytes and shape. Takes no memory."""
    values = np.ascontiguousarray(array)
    found = hashlib.sha256(repr((values.dtype.name, values.shape)).encode())
    found.update(values.reshape(-1).view(np.uint8))
    return found.hexdigest()[:16]


def key(path: tuple[str | int, ...], position: int) -> str:
    """Names a shard."""
    return f"{'.'.join(map(str, path))} @{position}"


def load_case(case: Case, devices: list[Any]) -> dict[str, Any]:
    """Digests of this process's shards by leaf and position in the mesh, bytes read and seen and there, and seconds."""
    source, model = open_case(case, devices)
    seen: list[int] = []
    began = time.perf_counter()
    weights = load_weights(model, source, seen.append, limits=Limits(**case.limits))
    seconds = time.perf_counter() - began
    source.close()
    positions = {device: position for position, device in enumerate(model.mesh.devices.flat)}
    shards = {
        key(leaf.path, positions[shard.device]): digest(shard.data)
        for leaf, array in zip(model.leaves, weights, strict=True)
        for shard in array.addressable_shards
    }
    whole = sum(each.size for each in source.wholes.values() if each.head is None)
    return {
        "shards": shards,
        "seconds": seconds,
        "read": source.store.bytes_read,
        "seen": sum(seen),
        "tensors": source.num_bytes,
        "others": whole,
    }


def main(port: str, num_processes: int, rank: int, cases: Path, out: Path) -> None:
    """Join the others and load every case."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, rank, initialization_timeout=60)
    by_process: dict[int, list[Any]] = defaultdict(list)
    for device in choose_devices(jax.devices(), "cpu", jax.device_count()):
        by_process[device.process_index].append(device)
    found: dict[str, Any] = {}
    for case in (Case(**fields) for fields in json.loads(cases.read_text())):
        share = case.tp // num_processes
        devices = [device for process in by_process.values() for device in process[:share]]
        try:
            found[case.name] = load_case(case, devices)
        except PodquantError as error:
            found[case.name] = {"error": f"{type(error).__name__}: {error}"}
    # Not getrusage's ru_maxrss, which begins with that of the process that forked this one.
    found["max_rss"] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
