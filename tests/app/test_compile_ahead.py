"""Steps compiled for slices that are not here: what is refused, what aborts, and a small model for one chip."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from podquant.app import compile_ahead
from podquant.app.compile_ahead import Compiled, Served, ServingOptions, compile_report
from podquant.cluster.topology import parse_slice
from podquant.config.scheme import CacheDtype
from podquant.errors import CapacityError, ConfigError, StorageError
from tests.checkpoint.hollow import write_hollow
from tests.engine.shapes import LLAMA_3_70B
from tests.matrix import MATRIX

SMALL = LLAMA_3_70B | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_hollow(tmp_path_factory.mktemp("hollow") / "small", SMALL))


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v4:2x2x1", r"libtpu describes v4 with other devices .* expected a slice of v5e, v5p, v6e, tpu7x"),
        ("v5e:32x32", r"v5e:32x32: libtpu is asked for known slices only: expected one of v5e:1x1, v5e:2x2, "),
        ("v6e:3x3", r"v6e has no slice of that size"),
    ],
)
def test_slices_that_could_abort_the_compiler_are_refused(model: str, topology: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_report(Served(model), topology, ServingOptions())


def test_without_the_compiler_it_says_what_to_install(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"takes libtpu, which is not installed: install podquant\[tpu\]"):
        compile_report(Served(model), "v6e:1x1", ServingOptions())


def test_what_does_not_fit_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    large = str(write_hollow(tmp_path / "70b", LLAMA_3_70B))
    with pytest.raises(CapacityError, match=r"v6e:1x1: a chip lacks .*; it fits on v6e:"):
        compile_report(Served(large, "int8.yaml"), "v6e:1x1", ServingOptions())


def test_a_place_that_cannot_be_written_is_refused(model: str, tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"--out .*file: File exists: choose a directory"):
        compile_report(Served(model), "v6e:1x1", ServingOptions(), str(tmp_path / "file"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("int8", marks=MATRIX)])
def test_a_small_model_is_compiled_counted_and_kept(model: str, tmp_path: Path, dtype: CacheDtype) -> None:
    pytest.importorskip("libtpu")
    told: list[str] = []
    options = ServingOptions(max_running_requests=8, chunked_prefill_size=32, kv_cache_dtype=dtype)
    out = tmp_path / "cache"
    lines = compile_report(Served(model, "int8.yaml"), "v6e:1x1", options, str(out), told.append)
    text = "\n".join(lines)
    assert "compiled for v6e:1x1, not run: --tp-size 1 --ep-size 1, int8, 8 slots" in text
    assert re.search(r"^fits: \S+ \wB of the 33\.54 GB that programs may use; the plan says ", text, re.MULTILINE)
    steps = ["32 tokens, scored", "32 tokens", "16 tokens"]
    assert [line.split(" in ")[0] for line in told] == [f"compiled {step}" for step in steps]
    assert [line for line in lines if line.startswith(tuple(f"{step} " for step in steps))] == lines[3:6]
    # Two key/value heads on the chip: a copy of the cache in a layer would be four times the bytes.
    assert all(1 <= float(re.split("  +", line)[4]) < 1.25 for line in lines[3:6])
    assert len(list(out.iterdir())) == 3
    assert "is not verified" in lines[-1]


@pytest.mark.slow
def test_what_the_compiler_finds_too_large_is_told(model: str) -> None:
    """A cache that leaves nothing of the memory to what a step takes beside it."""
    pytest.importorskip("libtpu")
    options = ServingOptions(
        max_running_requests=64, chunked_prefill_size=16, context_length=1 << 18, mem_fraction_static=1.0
    )
    with pytest.raises(CapacityError, match=r"v6e:1x1: .*: the compiler lacks [\d.]+ [kMG]B of a chip's memory"):
        compile_report(Served(model), "v6e:1x1", options)


@pytest.mark.slow
def test_a_compiler_that_ends_its_process_is_an_error(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--no_such_flag=1")
    with pytest.raises(ConfigError, match=r"v6e:1x1: the compiler .*; choose another slice .*no_such_flag"):
        compile_report(Served(model), "v6e:1x1", ServingOptions())


def test_a_compiler_that_is_killed_is_named_with_its_signal() -> None:
    """v6e:0x0, which the list of slices keeps away from libtpu 0.0.50, ends it so."""
    done = Compiled("decode", 1.0)
    said = compile_ahead._ended(-signal.SIGFPE, parse_slice("v6e:1x1"), [done], "F1129 process_state.cc\n")
    assert said.startswith("v6e:1x1: the compiler was ended by SIGFPE after decode; choose another slice")
    assert said.endswith("It said last: F1129 process_state.cc")
