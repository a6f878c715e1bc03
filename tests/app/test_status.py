"""How programs end."""

from __future__ import annotations

import ast
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from podquant.app.status import exit_status, job_status
from podquant.errors import ConfigError

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.py"))


def refuse(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [(ConfigError("no such file"), 1, "error: no such file\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_errors(error: BaseException, status: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: refuse(error)) == status
    assert capsys.readouterr() == ("", told)


def test_what_is_not_podquants_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)


def test_values() -> None:
    assert [exit_status(lambda value=value: value) for value in (None, 0, 1)] == [0, 0, 1]  # type: ignore[misc]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_only_parses_and_calls(path: Path) -> None:
    """jobs/ is no package, so that no contract of import-linter covers it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    assert not [node for node in nodes if isinstance(node, ast.Import) and node.names[0].name != "sys"]
    modules = [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not [name for name in modules if not name.startswith(("podquant.app.", "podquant.config.", "__future__"))]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_takes_one_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runpy.run_path(str(path))["run"]
    assert job_status(["jobs/a.py"], run) == job_status(["jobs/a.py", "x", "y"], run) == 2
    assert capsys.readouterr().err == "usage: python jobs/a.py JOB.yaml\n" * 2
    assert job_status(["jobs/a.py", "none.yaml"], run) == 1
    assert "'none.yaml': no such job file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_is_an_exit_status_wherever_it_comes(number: int, status: int) -> None:
    """As while a command's libraries are imported, before it has said how it wants to end."""
    program = (
        "import os, signal, sys, time\nfrom podquant.app.status import exit_status\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell in the background has it ignored
        f"sys.exit(exit_status(lambda: os.kill(os.getpid(), {number}) or time.sleep(60)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False)
