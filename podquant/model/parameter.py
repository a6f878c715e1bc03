"""One declaration of an array of weights: shape, dtype, axes and what it is called on disk follow from it."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx


class Weight(nnx.Param):  # type: ignore[type-arg]  # nnx.Param is generic only for type checkers
    """A parameter with its logical axes; see `axes.RULES`."""


class ExpertWeight(Weight):
    """One whose layers are not scanned over: an expert is taken from the stack where its product is computed."""


def declare(shape: Sequence[int], dtype: str, axes: Sequence[str], layers: int | None = None) -> Weight:
    """Declare a weight.

    Args:
        shape: the global shape on the devices, of one layer.
        dtype: on the devices.
        axes: a logical axis for each dimension.
        layers: how many layers are stacked in front; None for a weight outside the layers.

    Returns:
        A parameter full of zeros: build models under `nnx.eval_shape`, where no memory is taken.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} dimensions, axes {tuple(axes)} name {len(axes)}")
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    return Weight(jnp.zeros(tuple(shape), dtype), axes=tuple(axes))
