"""The devices a model runs on, as a mesh of one axis."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

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
        if platform == "cpu":
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
