"""The sharding table."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec

from podquant.families.declaration import DeclaredWeight
from podquant.model.axes import spec_of
from podquant.model.parameter import Module, Slot


def test_axes_become_a_spec() -> None:
    assert spec_of(("layers", "ffn", "embed")) == PartitionSpec(None, "tp", None)


def test_two_dimensions_along_one_mesh_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\('heads', 'ffn'\) put two dimensions along one mesh axis"):
        spec_of(("heads", "ffn"))


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(KeyError, match="head"):
        spec_of(("head",))


def module(layers: tuple[int, int] | None) -> Module:
    weight = DeclaredWeight(0, "mlp.up_proj", "weight", ("ffn", "embed"), (2, 3), "dense", ())
    return Module("mlp.up_proj", {"weight": weight}, {"ffn": 2, "embed": 3}, None, layers)


def test_a_parameter_has_an_axis_for_each_dimension() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 2 dimensions, axes \('embed',\) name 1"):
        module(None).parameter("weight", "float32", (2, 3), ("embed",))


def test_layers_are_stacked_in_front() -> None:
    weight = module((4, 9)).parameter("weight", "bfloat16")
    assert weight.get_value().shape == (5, 2, 3)
    assert weight.axes == ("layers", "ffn", "embed")
    assert weight.slot == Slot("mlp.up_proj", "weight", (4, 9))
