"""The sharding table."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec

from podquant.model.axes import spec_of
from podquant.model.parameter import declare


def test_axes_become_a_spec() -> None:
    assert spec_of(("layers", "ffn", "embed")) == PartitionSpec(None, "tp", None)


def test_two_dimensions_along_one_mesh_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\('heads', 'ffn'\) put two dimensions along one mesh axis"):
        spec_of(("heads", "ffn"))


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(KeyError, match="head"):
        spec_of(("head",))


def test_a_weight_has_an_axis_for_each_dimension() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 2 dimensions, axes \('embed',\) name 1"):
        declare((2, 3), "float32", ("embed",))


def test_layers_are_stacked_in_front() -> None:
    weight = declare((2, 3), "bfloat16", ("ffn", "embed"), 5)
    assert weight.get_value().shape == (5, 2, 3)
    assert weight.axes == ("layers", "ffn", "embed")
