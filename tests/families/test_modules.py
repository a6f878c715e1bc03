from __future__ import annotations

import pytest

from podquant.families.modules import ModuleKind, kind_of, router_neighbours, spell, unspell


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("model.tok_embeddings", "embedding"),
        ("lm_head", "lm_head"),
        ("output", "lm_head"),
        ("model.layers.0.attention.output", "dense"),
        ("language_model.lm_head", "lm_head"),
        ("model.layers.0.self_attn.q_proj", "dense"),
        ("model.layers.0.mlp.gate_proj", "dense"),
        ("model.layers.3.mlp.gate", "router"),
        ("model.layers.3.block_sparse_moe.gate", "router"),
        ("model.layers.3.mlp.shared_expert_gate", "router"),
        ("model.layers.3.mlp.router", "router"),
        ("model.layers.3.mlp.gate.wg", "router"),
        ("model.layers.3.mlp.shared_expert.gate_proj", "dense"),
        ("model.layers.3.mlp.shared_experts.down_proj", "dense"),
        ("model.layers.3.mlp.experts.17.gate_proj", "expert"),
        ("model.layers.3.block_sparse_moe.experts.0.w1", "expert"),
        ("model.layers.3.mlp.experts.gate_up_proj", "expert"),
        ("", "dense"),
    ],
)
def test_kind_of(module: str, kind: ModuleKind) -> None:
    assert kind_of(module) == kind


@pytest.mark.parametrize("module", ["model.layers.10.mlp.experts.7.up_proj", "lm_head", "h.0.c_attn.1", "a.1.2.b3.4c"])
def test_every_spelling_leads_back(module: str) -> None:
    assert {unspell(spell(module, spelling)) for spelling in ("dotted", "slash", "bracket")} == {module}


def test_spellings() -> None:
    module = "model.layers.10.self_attn.q_proj"
    assert spell(module, "dotted") == module
    assert spell(module, "slash") == "model/layers/10/self_attn/q_proj"
    assert spell(module, "bracket") == "model/layers[10]/self_attn/q_proj"
    assert spell("a.1.2.b3.4c", "bracket") == "a[1][2]/b3/4c"


def test_no_neighbour_of_a_router_is_a_router() -> None:
    for router in ("model.layers.3.mlp.gate", "a.router", "m.shared_expert_gate", "m.gate.wg"):
        neighbours = router_neighbours(router)
        assert router not in neighbours
        assert {kind_of(name) for name in neighbours} == {"dense"}
