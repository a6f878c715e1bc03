"""Loading over several devices and several processes: the shards are those that cutting the whole weights gives."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.errors import PodquantError
from podquant.model.layout import Model
from podquant.weights.load import load_weights
from tests.benchmarks.convert import make_checkpoint
from tests.matrix import half
from tests.storage.gcs.emulator import GcsEmulator
from tests.weights.load_child import Case, digest, key, load_case, open_case

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
GOLDEN = GOLDENS / "llama"
CHECKPOINTS = {
    "int8.yaml": GOLDEN,
    "fp8_w8a8.yaml": GOLDENS / "qwen1",
    "blocks.yaml": GOLDENS / "phi3",
    "uneven.yaml": GOLDENS / "phi3",
}
"""By the rules that it is loaded with; q, k and v are one tensor in the last three, in phi3 gate and up as well."""

BLOCK_ROWS = {"blocks.yaml": 8, "uneven.yaml": 3}
"""Of 8, they straddle shards of gate and up over 4 and 8 devices; of 3, all shards, and q and k, and gate and up. Of 4
columns, they straddle those of down over 8 devices."""

TP_SIZES = (1, 2, 4, 8)
CUTS_OVER_PROCESSES = (1, 4)
"""Of the artifacts that several processes load; one process loads every cut onto every number of devices."""
MANY_WINDOWS = {"window_bytes": 2048, "gathered_bytes": 2048, "whole_bytes": 100, "ahead_bytes": 8192, "tile_rows": 1}

Places = Mapping[tuple[str, int], str]


@pytest.fixture(scope="session")
def rules_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    directory = tmp_path_factory.mktemp("rules")
    for name, rows in BLOCK_ROWS.items():
        rule = f"{{module_path: '.*', weight_dtype: int8, weight_block_size: [{rows}, 4]}}"
        (directory / name).write_text(f"quantization: {{dense: {{rules: [{rule}]}}}}")
    return lambda name: str(directory / name) if name in BLOCK_ROWS else name


def to_artifact(checkpoint: Path, rules: str, target: Path, tp_size: int) -> str:
    source = Checkpoint.open(str(checkpoint))
    plan = plan_conversion(source, load_quantization_config(rules), source_name="golden", tp_size=tp_size)
    convert(source, plan, str(target), threads=1)
    source.close()
    return str(target)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory, rules_of: Callable[[str], str]) -> Places:
    """By rules and tp size."""
    directory = tmp_path_factory.mktemp("artifacts")
    return {
        (rules, tp): to_artifact(checkpoint, rules_of(rules), directory / f"{rules}-{tp}", tp)
        for rules, checkpoint in CHECKPOINTS.items()
        for tp in TP_SIZES
    }


@cache
def whole_weights(uri: str, rules: str | None, dtype: str) -> list[np.ndarray[Any, Any]]:
    """On one device, in one window each."""
    source, model = open_case(Case(uri, 1, rules, dtype=dtype), jax.devices()[:1])
    arrays = [np.asarray(array) for array in load_weights(model, source)]
    source.close()
    return arrays


def expected_shards(case: Case, uri: str) -> dict[str, str]:
    """What cutting the whole weights of the same model at `uri` (quantized by the case's rules) gives."""
    source, model = open_case(case, jax.devices()[: case.tp])
    source.close()
    shards = {}
    for leaf, sharding, whole in zip(
        model.leaves, model.shardings, whole_weights(uri, case.rules, case.dtype), strict=True
    ):
        full = _laid_out(model, leaf, whole)
        for device, index in sharding.devices_indices_map(leaf.shape).items():
            shards[key(leaf.path, list(model.mesh.devices.flat).index(device))] = digest(full[index])
    return shards


def _laid_out(model: Model, leaf: Any, whole: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """With copies of key/value heads and of scales of shared blocks, and the vocabulary filled up with zeros."""
    if leaf.blocks is not None:
        whole = whole[..., list(leaf.blocks)]
    copies = leaf.copies
    if copies > 1:
        heads = whole.reshape(whole.shape[0], model.config.num_kv_heads, model.config.head_dim, *whole.shape[2:])
        whole = np.repeat(heads, copies, axis=1).reshape(leaf.shape)
    return np.pad(whole, [(0, n - m) for n, m in zip(leaf.shape, whole.shape, strict=True)])


@pytest.mark.parametrize(("rules", "tp"), half(["int8.yaml", "fp8_w8a8.yaml", "blocks.yaml"], TP_SIZES))
def test_any_artifact_and_the_checkpoint_fit_any_mesh(
    artifacts: Places, rules_of: Callable[[str], str], rules: str, tp: int
) -> None:
    limits = {} if rules == "int8.yaml" else MANY_WINDOWS
    expected = expected_shards(Case(artifacts[rules, 1], tp), artifacts[rules, 1])
    cases = [Case(artifacts[rules, cut], tp, limits=limits) for cut in TP_SIZES]
    for case in [*cases, Case(str(CHECKPOINTS[rules]), tp, rules_of(rules), limits)]:
        found = load_case(case, jax.devices()[:tp])
        assert found["shards"] == expected, case
        assert found["seen"] == found["tensors"], case
        assert found["read"] == found["tensors"] + found["others"], case


class Processes:
    """Some processes of `devices_each` devices, started together to load `cases`."""

    def __init__(self, count: int, devices_each: int, cases: list[Case], directory: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file = directory / f"cases-{count}.json"
        file.write_text(json.dumps([asdict(case) for case in cases]))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each} "
            "--xla_cpu_collective_timeout_seconds=60 --xla_backend_optimization_level=0",
        }
        child = Path(__file__).with_name("load_child.py")
        # Files and no pipes: they end together, and one whose pipe is full would keep the others from it.
        self._ends = [(directory / f"out-{count}-{rank}", directory / f"log-{count}-{rank}") for rank in range(count)]
        self._children = []
        for rank, (out, log) in enumerate(self._ends):
            with log.open("w") as stream:
                command = [sys.executable, str(child), str(port), str(count), str(rank), str(file), str(out)]
                self._children.append(subprocess.Popen(command, stdout=stream, stderr=stream, env=environment))

    @cache  # noqa: B019  two of them, for the length of a session
    def results(self) -> list[dict[str, Any]]:
        """What each process says of all cases."""
        for child, (_, log) in zip(self._children, self._ends, strict=True):
            assert child.wait(timeout=200) == 0, log.read_text()[-4000:]
        return [json.loads(out.read_text()) for out, _ in self._ends]

    def close(self) -> None:
        """Leave none behind."""
        for child in self._children:
            child.kill()
            child.wait()


def flip(artifact: str, file: str, at: float, target: Path) -> str:
    """A copy of an artifact with one bit of one file changed."""
    shutil.copytree(artifact, target)
    data = bytearray((target / file).read_bytes())
    data[int(at * len(data))] ^= 1
    (target / file).write_bytes(data)
    return str(target)


def poisoned(target: Path) -> str:
    """The golden with a NaN in the last rows of one weight, which the last process reads."""
    shutil.copytree(GOLDEN, target)
    tensors = load_file(target / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    weight[-1, 3] = np.nan
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": weight}, target / "model.safetensors", {"format": "pt"})
    return str(target)


SHAPES = [
    (2, 2, "int8.yaml"),
    (2, 4, "fp8_w8a8.yaml"),
    (2, 4, "blocks.yaml"),
    (2, 8, "int8.yaml"),
    (2, 8, "blocks.yaml"),
    (4, 4, "int8.yaml"),
    (4, 8, "uneven.yaml"),
]
"""Processes, the devices they load onto together, and rules."""


@pytest.fixture(scope="module")
def loads(artifacts: Places, rules_of: Callable[[str], str]) -> dict[tuple[int, int, str], list[Case]]:
    """By processes, devices and rules."""
    return {
        (count, tp, rules): [
            *(Case(artifacts[rules, cut], tp, limits=MANY_WINDOWS) for cut in CUTS_OVER_PROCESSES),
            *([Case(artifacts[rules, 2], tp)] if count < tp < 8 else []),
            Case(str(CHECKPOINTS[rules]), tp, rules_of(rules), MANY_WINDOWS),
        ]
        for count, tp, rules in SHAPES
    }


@pytest.fixture(scope="module")
def wrong(artifacts: Places, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, str]]:
    """Sources that must be refused, by 2 processes as by one, and the error."""
    directory = tmp_path_factory.mktemp("wrong")
    whole, cut = artifacts["int8.yaml", 1], artifacts["int8.yaml", 2]
    files = [(whole, "model-00001-of-00001.safetensors"), (whole, "quality.json")]
    files += [
        (cut, f"{folder}/model-00001-of-00001.safetensors") for folder in ("tp-00-of-02", "tp-01-of-02", "shared")
    ]
    found = [
        (
            Case(flip(artifact, file, 0.9, directory / str(i)), 4, limits=MANY_WINDOWS),
            rf"ArtifactError: .*: {file}: .*CRC32C",
        )
        for i, (artifact, file) in enumerate(files)
    ]
    nan = Case(poisoned(directory / "nan"), 4, "int8.yaml", MANY_WINDOWS)
    return [*found, (nan, r"NonFiniteWeightError: .*up_proj\.weight: weight row 159, column 3")]


@pytest.fixture(scope="module")
def processes(
    loads: dict[tuple[int, int, str], list[Case]],
    wrong: list[tuple[Case, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[int, Processes]]:
    cases = {n: [c for (count, *_), each in loads.items() if count == n for c in each] for n in (2, 4)}
    cases[2] += [case for case, _ in wrong]
    directory = tmp_path_factory.mktemp("processes")
    started = {n: Processes(n, 8 // n, cases[n], directory) for n in cases}
    yield started
    for each in started.values():
        each.close()


@pytest.mark.parametrize(("count", "tp", "rules"), SHAPES)
def test_several_processes_load_what_one_does_and_read_each_byte_once(
    processes: dict[int, Processes],
    loads: dict[tuple[int, int, str], list[Case]],
    artifacts: Places,
    count: int,
    tp: int,
    rules: str,
) -> None:
    expected = expected_shards(Case(artifacts[rules, 1], tp), artifacts[rules, 1])
    results = processes[count].results()
    for case in loads[count, tp, rules]:
        found = [each[case.name] for each in results]
        assert [each.get("error") for each in found] == [None] * count
        assert {name: shard for each in found for name, shard in each["shards"].items()} == expected, case
        assert all(each["seen"] == each["tensors"] for each in found), case
        again = sum(each["read"] for each in found) - found[0]["tensors"] - found[0]["others"]
        assert again > 0 if rules == "uneven.yaml" else again == 0, case  # both weights read a block in which they meet
        assert min(each["read"] for each in found) > 0.5 * found[0]["tensors"] / count, case


def test_corrupt_files_are_refused_by_every_process(
    processes: dict[int, Processes], wrong: list[tuple[Case, str]]
) -> None:
    for case, message in wrong:
        for each in processes[2].results():
            assert re.search(message, each[case.name]["error"]), (each[case.name]["error"], message)


@pytest.fixture
def bucket(artifacts: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsEmulator]:
    """With an artifact cut in two, and the checkpoint."""
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        for name, directory in (("cut", Path(artifacts["int8.yaml", 2])), ("source", GOLDEN)):
            for path in directory.rglob("*"):
                if path.is_file():
                    emulator.put("b", f"{name}/{path.relative_to(directory)}", path.read_bytes())
        yield emulator


def test_a_bucket_sends_each_byte_of_a_tensor_once(
    artifacts: Places, rules_of: Callable[[str], str], bucket: GcsEmulator
) -> None:
    expected = expected_shards(Case(artifacts["int8.yaml", 1], 4), artifacts["int8.yaml", 1])
    for case in (Case("gs://b/cut", 4), Case("gs://b/source", 4, "int8.yaml")):
        source, _ = open_case(case, jax.devices()[:4])
        source.close()
        opening = sum(record.bytes_out for record in bucket.requests("alt=media"))
        bucket.log.clear()
        found = load_case(case, jax.devices()[:4])
        assert found["shards"] == expected, case
        sent = sum(record.bytes_out for record in bucket.requests("alt=media")) - opening
        assert sent == found["read"] == found["tensors"] + found["others"], case
        bucket.log.clear()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("gs://b/cut", 4), r"ArtifactError: gs://b/cut: .*\.safetensors: .* CRC32C"),
        (Case("gs://b/source", 4, "int8.yaml"), r"StorageError: gs://b/source/model\.safetensors: .* CRC32C"),
    ],
    ids=["artifact", "checkpoint"],
)
def test_what_a_network_corrupts_is_refused(bucket: GcsEmulator, case: Case, message: str) -> None:
    source, model = open_case(case, jax.devices()[:4])
    bucket.fail("corrupt", r"safetensors.*alt=media")
    with pytest.raises(PodquantError) as raised:
        load_weights(model, source)
    source.close()
    assert re.search(message, f"{type(raised.value).__name__}: {raised.value}")


LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
}
"""Of a Llama of 0.7 GB in bfloat16."""


def test_a_host_holds_its_share_and_a_few_windows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", LARGE)
    uri = to_artifact(tmp_path / "checkpoint", "int8.yaml", tmp_path / "artifact", 1)
    size = sum(path.stat().st_size for path in Path(uri).rglob("*") if path.is_file())
    assert size > 300e6
    case = Case(uri, 2)
    processes = Processes(2, 1, [case], tmp_path)
    try:
        results = processes.results()
    finally:
        processes.close()
    assert sum(each[case.name]["read"] for each in results) <= 1.02 * size
    for each in results:
        assert each["max_rss"] <= size / 2 + 600e6


def test_corrupt_files_are_refused_by_one_process(wrong: list[tuple[Case, str]]) -> None:
    for case, message in wrong:
        with pytest.raises(PodquantError) as raised:
            load_case(case, jax.devices()[: case.tp])
        assert re.search(message, f"{type(raised.value).__name__}: {raised.value}")
