"""Processes that load a model together find out, before any weight is read, that one of them has other weights."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.errors import CheckpointError, PodquantError, StorageError
from podquant.model.mesh import Exchange
from podquant.weights.agreement import check_same_weights
from podquant.weights.source import WeightSource, open_source
from tests.storage.kinds import KINDS, fine_tune, storage
from tests.weights.quantized_checkpoints import compressed, group, rows, write_pair

LLAMA = Path(__file__).parents[1] / "data" / "goldens" / "llama"


def exchanges(count: int) -> list[Exchange]:
    """Of so many threads of this process."""
    barrier, told = threading.Barrier(count), [b""] * count

    def of(rank: int) -> Exchange:
        def exchange(data: bytes) -> list[bytes]:
            told[rank] = data
            barrier.wait(20)
            heard = list(told)
            barrier.wait(20)
            return heard

        return exchange

    return [of(rank) for rank in range(count)]


def check(sources: list[WeightSource]) -> list[PodquantError | None]:
    """What each process raises."""
    found: list[PodquantError | None] = [None] * len(sources)

    def run(rank: int, exchange: Exchange) -> None:
        try:
            check_same_weights(sources[rank], exchange)
        except PodquantError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(exchanges(len(sources)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for source in sources:
        source.close()
    return found


def open_plain(uri: str) -> WeightSource:
    return open_source(uri)


def open_with_rules(uri: str) -> WeightSource:
    return open_source(uri, load_quantization_config("int8.yaml"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["plain", "with rules", "quantized"])
def test_a_fine_tune_with_equal_headers_is_named(
    kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opened = LLAMA, open_with_rules if form == "with rules" else open_plain
    if form == "quantized":
        model, _ = write_pair(LLAMA, tmp_path, compressed("int-quantized", group_0=group("int")), rows("int"))
    other = fine_tune(model, tmp_path / "other")
    with storage(kind, tmp_path / "stored", monkeypatch) as put:
        one, copy, two = (put(*each) for each in ((model, "one"), (model, "copy"), (other, "two")))
        assert check([opened(one), opened(copy)]) == [None, None]
        found = check([opened(one), opened(copy), opened(two)])
    for error in found:
        assert isinstance(error, CheckpointError)
        assert "process 2 of 3: its weights differ from process 0's (there " in str(error)


def test_other_rules_are_other_weights() -> None:
    found = check([open_plain(str(LLAMA)), open_with_rules(str(LLAMA))])
    assert all("process 1 of 2: its weights differ" in str(error) for error in found)


def test_weights_that_one_cannot_read_are_an_error_of_all(tmp_path: Path) -> None:
    other = fine_tune(LLAMA, tmp_path / "other")
    sources = [open_plain(str(LLAMA)), open_plain(str(other))]
    os.truncate(other / "model.safetensors", 100_000)
    found = check(sources)
    assert all(isinstance(error, StorageError) for error in found)
    assert "process 1 of 2: " in str(found[0])


def test_kinds_of_storage_are_not_mixed_but_for_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tmp_path / "artifact"
    with closing(Checkpoint.open(str(LLAMA))) as checkpoint:
        plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name="model")
        convert(checkpoint, plan, str(artifact), threads=1)
    with storage("gs", tmp_path, monkeypatch) as put:
        found = check([open_plain(str(LLAMA)), open_plain(put(LLAMA, "model"))])
        assert check([open_plain(str(artifact)), open_plain(put(artifact, "artifact"))]) == [None, None]
    expected = (
        "process 1 of 2: its weights cannot be compared with process 0's: they are known there by crc32c, here by "
        "samples, because they lie in different kinds of storage. Give all of them the same model"
    )
    assert [str(error) for error in found] == [expected] * 2


def test_one_process_alone_reads_nothing_for_it() -> None:
    source = open_plain(str(LLAMA))
    source.close()
    check_same_weights(source, lambda data: [data])
