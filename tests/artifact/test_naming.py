"""Names of files and tensors."""

from __future__ import annotations

import pytest

from podquant.artifact.naming import is_safe, module_of, scales_of, weight_of, weights_file


def test_names_are_those_of_hugging_face() -> None:
    assert weights_file(2, 17) == "model-00002-of-00017.safetensors"
    assert weight_of("a.b") == "a.b.weight"
    assert scales_of("a.b") == "a.b.weight_scale"


@pytest.mark.parametrize(
    ("tensor", "module"), [("a.b.weight", "a.b"), ("a.b.bias", None), ("weight", None), ("a.weight_scale", None)]
)
def test_the_module_of_a_weight(tensor: str, module: str | None) -> None:
    assert module_of(tensor) == module


@pytest.mark.parametrize("name", ["a", "a/b.c", "tp-00-of-02/model.safetensors", "..a"])
def test_names_inside(name: str) -> None:
    assert is_safe(name)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\\b", "a\0"])
def test_names_that_could_lead_out(name: str) -> None:
    assert not is_safe(name)
