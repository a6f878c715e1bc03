"""podquant as a library: its examples run, its surface is what it says, and a conversion tells and obeys its caller."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import podquant
from podquant.app.keywords import ConvertKeywords, EngineKeywords, PlanKeywords, SamplingKeywords
from podquant.app.source import SourceOptions
from podquant.config.job import ClusterOptions, ConvertJob
from podquant.engine.options import EngineOptions
from podquant.engine.request import SamplingParams
from podquant.errors import ArtifactExistsError, ConfigError


def examples() -> list[Any]:
    found = []
    for name in ("plan", "convert", "verify", "load", "Engine"):
        tests = doctest.DocTestFinder().find(getattr(podquant, name), name, globs={})
        found += [pytest.param(test, id=test.name) for test in tests if test.examples]
    return found


@pytest.mark.parametrize("example", examples())
def test_examples(
    example: doctest.DocTest, checkpoint: Path, artifact: Path, engine: podquant.Engine, tmp_path: Path
) -> None:
    example.globs = {
        "MODEL": str(checkpoint),
        "ARTIFACT": str(artifact),
        "OUT": str(tmp_path / "out"),
        "engine": engine,
    }
    told: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=told.append).failed == 0, "".join(told)


def test_every_public_function_and_method_has_an_example() -> None:
    with_example = {parameter.id for parameter in examples()}
    functions = {name for name in podquant.__all__ if inspect.isfunction(getattr(podquant, name))}
    methods = {f"Engine.{name}" for name, _ in inspect.getmembers(podquant.Engine, inspect.isfunction)}
    assert functions | {name for name in methods if "._" not in name} - {"Engine.close"} <= with_example


def test_the_surface_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(podquant.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == podquant._HOMES
    assert {*seen, "__version__"} == set(podquant.__all__) <= set(dir(podquant))
    for name in podquant.__all__:
        assert getattr(podquant, name) is not None
    with pytest.raises(AttributeError, match="module 'podquant' has no attribute 'converted'"):
        podquant.converted  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("keywords", "options", "left_out"),
    [
        (PlanKeywords, SourceOptions, {"model", "rules_path", "download_dir"}),
        (ConvertKeywords, ConvertJob, {"source", "target", "quantization_config_path", "cluster", "name"}),
        (EngineKeywords, EngineOptions, {"model_path"}),
        (SamplingKeywords, SamplingParams, set()),
    ],
)
def test_keywords_are_the_fields_of_the_options(keywords: type, options: type, left_out: set[str]) -> None:
    fields = {name: hint for name, hint in get_type_hints(options).items() if name not in left_out}
    assert get_type_hints(keywords) == fields


@pytest.mark.slow
@pytest.mark.slow
def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, podquant; dir(podquant); podquant.__version__; podquant.SamplingParams\n"
        "print([name for name in ('numpy', 'numba', 'jax', 'ray', 'fastapi') if name in sys.modules])\n"
        "podquant.plan; podquant.convert; podquant.verify; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False"]


def test_convert_stays_a_function_whatever_is_imported() -> None:
    import podquant.conversion.run as run

    assert run.__name__ == "podquant.conversion.run"
    assert podquant.convert.__module__ != run.__name__
    assert inspect.isfunction(podquant.convert)


def test_a_conversion_says_how_far_it_is_and_prints_nothing(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    made = podquant.convert(
        checkpoint, tmp_path / "out", "int8.yaml", threads=1, on_progress=lambda done, total: told.append((done, total))
    )
    total = podquant.plan(checkpoint, "int8.yaml").bytes_in
    assert told[-1] == (total, total)
    assert made.quality.keys() == {name for name, tensor in made.manifest.tensors.items() if tensor.scheme}
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ArtifactExistsError):
        podquant.convert(checkpoint, tmp_path / "out", "int8.yaml")


def test_what_progress_raises_ends_a_conversion(checkpoint: Path, tmp_path: Path) -> None:
    def refuse(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        podquant.convert(checkpoint, tmp_path / "out", "int8.yaml", on_progress=refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": ClusterOptions()}, "cluster is for a Ray cluster: give its address as well"),
        ({"address": "auto", "threads": 2}, "threads is for this process: on a cluster"),
    ],
)
def test_options_of_the_other_kind_of_conversion(checkpoint: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        podquant.convert(checkpoint, tmp_path / "out", "int8.yaml", **options)
