"""One fault, one message: plan, convert, the Ray job and serve refuse a checkpoint in the same words."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.cli.main import main
from podquant.engine.options import EngineOptions
from podquant.engine.start import open_model
from podquant.errors import PodquantError
from tests.checkpoint.tiny import CONFIG, tiny_tensors, write_tiny

RULES = "int8.yaml"
LAYER = "model.layers.0"
WHOLE = tiny_tensors(CONFIG)
JOBS = Path(__file__).parents[2] / "jobs"

DAMAGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "norm missing": ({f"{LAYER}.input_layernorm.weight": None}, {}, rf"{LAYER}\.input_layernorm\.weight is missing"),
    "layer missing": ({}, {"num_hidden_layers": 2}, r"layers\.1\..* is missing"),
    "bias missing": ({}, {"attention_bias": True}, r"_proj\.bias is missing"),
    "vocabulary off by a row": ({}, {"vocab_size": 17}, r"expected shape \[17, 8\] from config\.json, got \[16, 8\]"),
    "zero elements": (
        {f"{LAYER}.mlp.up_proj.weight": np.zeros((0, 8), np.float16)},
        {},
        r"up_proj\.weight: expected shape \[16, 8\] from config\.json, got \[0, 8\]",
    ),
    "longrope": (
        {},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "longrope",
    ),
    "activation": ({}, {"hidden_act": "relu"}, "hidden_act"),
    "architecture": ({}, {"architectures": ["UnheardOfForCausalLM"]}, "architecture 'UnheardOfForCausalLM'"),
    "no architecture": ({}, {"architectures": None}, "`architectures` must be a list"),
    "dtype": ({}, {"dtype": "int4"}, "dtype 'int4' is not supported"),
    "head missing": ({"lm_head.weight": None}, {}, r"lm_head\.weight is missing"),
    "a layer too many": (
        {name.replace("layers.0", "layers.1"): each for name, each in WHOLE.items() if "layers.0" in name},
        {},
        r"holds tensors that no weight of a LlamaForCausalLM with 1 layers is in: model\.layers\.1\.",
    ),
    "unmerged LoRA": (
        {
            f"{LAYER}.self_attn.q_proj.lora_A.default.weight": np.ones((2, 8), np.float16),
            f"{LAYER}.self_attn.q_proj.lora_B.default.weight": np.ones((8, 2), np.float16),
        },
        {},
        r"an adapter that is not merged: .*lora_A\.default\.weight \[2, 8\]",
    ),
    "an unknown tensor": ({"extra.weight": np.ones((2, 2), np.float16)}, {}, r"extra\.weight \[2, 2\]\. Is config"),
    "integers": ({"model.norm.weight": np.ones(8, np.int32)}, {}, r"model\.norm\.weight: expected bfloat16"),
    "norm of another size": ({"model.norm.weight": np.ones(9, np.float16)}, {}, r"expected shape \[8\] .* got \[9\]"),
    "heads do not divide": ({}, {"num_key_value_heads": 3}, "no multiple of 3 key/value heads"),
    "undeclared codes": (
        {f"{LAYER}.mlp.up_proj.weight": np.ones((16, 8), np.int8)},
        {},
        "quantized by an unknown tool",
    ),
}


def told(run: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that fails says."""
    assert run() == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


def run_job(name: str) -> int:
    """Runs an entry point of jobs/ as Ray does, in this process."""
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")
    return int(caught.value.code or 0)


@pytest.mark.parametrize("case", list(DAMAGED))
def test_four_doors_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    tensors, config, message = DAMAGED[case]
    model, out = write_tiny(tmp_path / "model", tensors, **config), tmp_path / "out"
    rules = ["--quantization-config-path", RULES]
    (tmp_path / "job.yaml").write_text(f"source: {model}\ntarget: {out}\nquantization_config_path: {RULES}\n")
    monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / "job.yaml")])
    plan = told(lambda: main(["plan", str(model), *rules]), capsys)
    convert = told(lambda: main(["convert", str(model), str(out), *rules]), capsys)
    job = told(lambda: run_job("convert"), capsys)
    with pytest.raises(PodquantError) as caught:
        open_model(EngineOptions(str(model), quantization_config_path=RULES, device="cpu"))
    assert {plan, convert, job, str(caught.value)} == {plan}
    assert re.search(message, plan), plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml", "model"]


