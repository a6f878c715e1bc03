"""The devices a model runs on, as a mesh of one axis, and how their processes tell each other small things."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from podquant.cluster.topology import generation_of
from podquant.config.scheme import Scheme
from podquant.errors import MeshError
from podquant.model.axes import TP
from podquant.model.matmul import rebiases

Exchange = Callable[[bytes], list[bytes]]
"""Gives every process the bytes of all, by rank. All of them call it, in the same order."""


def make_mesh(platform: str, tp_size: int) -> Mesh:
    """A mesh of the first `tp_size` devices of a platform, those of one process side by side.

    If `jax.distributed` has been initialised these are the devices of all its processes, and every process must own one
    of the mesh's. Otherwise, on the CPU platform, the process is given as many devices as asked for, if nothing has
    used JAX before.

    Raises:
        MeshError: no such platform here, too few devices, or a process that would have none of them.
    """
    try:
        jax.config.update("jax_platforms", platform)
        alone = not jax.distributed.is_initialized()
        if platform == "cpu" and alone and jax.config.jax_num_cpu_devices < tp_size:
            jax.config.update("jax_num_cpu_devices", tp_size)
    except RuntimeError:
        pass  # JAX runs already: what it has must do, and is checked below
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise MeshError(f"no {platform} devices in this process: {error}; choose another --device") from error
    return Mesh(np.array(choose_devices(devices, platform, tp_size)), (TP,))


def choose_devices(devices: Sequence[Any], platform: str, tp_size: int) -> list[Any]:
    """The first `tp_size` devices by process and id (ids need not follow one another).

    Raises:
        MeshError: there are too few, or a process would have none of them.
    """
    processes = sorted({device.process_index for device in devices})
    where = "this process has" if len(processes) == 1 else f"these {len(processes)} processes together have"
    if len(devices) < tp_size:
        raise MeshError(
            f"--tp-size {tp_size} needs as many {platform} devices, {where} {len(devices)}; "
            "lower it or run on a larger slice"
        )
    chosen = sorted(devices, key=lambda device: (device.process_index, device.id))[:tp_size]
    idle = sorted(set(processes) - {device.process_index for device in chosen})
    if idle:
        raise MeshError(
            f"--tp-size {tp_size} takes the {platform} devices of {len(processes) - len(idle)} of {len(processes)} "
            f"processes and leaves process {idle[0]} without one; use --tp-size {len(devices)}, or fewer processes"
        )
    return chosen


def exchange_over(mesh: Mesh) -> Exchange:
    """An `Exchange` among the processes of a mesh, through a device of each."""
    firsts: dict[int, jax.Device] = {}
    for device in mesh.devices.flat:
        firsts.setdefault(device.process_index, device)
    if len(firsts) == 1:
        return lambda data: [data]
    mine = firsts[jax.process_index()]
    devices = Mesh(np.array([firsts[rank] for rank in sorted(firsts)]), (TP,))
    gather = jax.jit(lambda rows: rows, out_shardings=NamedSharding(devices, PartitionSpec()))

    def gathered(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shape, sharding = (len(firsts), *row.shape), NamedSharding(devices, PartitionSpec(TP))
        rows = jax.make_array_from_single_device_arrays(shape, sharding, [jax.device_put(row[None], mine)])
        return np.asarray(gather(rows).addressable_data(0))

    def exchange(data: bytes) -> list[bytes]:
        sizes = gathered(np.array([len(data)], np.int32))[:, 0].tolist()
        row = np.zeros(1 << max(sizes).bit_length(), np.uint8)  # few shapes, so few programs
        row[: len(data)] = np.frombuffer(data, np.uint8)
        rows = gathered(row) if max(sizes) else np.zeros((len(sizes), 0), np.uint8)
        return [found[:size].tobytes() for found, size in zip(rows, sizes, strict=True)]

    return exchange


def advise(device_kind: str, schemes: Iterable[Scheme]) -> list[str]:
    """What to know about these schemes on this chip: a sentence for each type its matrix unit lacks.

    Args:
        device_kind: `jax.Device.device_kind`; an unknown one gets no advice.
        schemes: those of the model's modules.
    """
    generation = generation_of(device_kind)
    if generation is None or generation.fast_8_bit is None:
        return []
    native = generation.fast_8_bit
    lines = []
    dtypes = {d for s in schemes if not rebiases(s, device_kind) for d in (s.weight_dtype, s.activation_dtype)}
    for dtype in sorted(d for d in dtypes if d not in (None, native)):
        lines.append(
            f"{device_kind} has no matrix unit for {dtype}: it is upcast, which saves memory but little or no time; "
            f"{native} is the 8-bit type this chip multiplies"
        )
    return lines
