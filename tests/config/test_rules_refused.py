"""Every way a quantization file can be wrong, and the line that says so."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from podquant.config.rules import load_quantization_config
from podquant.errors import ConfigError

HEAD = "quantization:\n  dense:\n    rules:\n      - module_path: '.*'\n        "
GOOD = HEAD + "weight_dtype: int8\n"
RULE = "quantization.dense.rules[0]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # keys
        (
            "quantisation: {}\n",
            "1: unknown key 'quantisation' in the file: expected one of quantization; did you mean quant",
        ),
        (GOOD + "  moee: {}\n", "6: unknown key 'moee' in quantization: expected one of dense, linear, moe,"),
        (GOOD + "  moe: {weight_dtyp: int8}\n", "6: unknown key 'weight_dtyp' in quantization.moe: expected one of"),
        (
            "quantization:\n  dense:\n    rule: []\n",
            "3: unknown key 'rule' in quantization.dense: expected one of rules",
        ),
        (
            GOOD + "        activation_dtyp: int8\n",
            f"6: unknown key 'activation_dtyp' in {RULE}: expected one of module",
        ),
        ("{}\n", "1: the file is an empty mapping: expected the key quantization"),
        ("quantization: {}\n", "1: quantization: nothing to quantize: expected a dense: or a moe: section"),
        ("quantization:\n  dense: {}\n", "2: quantization.dense: expected the key rules with a list of rules"),
        ("quantization:\n  dense: {rules: [{weight_dtype: int8}]}\n", f"2: {RULE}: a rule without module_path"),
        (HEAD + "activation_dtype: int8\n", f"4: {RULE}: no weight_dtype: expected int8, float8_e4m3fn, or null"),
        (GOOD + "  moe: {}\n", "6: quantization.moe: no weight_dtype"),
        (GOOD + "  moe: {activation_dtype: int8}\n", "6: quantization.moe: no weight_dtype"),
        (GOOD + "  linear: {rules: []}\n", "6: quantization.linear: both 'dense' and 'linear', two names of one thing"),
        (GOOD + "        weight_qtype: int8\n", f"6: {RULE}.weight_qtype: both 'weight_dtype' and 'weight_qtype'"),
        (
            GOOD + "        act_qtype: int8\n        activation_dtype: int8\n",
            f"7: {RULE}.activation_dtype: both 'activation_dtype' and 'act_qtype', two names of one thing: keep",
        ),
        (GOOD + "        weight_dtype: int8\n", "6: duplicate key 'weight_dtype': it is already in line 5"),
        # kinds of value
        ("", "1: the file is empty: expected a mapping"),
        ("- quantization\n", "1: the file: expected a mapping with some of the keys quantization, got a list"),
        ("quantization: int8\n", "1: quantization: expected a mapping with some of the keys dense, linear, moe,"),
        (
            "quantization:\n  dense: [1]\n",
            "2: quantization.dense: expected a mapping with some of the keys rules, got a list",
        ),
        ("quantization:\n  dense:\n    rules:\n", "3: quantization.dense.rules: expected a list of rules, got null"),
        ("quantization:\n  dense:\n    rules:\n      - '.*'\n", f"4: {RULE}: expected a mapping with some of the keys"),
        (GOOD + "  moe:\n", "6: quantization.moe: expected a mapping with some of the keys weight_dtype,"),
        (
            GOOD + "  is_static_checkpoint: 'true'\n",
            "6: quantization.is_static_checkpoint: expected true or false, got the",
        ),
        (
            GOOD + "  allow_narrow_n_blockwise: 1\n",
            "6: quantization.allow_narrow_n_blockwise: expected true or false, got the",
        ),
        (
            GOOD + "  ignored_layers: lm_head\n",
            "6: quantization.ignored_layers: expected a list of module names and 're:'",
        ),
        (
            GOOD + "  ignored_layers:\n    - lm_head\n    - 3\n",
            "8: quantization.ignored_layers[1]: expected a module name such",
        ),
        # dtypes
        (
            HEAD + "weight_dtype: int88\n",
            f"5: {RULE}.weight_dtype: expected one of int8, float8_e4m3fn, or null, got the text 'int88'; did you",
        ),
        (HEAD + "weight_dtype: FP8\n", "got the text 'FP8'; did you mean float8_e4m3fn?"),
        (HEAD + "weight_dtype: float8_e4m3\n", "got the text 'float8_e4m3'; did you mean float8_e4m3fn?"),
        (HEAD + "weight_dtype: bfloat16\n", "got the text 'bfloat16'"),
        (HEAD + "weight_dtype: 'null'\n", "got the text 'null'; did you mean null without quotes?"),
        (
            HEAD + "weight_dtype: yes\n",
            f"5: {RULE}.weight_dtype: expected one of int8, float8_e4m3fn, or null, got the boolean yes",
        ),
        (HEAD + "weight_dtype: 8\n", "got the number 8"),
        (HEAD + "weight_dtype: [int8]\n", "got a list"),
        (GOOD + "        activation_dtype: int9\n", f"6: {RULE}.activation_dtype: expected one of"),
        (GOOD + "  moe: {weight_dtype: int4}\n", "6: quantization.moe.weight_dtype: expected one of"),
        (
            HEAD + "weight_dtype: null\n        activation_dtype: int8\n",
            f"6: {RULE}.activation_dtype: 'int8' without a weight dtype",
        ),
        (
            GOOD + "  moe:\n    weight_dtype:\n    act_qtype: int8\n",
            "8: quantization.moe.act_qtype: 'int8' without a weight dtype",
        ),
        # block sizes
        (
            GOOD + "  weight_block_size: 128\n",
            "6: quantization.weight_block_size: expected two positive integers such as [128, 128], or null",
        ),
        (GOOD + "  weight_block_size: [128]\n", "6: quantization.weight_block_size: expected two positive integers"),
        (
            GOOD + "        weight_block_size: [128, 0]\n",
            f"6: {RULE}.weight_block_size[1]: expected a positive integer, got the number 0",
        ),
        (
            GOOD + "        weight_block_size: [-1, 8]\n",
            f"6: {RULE}.weight_block_size[0]: expected a positive integer, got the number -1",
        ),
        (GOOD + "        weight_block_size: [1.5, 8]\n", "expected a positive integer, got the number 1.5"),
        (GOOD + "        weight_block_size: [1, 2, 3]\n", "got a list of 3"),
        (
            HEAD + "weight_dtype: null\n        weight_block_size: [8, 8]\n",
            f"6: {RULE}.weight_block_size: a block size without a weight dtype",
        ),
        # patterns
        (
            GOOD.replace("'.*'", "'(.*'"),
            f"4: {RULE}.module_path: expected a regular expression, got '(.*', which Python's re refuses: missing )",
        ),
        (GOOD.replace("'.*'", "'*lm_head'"), "which Python's re refuses: nothing to repeat at position 0"),
        (GOOD.replace("'.*'", "'[[a]'"), "which Python's re refuses: Possible nested set"),
        (GOOD.replace("'.*'", "'a{99999999999999}'"), "which Python's re refuses: the repetition number is too large"),
        (GOOD.replace("'.*'", "'a{" + "9" * 5000 + "}'"), "which Python's re refuses"),
        (
            GOOD.replace("'.*'", "''"),
            f"4: {RULE}.module_path: expected a regular expression in single quotes, such as '.*', got the text ''",
        ),
        (
            GOOD.replace("'.*'", "~"),
            f"4: {RULE}.module_path: expected a regular expression in single quotes, such as '.*', got null",
        ),
        (GOOD.replace("'.*'", "42"), "got the number 42"),
        (GOOD.replace("'.*'", '"a\\.b"'), "4: not YAML: found unknown escape character '.'"),
        (
            GOOD + "  ignored_layers: ['re:(']\n",
            "6: quantization.ignored_layers[0]: expected a regular expression, got '('",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_quantization_config(str(path))
    assert str(caught.value).startswith(f"{path}:")
    if message[0].isdigit():
        assert str(caught.value).startswith(f"{path}:{message}")
    assert message in str(caught.value)


def test_the_good_text_of_these_tests_is_good(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(GOOD)
    assert load_quantization_config(str(tmp_path / "my.yaml")).name == "my.yaml"


def test_a_pattern_that_python_only_warns_about_is_refused_without_pytest_too(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(GOOD.replace("'.*'", "'[[b]'"))
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ConfigError, match="refuses: Possible nested set at position 1"),
    ):
        load_quantization_config(str(tmp_path / "my.yaml"))


def test_an_unknown_bare_name_lists_where_it_was_looked_for_and_what_ships() -> None:
    with pytest.raises(ConfigError) as caught:
        load_quantization_config("int88.yaml")
    message = str(caught.value)
    assert message.startswith("'int88.yaml': no such quantization file; looked for int88.yaml, ")
    assert "podquant/configs/int88.yaml" in message
    assert "fp8.yaml, fp8_keep_embedding.yaml, fp8_w8a8.yaml" in message
    assert message.endswith("; did you mean int8.yaml?")


def test_a_path_is_looked_for_only_where_it_points(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"looked for {tmp_path}/int8.yaml; expected a path"):
        load_quantization_config(f"{tmp_path}/int8.yaml")
    with pytest.raises(ConfigError, match="no such quantization file"):
        load_quantization_config(str(tmp_path))


def test_a_file_in_the_working_directory_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(__file__).parents[2] / "configs" / "fp8.yaml", tmp_path / "int8.yaml")
    shipped = load_quantization_config("int8.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_quantization_config("int8.yaml").rules[0].scheme != shipped.rules[0].scheme
