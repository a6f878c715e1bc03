"""Parameters made of declared weights: a module says which weight it wants in which dtype; all else is declared.

Each remembers the weights that fill it, so that whoever loads them has no need to take names apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from podquant.config.scheme import Scheme
from podquant.families.declaration import DeclaredWeight


class Weight(nnx.Param):  # type: ignore[type-arg]  # nnx.Param is generic only for type checkers
    """A parameter with its logical axes, see `axes.RULES`, and the `Slot` it has in the declaration."""


class StackedWeight(Weight):
    """One whose layers are not scanned over: what a loop inside a layer reads of it, it takes from the stack."""


class Slot(NamedTuple):
    """The declared weights that fill a parameter, or that its scales are of.

    Attributes:
        module, name: as in `DeclaredWeight`.
        layers: (start, stop) of the layers that are stacked in it; None outside the layers.
        blocks: of scales, which block each column is of, over all shards that share out an axis; None: as on disk.
    """

    module: str
    name: str
    layers: tuple[int, int] | None
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Module:
    """A module of the decoder as declared: in a run of layers alike, which are stacked, or outside the layers.

    Attributes:
        name: as in `DeclaredWeight`.
        weights: by parameter name, those of the first layer.
        sizes: of each logical axis on the devices, over all shards.
        scheme: how it is quantized, None for not.
        layers: (start, stop) of the run; None outside the layers.
        shards: of the mesh.
    """

    name: str
    weights: Mapping[str, DeclaredWeight]
    sizes: Mapping[str, int]
    scheme: Scheme | None = None
    layers: tuple[int, int] | None = None
    shards: int = 1

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axes of its weight."""
        return self.weights["weight"].axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight on the devices, over all shards; of one layer, or one expert of it."""
        return tuple(self.sizes[axis] for axis in self.axes)

    def parameter(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int] | None = None,
        axes: Sequence[str] | None = None,
        kind: type[Weight] = Weight,
        blocks: tuple[int, ...] | None = None,
    ) -> Weight:
        """A parameter full of zeros: build models under `nnx.eval_shape`, where no memory is taken.

        Args:
            name: of the declared weight that fills it, or that its scales are of.
            dtype: on the devices.
            shape: on the devices, of one layer; None: what is declared.
            axes: a logical axis for each dimension; None: those declared.
            kind: its class.
            blocks: see `Slot`.
        """
        axes = self.weights[name].axes if axes is None else tuple(axes)
        shape = tuple(self.sizes[axis] for axis in axes) if shape is None else tuple(shape)
        if len(shape) != len(axes):
            raise ValueError(f"shape {shape} has {len(shape)} dimensions, axes {axes} name {len(axes)}")
        if self.layers is not None:
            start, stop = self.layers
            shape, axes = (stop - start, *shape), ("layers", *axes)
        return kind(jnp.zeros(shape, dtype), axes=axes, slot=Slot(self.name, name, self.layers, blocks))
