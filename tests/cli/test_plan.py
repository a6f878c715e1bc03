"""plan from the command line: on hosts, and for architectures that convert refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from podquant.cli.main import main
from podquant.config.job import ClusterOptions
from tests.checkpoint.tiny import write_tiny

RULES = ("--quantization-config-path", "int8.yaml")
THREADS = ClusterOptions().threads_per_worker


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A checkpoint of one layer."""
    return str(write_tiny(tmp_path / "model"))


@pytest.mark.parametrize(
    ("flags", "hosts", "workers"),
    [
        (["--topology", "v5e:4x4"], "4", "4"),
        (["--topology", "v6e-256", "--workers-per-host", "2"], "64", "128"),
        (["--hosts", "3"], "3", "3"),
    ],
)
def test_hosts_are_forecast_with_the_threads_of_hosts(
    model: str, capsys: pytest.CaptureFixture[str], flags: list[str], hosts: str, workers: str
) -> None:
    assert main(["plan", model, *RULES, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["hosts", "workers"])
    assert lines[at + 1].split()[:4] == [hosts, workers, "1", "1/worker"]
    assert any(line.endswith(f"with {THREADS} threads") for line in lines)


def test_one_process_is_forecast_with_its_own_threads(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, *RULES, "--threads", "3"]) == 0
    out = capsys.readouterr().out
    assert "with 3 threads" in out
    assert "workers" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers-per-host", "2"], "--workers-per-host is for many hosts: give --topology or --hosts as well"),
        (["--topology", "v9:4x4"], "accelerator 'v9:4x4': expected a generation"),
    ],
)
def test_what_is_no_cluster_is_one_line(
    model: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["plan", model, *RULES, *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_topology_and_hosts_exclude_each_other(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", model, *RULES, "--topology", "v5e:4x4", "--hosts", "4"])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_model_that_is_not_run_is_refused_but_for_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny(tmp_path / "model", architectures=["UnheardOfForCausalLM"]))
    for command in (["plan", model], ["convert", model, str(tmp_path / "out")]):
        assert main([*command, *RULES]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: {model}/config.json: architecture 'UnheardOfForCausalLM' is not supported; ")
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert main(["plan", model, "--weights-only", *RULES]) == 0
    line = "note: only the weights are converted: whether podquant can serve the model was not looked at"
    assert line in capsys.readouterr().out.splitlines()
    assert main(["convert", model, str(tmp_path / "out"), "--weights-only", *RULES]) == 0
    assert line in capsys.readouterr().err.splitlines()
    assert main(["verify", str(tmp_path / "out")]) == 0