def test_slices_that_no_server_has_as_shards_are_written_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An artifact is served at any size, however it is cut; only a server is refused."""
    model, out = write_tiny(tmp_path / "model"), tmp_path / "out"
    assert main(["convert", str(model), str(out), "--quantization-config-path", RULES, "--tp-size", "3"]) == 0
    err = capsys.readouterr().err
    with pytest.raises(PodquantError) as caught:
        open_model(EngineOptions(str(out), device="cpu", tp_size=3))
    assert f"note: {caught.value}. The slices are written all the same" in err
    open_model(EngineOptions(str(out), device="cpu", tp_size=2)).source.close()


def test_what_may_be_beside_the_weights_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = np.ones((2, 2), np.float16)
    beside: dict[str, Any] = {
        "visual.blocks.0.attn.qkv.weight": small,
        "model.layers.1.eh_proj.weight": small,
        f"{LAYER}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        f"{LAYER}.self_attn.k_scale": np.ones((), np.float32),
    }
    model = write_tiny(tmp_path / "model", beside)
    assert main(["plan", str(model), "--quantization-config-path", RULES]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "note: visual is not used: the model is served as text" in lines
    assert "note: model.layers.1 is left out: podquant runs no layers that predict further tokens" in lines


def test_extra_tensors_are_taken_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = write_tiny(tmp_path / "model", {"extra.weight": np.ones((2, 2), np.float16)}), tmp_path / "out"
    command = ["convert", str(model), str(out), "--quantization-config-path", RULES, "--allow-extra-tensors"]
    assert main(command) == 0
    assert "note: extra.weight is not used: no weight of the model is in it" in capsys.readouterr().err
    open_model(EngineOptions(str(out), device="cpu")).source.close()
    open_model(EngineOptions(str(model), device="cpu", allow_extra_tensors=True)).source.close()


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "_orig_mod.module.", "module._orig_mod."]
)
def test_names_of_training_wrappers_are_stripped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefix: str
) -> None:
    plain = write_tiny(tmp_path / "plain")
    wrapped = {**dict.fromkeys(WHOLE), **{prefix + name: each for name, each in WHOLE.items()}}
    model = write_tiny(tmp_path / "model", wrapped)
    for source, out in ((plain, "a"), (model, "b")):
        assert main(["convert", str(source), str(tmp_path / out), "--quantization-config-path", RULES]) == 0
    assert f"note: names are taken without those of training wrappers: {prefix}" in capsys.readouterr().err
    for name in ("model-00001-of-00001.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_modules_compiled_one_by_one_are_stripped(tmp_path: Path) -> None:
    wrapped = {**dict.fromkeys(WHOLE), **{n.replace("layers.0.", "layers.0._orig_mod."): e for n, e in WHOLE.items()}}
    open_model(EngineOptions(str(write_tiny(tmp_path / "model", wrapped)), device="cpu")).source.close()


def test_modules_that_others_fuse_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny(tmp_path / "model")
    (tmp_path / "rules.yaml").write_text(
        "quantization:\n  dense:\n    rules:\n"
        "      - {module_path: '.*q_proj', weight_dtype: null}\n      - {module_path: '.*', weight_dtype: int8}\n"
    )
    assert main(["plan", str(model), "--quantization-config-path", str(tmp_path / "rules.yaml")]) == 0
    line = "note: q_proj, k_proj, v_proj of model.layers.0.self_attn (and perhaps others) are quantized differently"
    assert any(each.startswith(line) for each in capsys.readouterr().out.splitlines())


def test_what_is_not_finite_is_refused_though_it_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norm = np.ones(8, np.float16)
    norm[3] = np.inf
    model, out = write_tiny(tmp_path / "model", {"model.norm.weight": norm}), tmp_path / "out"
    command = ["convert", str(model), str(out), "--quantization-config-path", RULES]
    message = told(lambda: main(command), capsys)
    assert re.search(
        r"model\.safetensors: model\.norm\.weight: row 3, column 0: expected a finite number, got inf", message
    )
    assert not list(tmp_path.glob("out*"))
    assert main([*command, "--allow-nonfinite"]) == 0


def test_float64_is_converted(tmp_path: Path) -> None:
    wide = {name: each.astype(np.float64) for name, each in WHOLE.items()}
    rules = ["--quantization-config-path", RULES]
    assert (
        main(["convert", str(write_tiny(tmp_path / "wide", wide, dtype="float64")), str(tmp_path / "a"), *rules]) == 0
    )
    single = {name: each.astype(np.float32) for name, each in wide.items()}
    assert main(["convert", str(write_tiny(tmp_path / "single", single)), str(tmp_path / "b"), *rules]) == 0
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert main(["verify", str(tmp_path / "a")]) == 0
    open_model(EngineOptions(str(tmp_path / "a"), device="cpu")).source.close()
    shutil.rmtree(tmp_path / "b")
