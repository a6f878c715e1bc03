"""Whole conversions, judged by a reader that owes nothing to podquant and by the equations of the specification."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from podquant.artifact.reader import Artifact
from podquant.artifact.verify import verify_artifact
from podquant.conversion.run import convert
from podquant.errors import (
    ArtifactExistsError,
    CheckpointError,
    NonFiniteWeightError,
    StorageError,
)

Array = np.ndarray[Any, np.dtype[Any]]
Read = Callable[[Path], dict[str, Array]]

BLOCKS = """
quantization:
  dense:
    rules:
      - module_path: '.*(embed_tokens|lm_head)'
        weight_dtype: null
      - module_path: '.*mlp'
        weight_dtype: float8_e4m3fn
        weight_block_size: [32, 24]
      - module_path: '.*'
        weight_dtype: int8
        activation_dtype: int8
        weight_block_size: [16, 128]
"""


def expected_scales(weight: Array, qmax: float, block: tuple[int, int]) -> Array:
    """The scales as QUANTIZATION.md §2 defines them, one block at a time."""
    rows, columns = weight.shape
    scales = np.empty((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    for b in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            part = weight[b * block[0] : (b + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            absmax = np.abs(part).max()
            scale = np.float32(absmax) / np.float32(qmax)
            scales[b, c] = 1 if absmax == 0 else max(scale, np.finfo(np.float32).smallest_normal)
    return scales


def assert_quantized(weight: Array, codes: Array, scales: Array, block: tuple[int, int] | None) -> None:
    weight = weight.astype(np.float32)
    qmax = 127.0 if codes.dtype == np.int8 else 448.0
    size = block or (1, weight.shape[1])
    np.testing.assert_array_equal(scales, expected_scales(weight, qmax, size))
    spread = scales.repeat(size[0], 0)[: len(weight)].repeat(size[1], 1)[:, : weight.shape[1]]
    ratio = np.clip(weight / spread, -np.float32(qmax), np.float32(qmax))
    expected = np.rint(ratio).astype(np.int8) if qmax == 127 else ratio.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(
    ("rules", "blocks"),
    [
        ("int8.yaml", {}),
        ("fp8_w8a8.yaml", {}),
        ("int8_keep_embedding.yaml", {}),
        (BLOCKS, {"mlp": (32, 24), "self_attn": (16, 128)}),
    ],
)
def test_an_independent_reader_recovers_every_tensor(
    source: Any, tensors: dict[str, Array], read: Read, tmp_path: Path, rules: str, blocks: dict[str, Any]
) -> None:
    checkpoint, plan = source.plan(rules, unit_bytes=20_000)
    convert(checkpoint, plan, str(tmp_path / "out"), threads=2, window_bytes=1000)
    found = read(tmp_path / "out")
    num_quantized = 0
    for name, weight in tensors.items():
        scales = found.pop(f"{name}_scale", None)
        codes = found.pop(name)
        if scales is None:
            assert codes.dtype == weight.dtype
            assert codes.shape == weight.shape
            assert codes.tobytes() == weight.tobytes()
        else:
            block = next((size for part, size in blocks.items() if part in name), None)
            assert_quantized(weight, codes, scales, block)
            num_quantized += 1
    assert not found
    assert num_quantized == 14 + (0 if "keep" in rules or blocks else 2)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b'{"a": 1}\n'
    assert verify_artifact(str(tmp_path / "out")) == []
    quality = json.loads((tmp_path / "out/quality.json").read_text())["tensors"]
    assert len(quality) == num_quantized
    assert all(figures["sqnr_db"] > 28 for figures in quality.values())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rules", ["int8.yaml", BLOCKS])
def test_equal_inputs_give_equal_bytes(source: Any, tmp_path: Path, rules: str) -> None:
    """Whatever the windows, the number of workers and the places."""
    results = []
    for number, (threads, window_bytes) in enumerate([(1, 1), (1, 1 << 24), (2, 700), (7, 2000)]):
        place = tmp_path / f"place-{number}" / "out"
        checkpoint, plan = source.plan(rules, unit_bytes=15_000)
        convert(checkpoint, plan, str(place), threads=threads, window_bytes=window_bytes)
        results.append(contents(place))
    assert len(results[0]) > 6
    assert all(result == results[0] for result in results)
    assert not any(str(tmp_path).encode() in data for data in results[0].values())


def test_progress_counts_every_source_byte(source: Any, tmp_path: Path) -> None:
    checkpoint, plan = source.plan("int8.yaml")
    counts: list[int] = []
    convert(checkpoint, plan, str(tmp_path / "out"), threads=2, window_bytes=512, on_progress=counts.append)
    assert sum(counts) == plan.bytes_in
    assert len(counts) > 50


def test_a_redundant_tied_head_is_left_out(
    make_source: Callable[..., Any], tensors: dict[str, Array], read: Read, tmp_path: Path
) -> None:
    source = make_source({"lm_head.weight": tensors["model.embed_tokens.weight"]}, tie_word_embeddings=True, files=1)
    checkpoint, plan = source.plan("int8.yaml")
    convert(checkpoint, plan, str(tmp_path / "out"), threads=2, window_bytes=100)
    found = read(tmp_path / "out")
    assert "lm_head.weight" not in found
    assert "model.embed_tokens.weight_scale" in found
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_1"]["targets"] == ["model.embed_tokens", "lm_head"]


def assert_nothing_left(tmp_path: Path) -> None:
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "rules.yaml") == ["source"]


def test_a_tied_head_that_differs_is_refused(
    make_source: Callable[..., Any], tensors: dict[str, Array], tmp_path: Path
) -> None:
    head = tensors["model.embed_tokens.weight"].copy()
    head[70, 3] += 1
    checkpoint, plan = make_source({"lm_head.weight": head}, tie_word_embeddings=True).plan("int8.yaml")
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight to model.embed_tokens.weight, .* from row 70 on"):
        convert(checkpoint, plan, str(tmp_path / "out"), threads=1, window_bytes=640)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(
    make_source: Callable[..., Any], tensors: dict[str, Array], tmp_path: Path, value: float
) -> None:
    """The first in the order of the source, though a later one may be met earlier."""
    changes = {}
    for name, row in (("model.layers.0.mlp.down_proj.weight", 29), ("model.layers.1.self_attn.q_proj.weight", 0)):
        changes[name] = tensors[name].copy()
        changes[name][row, 5] = value
    checkpoint, plan = make_source(changes).plan("int8.yaml")
    with pytest.raises(NonFiniteWeightError) as caught:
        convert(checkpoint, plan, str(tmp_path / "out"), threads=4, window_bytes=160)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/source/model-00001-of-00002.safetensors: model.layers.0.mlp.down_proj.weight: ")
    assert "row 29, column 5" in text
    assert_nothing_left(tmp_path)


def test_a_source_cut_short_meanwhile_is_an_error(source: Any, tmp_path: Path) -> None:
    checkpoint, plan = source.plan("int8.yaml")
    file = source.path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(StorageError, match=r"model-00002-of-00002.safetensors: changed while it was converted"):
        convert(checkpoint, plan, str(tmp_path / "out"), threads=2)
    assert_nothing_left(tmp_path)


def test_a_place_that_is_taken_is_left_alone(source: Any, tmp_path: Path) -> None:
    checkpoint, plan = source.plan("int8.yaml")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    for overwrite, message in ((False, "out: already exists"), (True, "out: exists and holds no podquant.json")):
        with pytest.raises(ArtifactExistsError, match=message):
            convert(checkpoint, plan, str(tmp_path / "out"), threads=1, overwrite=overwrite)
    assert contents(tmp_path / "out") == {"mine": b"precious"}


def test_overwrite_replaces_an_artifact_only_at_the_end(
    source: Any, make_source: Callable[..., Any], tensors: dict[str, Array], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    checkpoint, plan = source.plan("int8.yaml")
    convert(checkpoint, plan, str(out), threads=1)
    before = contents(out)
    bad = tensors["lm_head.weight"].copy()
    bad[0, 0] = np.nan
    checkpoint, plan = make_source({"lm_head.weight": bad}).plan("int8.yaml")
    with pytest.raises(NonFiniteWeightError):
        convert(checkpoint, plan, str(out), threads=1, overwrite=True)
    assert contents(out) == before
    checkpoint, plan = make_source().plan("fp8.yaml")
    convert(checkpoint, plan, str(out), threads=1, overwrite=True)
    assert Artifact.open(str(out)).tensors["lm_head.weight"].dtype.name == "float8_e4m3fn"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_overwrite_keeps_what_is_not_the_artifacts(source: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    checkpoint, plan = source.plan("int8.yaml")
    convert(checkpoint, plan, str(out), threads=1)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(ArtifactExistsError, match=r"out: holds files that are no part of the artifact: notes\.txt\. "):
        convert(checkpoint, plan, str(out), threads=1, overwrite=True)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["out.partial", "out.replaced", "out.receipts"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_keep_beside_the_target_is_left_alone(
    source: Any, tmp_path: Path, name: str, overwrite: bool
) -> None:
    checkpoint, plan = source.plan("int8.yaml")
    if overwrite:
        convert(checkpoint, plan, str(tmp_path / "out"), threads=1)
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("precious")
    with pytest.raises(StorageError, match=rf"{name}: podquant needs this name"):
        convert(checkpoint, plan, str(tmp_path / "out"), threads=1, overwrite=overwrite)
    assert contents(tmp_path / name) == {"mine": b"precious"}


def test_two_runs_into_one_place(source: Any, tmp_path: Path) -> None:
    checkpoint, plan = source.plan("int8.yaml")
    refused: list[str] = []

    def second(count: int) -> None:
        if not refused:
            with pytest.raises(StorageError) as caught:
                convert(checkpoint, plan, str(tmp_path / "out"), threads=1)
            refused.append(str(caught.value))

    convert(checkpoint, plan, str(tmp_path / "out"), threads=1, on_progress=second)
    assert "is writing there" in refused[0]
    assert verify_artifact(str(tmp_path / "out")) == []


def test_memory_does_not_follow_the_size_of_a_tensor(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """A tensor of 128 MB in windows of 1 MB. Its statistics, 60 bytes a row, are kept until its end."""
    source = make_source({"model.embed_tokens.weight": np.ones((32_000, 2000), np.float16)}, files=1)
    watched: list[int] = []

    def resident(count: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        watched.append(pages * 4096)

    checkpoint, plan = source.plan("int8.yaml")
    convert(checkpoint, plan, str(tmp_path / "first"), threads=2, window_bytes=1 << 20)  # compiles the kernels
    convert(checkpoint, plan, str(tmp_path / "out"), threads=2, window_bytes=1 << 20, on_progress=resident)
    assert len(watched) > 100
    assert max(watched) - min(watched) < 24 << 20


def test_an_interrupt_leaves_nothing(source: Any, tmp_path: Path) -> None:
    checkpoint, plan = source.plan("int8.yaml")

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, plan, str(tmp_path / "out"), threads=3, window_bytes=512, on_progress=interrupt)
    assert_nothing_left(tmp_path)
    assert threading.active_count() == before


def test_codes_that_are_nan_are_found_by_verify(source: Any, tmp_path: Path) -> None:
    """Corrupted, with its checksum put right: only the value tells."""
    checkpoint, plan = source.plan("fp8.yaml")
    convert(checkpoint, plan, str(tmp_path / "out"), threads=1)
    file = tmp_path / "out" / plan.units[0].file
    data = bytearray(file.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 5 * 32] = 0xFF  # row 5 of the first tensor
    file.write_bytes(data)
    manifest = tmp_path / "out/podquant.json"
    document = json.loads(manifest.read_text())
    document["files"][file.name]["crc32c"] = f"{google_crc32c.value(bytes(data)):08x}"
    manifest.write_text(json.dumps(document))
    assert verify_artifact(str(tmp_path / "out")) == [
        f"{tmp_path}/out: model.embed_tokens.weight: row 5 holds NaN, which no code may be"
    ]
