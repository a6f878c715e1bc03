"""quantization_config says exactly what was done: judged by reading it as the convention's other readers do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from podquant.artifact.compressed_tensors import quantization_config
from podquant.artifact.manifest import ModuleRule
from podquant.config.scheme import Scheme
from podquant.families.modules import kind_of

INT8, W8A8, FP8 = Scheme("int8"), Scheme("int8", "int8"), Scheme("float8_e4m3fn", "float8_e4m3fn")
BLOCKS = Scheme("float8_e4m3fn", None, (128, 64))
NAMES = ["model.embed_tokens"]
NAMES += [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate")]
NAMES += [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(12) for e in range(3)]
NAMES += ["lm_head"]


def modules(rules: dict[str, Scheme | None]) -> dict[str, ModuleRule]:
    """The first pattern that matches decides."""
    return {
        name: ModuleRule(next((scheme for pattern, scheme in rules.items() if re.search(pattern, name)), None), "")
        for name in NAMES
    }


def group_of(section: dict[str, Any], name: str, class_name: str) -> dict[str, Any] | None:
    """The group that takes a module, as compressed-tensors finds it."""

    def is_hit(target: str) -> bool:
        return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name

    if any(map(is_hit, section["ignore"])):
        return None
    groups = list(section["config_groups"].values())
    for group in groups:
        if any(map(is_hit, group["targets"])):
            return dict(group)
    return next((group for group in groups if class_name in group["targets"]), None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rules",
    [
        {".": INT8},
        {".": W8A8},
        {r"gate$": None, ".": FP8},
        {"lm_head|embed": None, ".": BLOCKS},
        {"embed": FP8, "lm_head": INT8, "q_proj": W8A8, "experts": BLOCKS, r"gate$": None, ".": INT8},
        {r"layers\.(0|11)\.": None, ".": W8A8},
        {r"layers\.1\.": FP8, r"experts\.1": None, ".": W8A8},
        {"up_proj": INT8},
        {"embed": W8A8},
    ],
)
def test_each_module_is_found_with_its_scheme(rules: dict[str, Scheme | None], tied: bool) -> None:
    decided = modules(rules)
    if tied:
        del decided["lm_head"]
    section = quantization_config(decided, tied=tied)
    assert section is not None
    expected = {name: module.scheme for name, module in decided.items()}
    if tied:
        expected["lm_head"] = expected["model.embed_tokens"]
    for name, scheme in expected.items():
        group = group_of(section, name, "Embedding" if "embed" in name else "Linear")
        assert (group is None) == (scheme is None), name
        if group is None or scheme is None:
            continue
        weights, activations = group["weights"], group["input_activations"]
        assert weights["type"] == ("int" if scheme.weight_dtype == "int8" else "float")
        assert group["format"] == f"{weights['type']}-quantized"
        assert tuple(weights.get("block_structure", ())) == (scheme.weight_block_size or ())
        assert weights["strategy"] == ("block" if scheme.weight_block_size else "channel")
        assert (activations is None) == (scheme.activation_dtype is None or kind_of(name) == "embedding"), name


def test_one_scheme_is_written_as_others_write_it() -> None:
    linears = {name: module for name, module in modules({"gate$": None, ".": W8A8}).items() if "embed" not in name}
    linears["lm_head"] = ModuleRule(None, "")
    assert quantization_config(linears, tied=False) == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [r"re:^model\.layers\.\d+\.mlp\.gate$", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "int-quantized",
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "channel",
                    "symmetric": True,
                    "dynamic": False,
                    "group_size": None,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                    "group_size": None,
                },
                "output_activations": None,
            }
        },
    }


def test_groups_of_two_formats_are_mixed_precision() -> None:
    section = quantization_config(modules({"experts": FP8, ".": INT8}), tied=False)
    assert section is not None
    assert section["format"] == "mixed-precision"


def test_nothing_quantized_is_no_section() -> None:
    assert quantization_config(modules({}), tied=False) is None
