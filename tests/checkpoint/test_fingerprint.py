"""Content decides: other weights under equal headers are told apart, equal copies are not; little is read for it."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.checkpoint import fingerprint as module
from podquant.checkpoint.fingerprint import Fingerprint, content_ids, differs, fingerprint, sampled_ranges
from podquant.checkpoint.index import Checkpoint
from tests.conversion.conftest import write_safetensors
from tests.conversion.header_sets import DEEPSEEK_V3, Shapes, deepseek_shapes, llama_shapes, write_header_set
from tests.storage.kinds import KINDS, fine_tune, storage

LLAMA = Path(__file__).parents[1] / "data" / "goldens" / "llama"
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def found(uri: str | Path) -> Fingerprint:
    with closing(Checkpoint.open(str(uri))) as checkpoint:
        return fingerprint(checkpoint, {})


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tunes_with_equal_headers_differ_and_copies_do_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fine_tune(LLAMA, tmp_path / "other")
    with storage(kind, tmp_path / "stored", monkeypatch) as put:
        one, two, copy = (found(put(*each)) for each in ((LLAMA, "one"), (other, "two"), (LLAMA, "copy")))
    assert one == copy
    assert one.basis == two.basis == {"local": "samples", "gs": "crc32c", "hf": "sha256"}[kind]
    assert one.digest != two.digest


def test_a_copy_on_another_disk_at_another_time_is_the_same(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "copy")
    os.utime(tmp_path / "copy/model.safetensors", (1, 1))
    assert found(tmp_path / "copy") == found(LLAMA)


def test_each_byte_of_a_small_checkpoint_counts(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors: dict[str, Any] = {
        "a": np.zeros(7, np.float32),
        "none": np.zeros(0, np.float32),
        "b": np.ones((3, 5), np.float16),
        "c": np.asarray(3, np.int64),
    }
    write_safetensors(folder / "model.safetensors", tensors)
    data = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    seen = {found(folder).digest}
    for place in range(begin, len(data)):
        (folder / "model.safetensors").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        seen.add(found(folder).digest)
    assert len(seen) == 1 + len(data) - begin


def test_first_middle_and_last_bytes_of_every_tensor_count_in_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkpoint beyond what is sampled, here of 3 × 100 kB with 60 bytes of each."""
    monkeypatch.setattr(module, "SAMPLED_BYTES", 180)
    monkeypatch.setattr(module, "_LEAST_SAMPLE", 20)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {name: np.zeros(100_000, np.int8) for name in "abc"})
    data = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    places = [begin + 100_000 * n + at for n in range(3) for at in (0, 19, 49_990, 50_009, 99_980, 99_999)]
    seen = {found(folder).digest}
    for place in places:
        (folder / "model.safetensors").write_bytes(data[:place] + b"\1" + data[place + 1 :])
        seen.add(found(folder).digest)
    assert len(seen) == 1 + len(places)
    with closing(Checkpoint.open(str(folder))) as checkpoint:
        tensors = list(checkpoint.tensors.values())
    assert [(offset - begin, length) for _, ranges in sampled_ranges(tensors) for offset, length in ranges] == [
        (0, 20),
        (49_990, 20),
        (99_980, 40),
        (149_990, 20),
        (199_980, 40),
        (249_990, 20),
        (299_980, 20),
    ]


@pytest.mark.parametrize(
    ("config", "shapes", "nbytes", "reads"),
    [
        (LLAMA_70B, llama_shapes(LLAMA_70B), 64_000_000, 1_500),
        (DEEPSEEK_V3, deepseek_shapes(DEEPSEEK_V3), 140_000_000, 92_000),
    ],
    ids=["llama-70b", "deepseek-v3"],
)
def test_little_is_read_of_large_models(
    tmp_path: Path, config: dict[str, object], shapes: Shapes, nbytes: int, reads: int
) -> None:
    write_header_set(tmp_path / "model", config, shapes)
    with closing(Checkpoint.open(str(tmp_path / "model"))) as checkpoint:
        tensors = list(checkpoint.tensors.values())
        ranges = [each for _, ranges in sampled_ranges(tensors) for each in ranges]
        if config is LLAMA_70B:
            assert len(content_ids(checkpoint)) == len(checkpoint.files) > 20
    assert sum(length for _, length in ranges) < nbytes
    assert len(ranges) < reads


def test_what_storage_keeps_is_asked_and_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("gs", "hf"):
        with storage(kind, tmp_path, monkeypatch) as put, closing(Checkpoint.open(put(LLAMA, "one"))) as checkpoint:
            monkeypatch.setattr(type(checkpoint.store), "read_into", None)  # would be called, and fail
            assert list(content_ids(checkpoint)) == ["model.safetensors"]


def test_what_cannot_be_compared_is_not_said_to_differ() -> None:
    one = Fingerprint("1" * 64, "crc32c")
    assert differs(one, one) is None
    assert differs(Fingerprint("2" * 64, "crc32c"), one) == (
        "differ from process 0's (there 222222222222, here 111111111111)"
    )
    assert differs(Fingerprint("1" * 64, "samples"), one, "rank 0's") == (
        "cannot be compared with rank 0's: they are known there by samples, here by crc32c, because they lie in "
        "different kinds of storage"
    )
