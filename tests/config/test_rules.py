"""What a quantization file means, module by module. The ways it can be wrong are in test_rules_refused.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podquant.config.rules import QuantizationConfig, Resolution, Rule, load_quantization_config
from podquant.config.scheme import Scheme
from podquant.errors import ConfigError
from tests.calls import calls_of

Load = Callable[[str], QuantizationConfig]

INT8 = Scheme("int8")
LAYER = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"] + [
    f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")
]
LLAMA = ["model.embed_tokens", *LAYER, "lm_head"]
MOE = [
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.shared_expert_gate",
    "model.layers.1.mlp.shared_expert.up_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.1.block_sparse_moe.gate",
]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write(text: str) -> QuantizationConfig:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return load_quantization_config(str(path))

    return write


def dense(*rules: str, more: str = "") -> str:
    return "quantization:\n  dense:\n    rules:\n" + "".join(f"      - {{{rule}}}\n" for rule in rules) + more


def pattern(regex: str, weight: str = "int8") -> str:
    return f"module_path: '{regex}', weight_dtype: {weight}"


def taken(resolution: Resolution) -> list[str]:
    return [module for module, decision in resolution.decisions.items() if decision.scheme]


def test_the_first_rule_that_matches_decides(load: Load) -> None:
    rules = (pattern(".*q_proj", "null"), pattern(r".*self_attn\."), pattern(".*", "float8_e4m3fn"))
    decisions = load(dense(*rules)).resolve(LLAMA).decisions
    assert list(decisions) == LLAMA
    assert decisions["model.layers.0.self_attn.q_proj"].scheme is None
    assert decisions["model.layers.0.self_attn.q_proj"].rule == 'my.yaml:4 ".*q_proj" (dotted)'
    assert decisions["model.layers.0.self_attn.k_proj"].scheme == INT8
    assert decisions["model.embed_tokens"].scheme == decisions["lm_head"].scheme == Scheme("float8_e4m3fn")


def test_a_module_without_a_rule_stays_as_it_is(load: Load) -> None:
    decision = load(dense(pattern(".*mlp"))).resolve(LLAMA).decisions["lm_head"]
    assert (decision.scheme, decision.rule) == (None, "no rule")


def test_aliases_and_the_newer_name_of_the_section(load: Load) -> None:
    config = load(
        "quantization:\n  linear:\n    rules:\n"
        "      - module_path: '.*'\n        weight_qtype: int8\n        act_qtype: float8_e4m3fn\n"
        "  moe: {weight_qtype: int8, act_qtype: int8}\n"
    )
    assert config.rules[0].scheme == Scheme("int8", "float8_e4m3fn")
    assert config.moe == Scheme("int8", "int8")


def test_a_block_size_is_a_default_that_a_rule_overrides(load: Load) -> None:
    config = load(
        dense(
            pattern("a"),
            pattern("b") + ", weight_block_size: null",
            pattern("c") + ", weight_block_size: [64, 256]",
            pattern("d", "null"),
            more="  weight_block_size: [128, 128]\n  moe: {weight_dtype: int8}\n",
        )
    )
    blocks = [rule.scheme.weight_block_size if rule.scheme else "none" for rule in config.rules]
    assert blocks == [(128, 128), None, (64, 256), "none"]
    assert config.moe == Scheme("int8", None, (128, 128))


@pytest.mark.parametrize(
    ("regex", "spelling"),
    [
        (r"model\.layers\.0\.self_attn\.q_proj$", "dotted"),
        (r"model.layers.\d+.self_attn.q", "dotted"),
        (r"^(?!.*(moe_gate|layers\.\d+\.mlp|logits_processor)).*q_proj$", "dotted"),
        (r"model/layers/\d+/self_attn/q_proj", "slash"),
        (r".*/q_proj", "slash"),
        (r"model/layers\[\d+\]/self_attn/q_proj", "bracket"),
        (r"model/layers\[(?!7)\d\]/self_attn/q_proj", "bracket"),
        (r"^(?!.*(block_sparse_moe/gate|block_sparse_moe/experts|logits_processor)).*q_proj$", "slash"),
    ],
)
def test_the_decision_says_which_spelling_matched(load: Load, regex: str, spelling: str) -> None:
    decision = load(dense(pattern(regex))).resolve(LLAMA).decisions["model.layers.0.self_attn.q_proj"]
    assert decision.scheme == INT8
    assert decision.rule == f'my.yaml:4 "{regex}" ({spelling})'


@pytest.mark.parametrize("regex", ["layers", "self_attn.q_proj", r"model/layers\.0", r"model\.layers\[0\]"])
def test_a_pattern_must_match_from_the_start_in_one_spelling(load: Load, regex: str) -> None:
    assert taken(load(dense(pattern(regex))).resolve(LLAMA)) == []


@pytest.mark.parametrize("regex", [r"^(?!.*layers/0/mlp).*$", r"^(?!.*layers\[0\]/mlp).*$", r"(?!.*layers\.0\.mlp).*"])
def test_what_a_lookahead_excludes_does_not_come_back_in_another_spelling(load: Load, regex: str) -> None:
    resolution = load(dense(pattern(regex))).resolve(LLAMA)
    assert taken(resolution) == [module for module in LLAMA if ".mlp." not in module]


def test_patterns_of_sglang_jax_leave_out_what_they_leave_out_there(load: Load) -> None:
    no_mlp = r"^(?!.*(moe_gate|layers\.\d+\.mlp|logits_processor)).*$"
    names = "wi_0|wi_1|wo|w1|w2|w3|w1_shared|w2_shared|w3_shared"
    no_experts = rf"^(?!.*(moe_gate|shared_experts|block_sparse_moe|router|logits_processor|mlp/({names})(/|$))).*$"
    modules = [*LLAMA, "model.layers.0.mlp.w1", "model.layers.0.mlp.shared_experts.up_proj"]
    assert taken(load(dense(pattern(no_mlp))).resolve(modules)) == [m for m in LLAMA if ".mlp." not in m]
    assert taken(load(dense(pattern(no_experts))).resolve(modules)) == LLAMA


def test_a_whole_file_of_sglang_jax(load: Load) -> None:
    config = load(
        "quantization:\n  is_static_checkpoint: true\n  weight_block_size: [128, 128]\n"
        "  allow_narrow_n_blockwise: true\n  ignored_layers: ['model.layers.0.mlp']\n"
        "  linear:\n    rules:\n      - module_path: '.*'\n        weight_dtype: 'float8_e4m3fn'\n"
        "        activation_dtype: null\n        weight_block_size: null\n"
        "  moe:\n    weight_dtype: 'float8_e4m3fn'\n    activation_dtype: null\n"
    )
    assert config.is_static_checkpoint is True
    assert config.allow_narrow_n_blockwise is True
    assert config.rules[0].scheme == Scheme("float8_e4m3fn")
    assert config.moe == Scheme("float8_e4m3fn", None, (128, 128))
    assert taken(config.resolve(LLAMA)) == [module for module in LLAMA if ".mlp." not in module]


def test_flags_are_off_unless_set(load: Load) -> None:
    config = load(dense(pattern(".*"), more="  ignored_layers: null\n"))
    assert (config.is_static_checkpoint, config.allow_narrow_n_blockwise, config.ignored) == (False, False, ())


@pytest.mark.parametrize(
    ("entry", "left_alone"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.0.mlp", [m for m in LLAMA if ".mlp." in m]),
        ("model/layers[0]/mlp", [m for m in LLAMA if ".mlp." in m]),
        ("model.layers.0.self_attn.q", []),
        ("q_proj", []),
        ("re:.*[qk]_proj$", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]),
    ],
)
def test_ignored_layers_are_names_subtrees_and_patterns(load: Load, entry: str, left_alone: Sequence[str]) -> None:
    config = load(dense(pattern(".*"), more=f"  ignored_layers: ['{entry}']\n"))
    resolution = config.resolve(LLAMA)
    assert taken(resolution) == [module for module in LLAMA if module not in left_alone]
    for module in left_alone:
        assert resolution.decisions[module].rule == f'ignored_layers my.yaml:5 "{entry}" (dotted)'
    assert [idle.rule for idle in resolution.unmatched] == [f'ignored_layers my.yaml:5 "{entry}"'] * (not left_alone)


def test_experts_obey_the_moe_section_alone(load: Load) -> None:
    expert = "model.layers.1.mlp.experts.0.up_proj"
    moe = "  moe: {weight_dtype: float8_e4m3fn}\n"
    with_moe = load(dense(pattern(".*"), more=moe)).resolve(MOE).decisions[expert]
    without = load(dense(pattern(".*experts.*"))).resolve(MOE)
    kept = load(dense(pattern(".*"), more="  moe: {weight_dtype: null}\n")).resolve(MOE).decisions[expert]
    ignored = load(dense(pattern(".*"), more=moe + "  ignored_layers: ['re:.*experts']\n")).resolve(MOE)
    assert (with_moe.scheme, with_moe.rule) == (Scheme("float8_e4m3fn"), "moe my.yaml:5")
    assert (without.decisions[expert].scheme, without.decisions[expert].rule) == (None, "no moe section")
    assert "is decided by no moe section" in without.unmatched[0].reason
    assert (kept.scheme, kept.rule) == (None, "moe my.yaml:5")
    assert ignored.decisions[expert].scheme is None


@pytest.mark.parametrize(
    "regex",
    [
        ".*",
        "",
        r".*mlp.*|.*moe.*",
        r"model\.layers\.\d+\..*",
        r".*\.\w+$",
        r".*\.(mlp|block_sparse_moe)\.[a-z]+$",
        r".*shared_expert.*",
        r"^(?!.*(q_proj|lm_head)).*$",
        r"^(?!.*(_proj|w1|dense)).*$",
        r"model/layers/1/.*",
    ],
)
def test_a_wide_pattern_takes_no_router(load: Load, regex: str) -> None:
    decisions = load(dense(pattern(regex or ".?"))).resolve(MOE).decisions
    routers = [module for module in MOE if module.endswith("gate")]
    assert {(decisions[m].scheme, decisions[m].rule) for m in routers} == {(None, "router")}


@pytest.mark.parametrize(
    ("regex", "routers"),
    [
        (r".*\.mlp\.gate$", ["model.layers.1.mlp.gate"]),
        (r".*mlp/gate$", ["model.layers.1.mlp.gate"]),
        (r"model/layers\[1\]/mlp/gate$", ["model.layers.1.mlp.gate"]),
        (r".*shared_expert_gate", ["model.layers.1.mlp.shared_expert_gate"]),
        (r".*(q_proj|gate)$", [module for module in MOE if module.endswith("gate")]),
        (r"model\.layers\.1\.block_sparse_moe\.gate", ["model.layers.1.block_sparse_moe.gate"]),
    ],
)
def test_a_pattern_that_names_a_router_takes_it_behind_a_wide_one_too(
    load: Load, regex: str, routers: list[str]
) -> None:
    modules = [module for module in MOE if module.endswith("gate")]
    assert taken(load(dense(pattern(regex))).resolve(modules)) == routers
    assert taken(load(dense(pattern(".*"), pattern(regex))).resolve(modules)) == routers


def test_tied_embeddings_are_one_tensor_named_by_the_embedding(load: Load) -> None:
    config = load(dense(pattern(".*lm_head", "null"), pattern(".*")))
    tied = config.resolve(LLAMA, tied_embeddings=True)
    apart = config.resolve(LLAMA)
    assert apart.decisions["lm_head"].scheme is None
    assert apart.unmatched == ()
    assert tied.decisions["lm_head"].scheme == INT8
    assert tied.decisions["lm_head"].rule == 'tied to model.embed_tokens: my.yaml:5 ".*" (dotted)'
    assert "lm_head is decided by tied to model.embed_tokens" in tied.unmatched[0].reason
    (idle,) = config.resolve(LLAMA[:-1], tied_embeddings=True).unmatched
    assert str(idle) == (
        'my.yaml:4 ".*lm_head": lm_head is the same tensor as model.embed_tokens in this model: name that one; '
        "near misses: model.embed_tokens"
    )


def test_a_rule_that_matches_nothing_is_reported_with_near_misses(load: Load) -> None:
    config = load(dense(pattern(r".*\.lm_head"), pattern(".*self_atn.q_proj"), pattern("zzz"), pattern(".*")))
    missed = {idle.rule: idle for idle in config.resolve(LLAMA).unmatched}
    assert missed['my.yaml:4 ".*\\.lm_head"'].near_misses == ("lm_head",)
    assert missed['my.yaml:5 ".*self_atn.q_proj"'].near_misses[0] == "model.layers.0.self_attn.q_proj"
    assert missed['my.yaml:6 "zzz"'].near_misses == ()
    assert {idle.reason for idle in missed.values()} == {"matches no module of this model"}


def test_a_rule_behind_a_wider_one_is_reported(load: Load) -> None:
    (idle,) = load(dense(pattern(".*"), pattern("lm_head", "null"))).resolve(LLAMA).unmatched
    assert idle.rule == 'my.yaml:5 "lm_head"'
    assert 'lm_head is decided by my.yaml:4 ".*" (dotted)' in idle.reason


def test_many_modules_take_a_few_calls_each(load: Load) -> None:
    modules = [f"model.layers.{layer}.part{i}.q_proj" for layer in range(100) for i in range(100)]
    config = load(dense(pattern("nothing/here"), pattern(r"^(?!.*(moe_gate|mlp/(w1|w2)(/|$))).*$")))
    found: list[Resolution] = []
    assert calls_of(lambda: found.append(config.resolve(modules))) < 100 * len(modules)
    assert len(taken(found[0])) == 10_000


PATTERNS = [".*", ".*proj", r".*\.gate$", "lm_head", "model/layers/1/.*", r"^(?!.*/mlp/).*$"]


@given(st.lists(st.sampled_from([*LLAMA, *MOE]), unique=True), st.permutations(PATTERNS))
def test_a_decision_depends_on_nothing_but_the_name(modules: list[str], order: list[str]) -> None:
    rules = tuple(Rule(regex, re.compile(regex), INT8) for regex in order[:4])
    config = QuantizationConfig("some.yaml", rules)
    whole = config.resolve([*LLAMA, *MOE]).decisions
    assert config.resolve(modules).decisions == {module: whole[module] for module in modules}


KEYS = ["quantization", "dense", "linear", "moe", "rules", "module_path", "weight_dtype", "ignored_layers", "x"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(["int8", "float8_e4m3fn", ".*", "re:(", "[[", "a{99999999999}"]),
)
TREES = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)


@given(TREES)
def test_any_tree_is_a_config_or_a_config_error_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, tree: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text("quantization:\n  dense: " + flow(tree) + "\n")
    outcome = ""
    try:
        outcome = f"{path}:1: {load_quantization_config(str(path))}"
    except ConfigError as error:
        outcome = str(error)
    assert re.match(re.escape(str(path)) + r":[1-9]\d*: ", outcome)


def flow(tree: object) -> str:
    """A tree as YAML in flow style, every entry on a line of its own."""
    if isinstance(tree, list):
        return "[" + ",\n ".join(map(flow, tree)) + "]"
    if isinstance(tree, dict):
        return "{" + ",\n ".join(f"{key}: {flow(value)}" for key, value in tree.items()) + "}"
    return f"'{tree}'" if isinstance(tree, str) else {None: "null"}.get(tree, str(tree).lower())  # type: ignore[call-overload]
