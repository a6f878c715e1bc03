"""A dense family that podquant does not have, declared here: it is planned, converted, cut, loaded and computed.

EXAONE 3 (arXiv:2408.03541) is a Llama under other names, in config.json and on disk. The golden Llama is given those
names, and must give the logits that transformers gives for it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from podquant.checkpoint.check import check_headers
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.families.declaration import declare
from podquant.families.disk import DiskNames
from podquant.families.family import Family
from podquant.families.registry import FAMILIES, read_model_config
from podquant.weights.source import open_source
from tests.engine.test_goldens import GOLDENS, MODES, MOST_DIFFERENCE, all_logits, load, reference

EXAONE = Family(
    qkv_bias=False,
    o_bias=False,
    spelled={
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    names=DiskNames(
        layers="transformer.h",
        embed_tokens="transformer.wte",
        norm="transformer.ln_f",
        parts={
            "ln_1": ("input_layernorm",),
            "ln_2": ("post_attention_layernorm",),
            "attn.attention.q_proj": ("self_attn.q_proj",),
            "attn.attention.k_proj": ("self_attn.k_proj",),
            "attn.attention.v_proj": ("self_attn.v_proj",),
            "attn.attention.out_proj": ("self_attn.o_proj",),
            "mlp.c_fc_0": ("mlp.gate_proj",),
            "mlp.c_fc_1": ("mlp.up_proj",),
            "mlp.c_proj": ("mlp.down_proj",),
        },
    ),
)
WORDS = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "gate_proj": "c_fc_0",
    "up_proj": "c_fc_1",
    "down_proj": "c_proj",
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden Llama as an EXAONE."""
    monkeypatch.setitem(FAMILIES, "ExaoneForCausalLM", EXAONE)
    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    config |= {spelling: config.pop(key) for key, spelling in EXAONE.spelled.items()}
    config["architectures"] = ["ExaoneForCausalLM"]
    renamed = {}
    for name, array in load_file(GOLDENS / "llama" / "model.safetensors").items():
        for word, other in WORDS.items():
            name = name.replace(word, other)
        renamed[name] = array
    place = tmp_path / "exaone"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    save_file(renamed, place / "model.safetensors", {"format": "pt"})
    return place


def test_a_family_is_a_declaration_and_a_line_in_the_registry(checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(str(checkpoint))
    declaration = declare(read_model_config(opened.config, opened.tensors))
    assert check_headers(declaration, opened.tensors, "here") == ()
    rules = MODES["int8"]
    assert rules is not None
    plan = plan_conversion(opened, load_quantization_config(rules), source_name="exaone", tp_size=2)
    cuts = {output.name: output.cut for unit in plan.units for output in unit.outputs}
    axes = {name: cuts[f"transformer.h.0.{name}.weight"] for name in ("mlp.c_fc_0", "mlp.c_proj")}
    assert {name: cut and cut.axis for name, cut in axes.items()} == {"mlp.c_fc_0": 0, "mlp.c_proj": 1}
    convert(opened, plan, str(tmp_path / "artifact"), threads=1)
    opened.close()
    expected = reference("llama")
    for place, tp, mode in ((checkpoint, 1, "none"), (tmp_path / "artifact", 2, "int8")):
        source = open_source(str(place))
        model, weights = load(source, tp)
        source.close()
        found = all_logits(model, weights, expected["input_ids"])
        assert np.abs(found - expected[f"logits_{mode}"]).max() <= MOST_DIFFERENCE, mode
