"""What the documentation says can be done: its commands parse or run, its files load, its links lead somewhere."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.dashboard.modules.job import cli as ray_jobs

import podquant
from podquant.app.options import API_KEY_VARIABLE, SECRET_VARIABLE, flag_kinds
from podquant.app.serve import engine_options, group_options
from podquant.cli.main import COMMANDS, main
from podquant.cli.options import read_options
from podquant.cluster.topology import parse_slice
from podquant.config.job import load_convert_job, load_quantize_and_serve_job, load_serve_job
from podquant.config.rules import load_quantization_config
from podquant.families.registry import FAMILIES
from podquant.server.app import create_app
from tests.docs.commands import parser_of
from tests.docs.generate import REFERENCE
from tests.docs.pages import PAGES, ROOT, Block, anchors, blocks, prose, statements

BLOCKS = [block for path in PAGES for block in blocks(path)]
JOBS: Mapping[str, Callable[[str], object]] = {
    "jobs/convert.py": load_convert_job,
    "jobs/serve.py": lambda path: load_serve_job(path, flag_kinds()),
    "jobs/quantize_and_serve.py": lambda path: load_quantize_and_serve_job(path, flag_kinds()),
}
OTHER_SOFTWARE = {"gcloud", "kubectl", "docker", "sed"}
"""Commands of infra/README.md that only a cloud can answer; tests/infra/ compares what they name with the manifests."""


def of(language: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language == language]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What the placeholders of the documentation stand for: a checkpoint, and artifacts of it in several forms."""
    root = tmp_path_factory.mktemp("places")
    model = ROOT / "tests" / "data" / "goldens" / "llama"
    block = root / "block.yaml"
    rule = "weight_dtype: float8_e4m3fn, weight_block_size: [128, 128]"
    block.write_text(f"quantization: {{dense: {{rules: [{{module_path: '.*layers.*', {rule}}}]}}}}")
    made = {"MODEL": model, "OUT": root / "int8", "sliced": root / "sliced", "fp8-block": root / "block"}
    for name, more in {
        "OUT": ["int8.yaml"],
        "sliced": ["int8.yaml", "--tp-size", "8"],
        "fp8-block": [str(block)],
    }.items():
        assert main(["convert", str(model), str(made[name]), "--quantization-config-path", *more]) == 0
    return made


@pytest.mark.parametrize("block", of("sh"))
def test_commands(block: Block, places: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    copied: dict[str, str] = {}
    for words in statements(block.text):
        if words[:2] == ["cp", words[1]] and len(words) == 3:
            assert (ROOT / words[1]).is_file(), words
            copied[words[2]] = words[1]
        else:
            _check(words, copied, places, tmp_path, is_infra=block.path.parent.name == "infra")


def _check(
    words: list[str], copied: Mapping[str, str], places: Mapping[str, Path], scratch: Path, is_infra: bool
) -> None:
    """One command; an assertion or an error says what is wrong with it."""
    match words:
        case ["podquant", *arguments]:
            _podquant(arguments, places, scratch)
        case ["python3", "-m", "pip", "install", *_]:
            pass
        case ["python3", "-m", "uv", "run", "--no-group", group, *rest]:
            assert group in tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
            _check(rest, copied, places, scratch, is_infra)
        case ["python3", "-m", "uv", "run", *rest]:
            _check(rest, copied, places, scratch, is_infra)
        case ["pytest", *arguments] | ["python", "-m", "pytest", *arguments]:
            assert all((ROOT / path).exists() for path in arguments if path.startswith("tests"))
        case ["ruff" | "mypy" | "lint-imports" | "deptry" as tool, *_]:
            assert tool in (ROOT / ".ci" / "run").read_text()
        case ["python", "-m", module, *arguments]:
            _script(ROOT / f"{module.replace('.', '/')}.py", arguments)
        case ["python" | "bash", script, *arguments]:
            _script(ROOT / script, arguments)
        case ["curl", *arguments]:
            _curl(arguments)
        case ["ray", "job", "submit", *arguments]:
            _submitted(arguments, copied)
        case ["ray", "job", "logs", *arguments]:
            ray_jobs.logs.make_context("logs", arguments)
        case ["export", *settings]:
            names = {setting.partition("=")[0] for setting in settings}
            assert is_infra or names <= {API_KEY_VARIABLE, SECRET_VARIABLE}
        case [command, *_]:
            assert is_infra, f"{shlex.join(words)}: nothing here checks {command}"
            assert command in OTHER_SOFTWARE or "=" in command or command == "ray", command


def _podquant(arguments: list[str], places: Mapping[str, Path], scratch: Path) -> None:
    """Parse a command with its own parser, and run it if it is one that ends soon."""
    command, *rest = arguments
    source = "sliced" if command == "merge" else "fp8-block" if "fp8-block" in rest else "OUT"
    meant = {"MODEL": places["MODEL"], "OUT": places[source]}
    if command == "convert":
        meant["OUT"] = scratch / f"out-{len(list(scratch.iterdir()))}"
    for name in ("WHOLE", "DIR"):
        meant[name] = scratch / f"{name}-{len(list(scratch.iterdir()))}"
    words = [str(meant.get(word, word)) for word in rest]
    parsed = parser_of(command).parse_args(words)
    if command == "serve":
        options = read_options(parsed)
        group_options(options, "a secret of the documentation" if options.nnodes > 1 else "")
        assert engine_options(options).tp_size
    elif getattr(parsed, "address", None):
        parse_slice(parsed.accelerator)
    elif command == "compile":  # takes minutes; tests/app/test_compile_ahead.py does it
        parse_slice(parsed.topology)
    elif command != "demo":
        assert main([command, *words]) == 0


def _script(path: Path, arguments: Sequence[str]) -> None:
    text = path.read_text(encoding="utf-8")
    for flag in arguments:
        assert not flag.startswith("--") or f'"{flag}"' in text, f"{path} has no {flag}"


def _curl(arguments: list[str]) -> None:
    """Send it to an app whose model is still loading: what is well formed is answered, or 503, and never 4xx."""
    url = httpx.URL(next(word for word in arguments if word.startswith("http")))
    options = dict(pairwise(arguments))
    body = options.get("-d")

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(None))
        async with httpx.AsyncClient(transport=transport, base_url="http://podquant") as client:
            headers = dict(value.split(": ") for flag, value in pairwise(arguments) if flag == "-H")
            return await client.request("GET" if body is None else "POST", url.path, content=body, headers=headers)

    response = asyncio.run(send())
    assert response.status_code in (200, 503), response.text
    if body is not None:
        assert json.loads(body)


