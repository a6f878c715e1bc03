"""The devices a model runs on, as a mesh of one axis."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from podquant.config.scheme import Scheme
from podquant.errors import MeshError
from podquant.model.axes import TP


def make_mesh(platform: str, tp_size: int) -> Mesh:
    """A mesh of the first `tp_size` devices of a platform.

    On the CPU platform the process is given as many devices as asked for, if nothing has used JAX before.

    Raises:
        MeshError: no such platform here, or too few devices.
    """
    try:
        jax.config.update("jax_platforms", platform)
        if platform == "cpu" and jax.config.jax_num_cpu_devices < tp_size:
            jax.config.update("jax_num_cpu_devices", tp_size)
    except RuntimeError:
        pass  # JAX runs already: what it has must do, and is checked below
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise MeshError(f"no {platform} devices in this process: {error}; choose another --device") from error
    if len(devices) < tp_size:
        raise MeshError(
            f"--tp-size {tp_size} needs as many {platform} devices, this process has {len(devices)}; "
            "lower it or run on a larger slice"
        )
    return Mesh(np.array(devices[:tp_size]), (TP,))


_MULTIPLIES = {"TPU v5 lite": "int8", "TPU v5": "int8", "TPU v6 lite": "int8", "TPU7x": "float8_e4m3fn"}
"""Device kind → the 8-bit type its matrix unit multiplies at twice the bf16 rate, read off libtpu 0.0.50's programs."""


def advise(device_kind: str, schemes: Iterable[Scheme]) -> list[str]:
    """What to know about these schemes on this chip: a sentence for each type its matrix unit lacks.

    Args:
        device_kind: `jax.Device.device_kind`; an unknown one gets no advice.
        schemes: those of the model's modules.
    """
    native = _MULTIPLIES.get(device_kind)
    if native is None:
        return []
    lines = []
    for dtype in sorted({d for s in schemes for d in (s.weight_dtype, s.activation_dtype) if d not in (None, native)}):
        lines.append(
            f"{device_kind} has no matrix unit for {dtype}: it is upcast, which saves memory but little or no time; "
            f"{native} is the 8-bit type this chip multiplies"
        )
    return lines
