"""What `pip install podquant` gets: the package, typed, with the files that it ships, and its version."""

from __future__ import annotations

import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import podquant
from podquant.cli.main import main

ROOT = Path(__file__).parents[1]


def test_the_wheel_is_typed_and_whole(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(path).namelist())
    shipped = {path for path in (ROOT / "podquant").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert "podquant/py.typed" in names
    assert {str(path.relative_to(ROOT)) for path in shipped} <= names
    assert {f"podquant/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")} <= names
    assert not [name for name in names if not name.startswith(("podquant/", "podquant-"))]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert Path(path).name == f"podquant-{declared}-py3-none-any.whl"


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"podquant {podquant.__version__}\n"
    assert podquant.__version__ == version("podquant")