def _submitted(arguments: list[str], copied: Mapping[str, str]) -> None:
    """Ray takes the flags, and the job takes the file that was copied for it."""
    context = ray_jobs.submit.make_context("submit", list(arguments))
    python, script, file = context.params["entrypoint"]
    script = script.removeprefix("~/podquant-src/")
    assert python == "python"
    assert (ROOT / script).is_file()
    if copied:
        JOBS[script](str(ROOT / copied[file]))


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(block.text, encoding="utf-8")
    kind = re.search(r"(?m)^# (jobs/\w+\.py)$", block.text)
    if kind:
        JOBS[kind[1]](str(path))
    else:
        assert load_quantization_config(str(path)).rules


@pytest.mark.parametrize("block", of("python"))
def test_python(block: Block) -> None:
    """It compiles, what it imports is there, and what it calls takes the arguments it gives."""
    known: dict[str, Any] = {"engine": podquant.Engine}
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert hasattr(known[node.value.id], node.attr), ast.unparse(node)
        if isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            called = getattr(known.get(owner), name, None) if owner else known.get(name)
            if podquant.__name__ in getattr(called, "__module__", ""):
                assert {keyword.arg for keyword in node.keywords} <= _keywords(called), ast.unparse(node)


def _keywords(called: Any) -> set[str]:
    """What a class or function takes by name."""
    if dataclasses.is_dataclass(called):
        return {field.name for field in dataclasses.fields(called)}
    names = set(inspect.signature(called).parameters)
    unpacked = [hint for hint in typing.get_type_hints(called).values() if typing.get_origin(hint) is typing.Unpack]
    return names.union(*(typing.get_type_hints(typing.get_args(hint)[0]) for hint in unpacked))


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "yaml", "python", "text"}
    for block in BLOCKS:
        if block.language == "text" and block.path.parent != REFERENCE:
            assert not re.search(r"(?m)^(\$ )?(podquant|python3?|ray|curl) ", block.text), block


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "podquant/artifact/FORMAT.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, fragment = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), target
        assert not fragment or fragment in anchors(to), target


def test_every_page_is_linked() -> None:
    linked = {
        (path.parent / target.partition("#")[0]).resolve()
        for path in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path))
    }
    assert {path for path in PAGES if path != ROOT / "README.md"} <= linked


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_flags_in_prose(path: Path) -> None:
    text = prose(path)
    for name in re.findall(r"`((?:podquant|tests|jobs|configs|infra|docs)/[\w./*-]*)`", text):
        assert list(ROOT.glob(name.rstrip("/"))), name
    flags = {flag for command in COMMANDS for action in parser_of(command)._actions for flag in action.option_strings}
    for code in re.findall(r"`([^`\n]*--[^`\n]*)`", text):
        if code.startswith(("--", "podquant ")):
            assert set(re.findall(r"--[a-z][a-z-]*", code)) <= flags | {"--version", "--spot"}, code


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_tree_of_files(name: str) -> None:
    (tree,) = (block.text for block in BLOCKS if block.path == ROOT / name and block.text.startswith("podquant/"))
    rooms = set(re.findall(r"(?m)^  ([\w.]+)/? ", tree))
    top = set(re.findall(r"(?m)^(\w+)/", tree))
    package = ROOT / "podquant"
    there = {path.name for path in package.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"}
    assert rooms == there - {"__init__.py", "launch_server.py"}
    assert top == {path.name for path in ROOT.iterdir() if path.is_dir() and re.match(r"[a-z]", path.name)} - {"shared"}


def test_the_table_of_what_runs_is_what_runs() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+(?:ForCausalLM|LMHeadModel))`", table)) == FAMILIES.keys()


def test_the_table_of_rules_is_what_ships() -> None:
    text = (ROOT / "docs/howto/rules.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^\| `(\w+\.yaml)` \|", text)) == {
        path.name for path in (ROOT / "configs").glob("*.yaml")
    }


def test_nothing_names_a_place_of_one_machine() -> None:
    for path in PAGES:
        assert not re.search(r"(?<![\w.~])/(?:work|home|root|tmp|Users)/", path.read_text(encoding="utf-8")), path
