"""What was compiled before is found: in a directory, and over a bucket on another host."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from podquant.engine.compile_cache import NOWHERE, open_cache
from podquant.engine.compiled import Programs
from podquant.engine.programs import Bucket
from podquant.families.registry import read_model_config
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from tests.storage.gcs.emulator import GcsEmulator

LLAMA = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "llama" / "config.json").read_text())
PLACE = "gs://b/programs"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cache but that of the test, and JAX as it was afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled() -> int:
    """Programs that are compiled where an engine needs one."""
    model = Model(read_model_config(LLAMA, ()), lambda module: None, Numerics("float32", "cpu"), make_mesh("cpu", 1))
    programs = Programs(model, CacheShape(3, 16, 2, 256), [2, 4], 1)
    programs.compile([Bucket(2)])
    return programs.num_compiled


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    open_cache(None)
    assert compiled() == 1
    assert list((tmp_path / "user" / "podquant" / "programs").glob("*-cache"))
    jax.clear_caches()
    assert compiled() == 0


def test_a_directory_that_jax_was_configured_with_is_left_to_it(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert open_cache(None).directory is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_another_host_finds_what_a_bucket_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        cache = open_cache(PLACE)
        assert compiled() == 1
        cache.publish()
        assert emulator.data("b")
        sent = len(emulator.requests("^(POST|PUT)"))
        cache.publish()
        assert len(emulator.requests("^(POST|PUT)")) == sent  # once
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another host"))
        jax.clear_caches()
        open_cache(PLACE)
        assert compiled() == 0


def test_without_a_place_to_write_there_is_a_warning_and_no_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert open_cache(str(tmp_path / "file" / "below")).directory is None
    assert "the next start compiles again" in caplog.text
    assert compiled() == 1


def test_a_bucket_out_of_reach_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with GcsEmulator("b") as emulator, caplog.at_level(logging.WARNING):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        cache = open_cache("gs://none/programs")
        assert "no compiled programs from gs://none/programs" in caplog.text
        assert compiled() == 1
        cache.publish()
        assert "compiled programs are not kept in gs://none/programs" in caplog.text


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    open_cache(NOWHERE)
    assert compiled() == 1
    assert not (tmp_path / "user").exists()
