"""convert, plan, inspect and verify from the command line: what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.cli.main import COMMANDS, main
from tests.checkpoint.tiny import write_tiny

RULES = "--quantization-config-path"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one layer."""
    return write_tiny(tmp_path / "model")


@pytest.fixture
def artifact(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The checkpoint converted."""
    place = tmp_path / "artifact"
    assert main(["convert", str(model), str(place), RULES, "int8.yaml"]) == 0
    capsys.readouterr()
    return place


def test_convert_tells_what_it_did(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "out"), RULES, "int8.yaml", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "model.layers.*.self_attn.q_proj.weight      1" in out
    assert out.splitlines()[-1].startswith(f"{tmp_path}/out: 1.")
    assert err.startswith("converting: 0.0 of 0.0 MB, ")
    assert (tmp_path / "out/podquant.json").exists()


def test_plan_writes_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), RULES, "fp8_w8a8.yaml"]) == 0
    assert "float8_e4m3fn_w8a8" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_inspect_and_verify(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    text = capsys.readouterr().out
    for part in ("written by   podquant ", "source       model,", "int8 weight-only", "CRC32C", "SQNR dB"):
        assert part in text
    assert main(["verify", str(artifact)]) == 0
    assert "every file, header, scale and code" in capsys.readouterr().out


def test_verify_lists_every_problem(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "config.json").unlink()
    (artifact / "quality.json").write_text("{}")
    assert main(["verify", str(artifact)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert [line[: len("error: ")] for line in err.splitlines()] == ["error: "] * 2


def test_a_second_run_into_the_same_place(model: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(model), str(artifact), RULES, "fp8.yaml"]
    assert main(command) == 1
    assert capsys.readouterr().err == (
        f"error: {artifact}: already exists. Choose another place, remove it, or pass --overwrite\n"
    )
    assert main([*command, "--overwrite"]) == 0
    assert json.loads((artifact / "config.json").read_text())["quantization_config"]["format"] == "float-quantized"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{out}", RULES, "int9.yaml"], "'int9.yaml': no such quantization file"),
        (["{out}/none", "{out}", RULES, "int8.yaml"], "none: expected a directory, found nothing"),
        (["none", "{out}", RULES, "int8.yaml"], "none: no such directory, and not a Hugging Face id"),
        (
            ["{model}", "{out}", RULES, "int8.yaml", "--revision", "main"],
            "--revision and --download-dir are for Hugging",
        ),
        (["s3://a/b", "{out}", RULES, "int8.yaml"], "s3://a/b"),
        (["{model}", "s3://a/b", RULES, "int8.yaml"], "s3://a/b"),
    ],
)
def test_an_error_is_one_line_and_status_1(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [argument.format(model=model, out=tmp_path / "out") for argument in arguments]
    assert main(["convert", *filled]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header of model.safetensors, and nothing after it."""

    def damage(model: Path) -> None:
        data = (model / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def cut(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])


def index(model: Path) -> None:
    """An index that names a tensor more than the file holds."""
    names = ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head", "model.none")
    weight_map = {f"{name}.weight": "model.safetensors" for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "It is truncated: copy it again"),
        (
            rewrite(lambda header: header["model.embed_tokens.weight"].update(data_offsets=[128, 384])),
            "overlaps tensor",
        ),
        (rewrite(lambda header: header["lm_head.weight"].update(shape=[16, 9])), "takes 288 bytes, but data_offsets"),
        (rewrite(lambda header: header["lm_head.weight"].update(dtype="F4")), "unknown dtype 'F4'"),
        (rewrite(lambda header: header.pop("lm_head.weight")), "leaves a gap of 256 bytes"),
        (index, "model.safetensors.index.json: places model.none.weight"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    damage(model)
    assert main(["convert", str(model), str(tmp_path / "out"), RULES, "int8.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_strict_rules(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "quantization:\n  dense:\n    rules:\n      - {module_path: 'model.*z_proj', weight_dtype: int8}\n"
    )
    command = ["plan", str(model), RULES, str(rules)]
    assert main(command) == 0
    assert 'warning: rules.yaml:4 "model.*z_proj"' in capsys.readouterr().out
    assert main([*command, "--strict-rules"]) == 1
    assert 'error: rules.yaml:4 "model.*z_proj"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["melt"], "invalid choice: 'melt'"),
        (["verify"], "the following arguments are required: ARTIFACT"),
        (["verify", "x", "--fast"], "unrecognized arguments: --fast"),
        (["convert", "x", "y"], "the following arguments are required: --quantization-config-path"),
        (["plan", "x", "--quantization-config", "y"], "unrecognized arguments: --quantization-config"),
        (["plan", "x", RULES, "y", "--threads", "0"], "argument --threads: expected an integer from 1 to 1,024, got 0"),
    ],
)
def test_wrong_usage_is_status_2(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


DIGITS, LONG = "9" * 5000, "x" * 100_000


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "x", "y", RULES, "int8.yaml", "--tp-size", DIGITS],
        ["convert", "x", "y", RULES, "int8.yaml", "--threads", DIGITS[:4000]],
        ["plan", "x", RULES, "int8.yaml", "--hosts", DIGITS[:4000]],
        ["plan", "x", RULES, "int8.yaml", "--topology", LONG],
        ["plan", "x", RULES, LONG],
        ["plan", LONG, RULES, "int8.yaml"],
        ["serve", "x", "--port", DIGITS],
        ["serve", "x", "--port", DIGITS[:4000]],
        ["serve", "x", "--random-seed", DIGITS[:4000]],
        ["serve", "x", "--drain-seconds", DIGITS[:4000]],
        ["serve", "x", "--dist-init-addr", f"h:{DIGITS[:4000]}"],
        ["serve", "x", "--dtype", LONG],
        ["verify", LONG],
        ["merge", LONG, "y"],
        [LONG],
        ["serve", "x", f"--{LONG}"],
    ],
    ids=lambda command: " ".join(word[:12] for word in command),
)
def test_words_of_absurd_length_are_not_echoed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        assert main(command) == 1
    shown = capsys.readouterr().err
    assert "error: " in shown
    assert max(map(len, shown.split())) <= 420


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert COMMANDS[command][1:] in capsys.readouterr().out


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom podquant.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('numpy', 'numba', 'jax', 'rich', 'huggingface_hub') if name in sys.modules])"
    )
    for command in (["--help"], ["convert", "--help"], ["verify", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(artifact: Path) -> None:
    command = f'set -o pipefail; "{sys.executable}" -m podquant.cli.main inspect "{artifact}" | true; echo $?'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


@pytest.mark.slow
def test_a_terminated_run_leaves_nothing(tmp_path: Path) -> None:
    """A checkpoint large enough to be met at work."""
    place = write_tiny(
        tmp_path / "model",
        {f"{name}.weight": np.zeros((1_000_000, 8), np.float16) for name in ("model.embed_tokens", "lm_head")},
        vocab_size=1_000_000,
    )
    command = [
        sys.executable,
        "-m",
        "podquant.cli.main",
        "convert",
        str(place),
        str(tmp_path / "out"),
        RULES,
        "int8.yaml",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out.partial/*")):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
