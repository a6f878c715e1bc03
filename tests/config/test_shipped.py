"""The files in configs/ mean what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from podquant.config.rules import load_quantization_config
from podquant.config.scheme import Scheme

CONFIGS = Path(__file__).parents[2] / "configs"
FP8 = "float8_e4m3fn"
SCHEMES = {
    "int8": Scheme("int8"),
    "int8_w8a8": Scheme("int8", "int8"),
    "fp8": Scheme(FP8),
    "fp8_w8a8": Scheme(FP8, FP8),
}
ENDS = ["model.embed_tokens", "lm_head", "transformer.wte", "language_model.model.embed_tokens"]
INNER = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj", "transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("keep", [False, True])
def test_a_shipped_file_is_found_by_name_and_quantizes_what_it_says(name: str, keep: bool) -> None:
    config = load_quantization_config(f"{name}_keep_embedding.yaml" if keep else f"{name}.yaml")
    resolution = config.resolve([*ENDS, *INNER, "model.layers.0.mlp.gate"])
    assert resolution.unmatched == ()
    assert {resolution.decisions[module].scheme for module in INNER} == {SCHEMES[name]}
    assert {resolution.decisions[module].scheme for module in ENDS} == {None if keep else SCHEMES[name]}
    assert resolution.decisions["model.layers.0.mlp.gate"].scheme is None


@pytest.mark.parametrize("name", SCHEMES)
def test_a_tied_model_leaves_no_shipped_rule_idle(name: str) -> None:
    for file in (f"{name}.yaml", f"{name}_keep_embedding.yaml"):
        modules = ["model.embed_tokens", "model.layers.0.mlp.up_proj"]
        assert load_quantization_config(file).resolve(modules, tied_embeddings=True).unmatched == ()


def test_every_file_is_one_of_these_and_says_what_it_costs() -> None:
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert names == sorted([*SCHEMES, *(f"{name}_keep_embedding" for name in SCHEMES)])
    for path in CONFIGS.glob("*.yaml"):
        header = path.read_text().split("quantization:")[0]
        assert "KL to the unquantized" in header
        assert all(line.startswith("#") or not line for line in header.splitlines())
