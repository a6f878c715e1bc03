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
        (["--kv-cache-dtype", "int8"], "--kv-cache-dtype is for serving on a slice: give --topology as well"),
        (["--hosts", "2", "--ep-size", "2"], "--ep-size is for serving on a slice: give --topology as well"),
    ],
)
def test_what_is_no_cluster_is_one_line(
    model: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["plan", model, *RULES, *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_serving_is_planned_beside_the_conversion(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--topology", "v6e:2x2", "--tp-size", "2", "--max-running-requests", "3")
    assert main(["plan", model, *RULES, *flags]) == 0
    conversion, serving = capsys.readouterr().out.split("\n\nserving ")
    assert "reads " in conversion
    assert "v6e:2x2, 4 chips on 1 host: --tp-size 2 --dp-size 2" in serving
    assert "of 3 sequences at a time" in serving
    assert "default: --page-size 128" in serving


def test_serving_is_planned_alone_for_what_is_not_converted(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--topology", "all"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["slice", "chips"]
    assert main(["plan", model, *RULES, "--topology", "all"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["slice", "chips"]
    assert main(["plan", model]) == 1
    assert capsys.readouterr().err.startswith("error: nothing to plan: give --quantization-config-path to convert, ")


def test_a_conversion_is_planned_where_the_model_cannot_be_served(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", model, *RULES, "--topology", "v6e:1x1", "--mem-fraction-static", "1e-9"]) == 1
    told = capsys.readouterr()
    assert "reads " in told.out
    assert told.err.startswith("error: v6e:1x1: a chip lacks ")


@pytest.mark.parametrize(
    ("flag", "value"), [("--page-size", "100"), ("--mem-fraction-static", "0"), ("--ep-size", "0")]
)
def test_values_that_serve_would_refuse_are_refused(
    model: str, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", model, "--topology", "v6e:1x1", flag, value])
    assert caught.value.code == 2
    assert f"argument {flag}: expected" in capsys.readouterr().err


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
