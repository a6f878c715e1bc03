"""A checkpoint whose experts are fused converts to the same bytes, and loads to the same arrays, as one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.families.experts import ExpertNames
from podquant.families.registry import expert_names, read_model_config
from podquant.storage.publication import open_publication
from podquant.weights.source import open_source
from tests.checkpoint.fused import fused_copy
from tests.engine.test_goldens import GOLDENS, load
from tests.storage.gcs.emulator import GcsEmulator
from tests.weights.quantized_checkpoints import read_file, write_file


def test_the_names_of_every_familys_experts_are_known() -> None:
    for path in GOLDENS.glob("*/config.json"):
        config = json.loads(path.read_text())
        assert (expert_names(config) is not None) == (read_model_config(config, ()).moe is not None), path
    mixtral = expert_names({"architectures": ["MixtralForCausalLM"]})
    assert mixtral == ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def one_by_one_copy(golden: Path, fused: Path, place: Path) -> Path:
    """A golden with its tensors in the order in which a fused copy has them."""
    checkpoint, tensors = Checkpoint.open(str(fused)), read_file(golden / "model.safetensors")
    place.mkdir()
    write_file(place / "model.safetensors", {name: tensors[name] for name in checkpoint.tensors})
    (place / "config.json").write_bytes((golden / "config.json").read_bytes())
    checkpoint.close()
    return place


def converted(place: Path, rules: str, tp_size: int) -> dict[str, bytes]:
    """The artifact's files; of its manifest all but what it was made of."""
    checkpoint = Checkpoint.open(str(place))
    target = place.with_name(f"{place.name}-artifact")
    plan = plan_conversion(checkpoint, load_quantization_config(rules), source_name="golden", tp_size=tp_size)
    convert(checkpoint, plan, str(target), threads=2)
    checkpoint.close()
    files = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    manifest = json.loads(files["podquant.json"])
    del manifest["source"]
    return files | {"podquant.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize(("name", "rules", "tp_size"), [("qwen3_moe", "int8.yaml", 1), ("mixtral", "fp8.yaml", 2)])
def test_artifacts_are_the_same(tmp_path: Path, name: str, rules: str, tp_size: int) -> None:
    fused = fused_copy(GOLDENS / name, tmp_path / "fused")
    assert converted(fused, rules, tp_size) == converted(
        one_by_one_copy(GOLDENS / name, fused, tmp_path / "single"), rules, tp_size
    )


@pytest.mark.parametrize(("rules", "tp", "ep"), [(None, 1, 1), ("int8_w8a8.yaml", 2, 2)])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_arrays_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rules: str | None, tp: int, ep: int
) -> None:
    """From a bucket, whose checksums cover all bytes of the fused tensors."""
    config = load_quantization_config(rules) if rules else None
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        with open_publication("gs://b/model") as publication:
            for path in fused_copy(GOLDENS / name, tmp_path / "fused").iterdir():
                publication.write_small(path.name, path.read_bytes())
            publication.publish()
        fused, single = open_source("gs://b/model", config), open_source(str(GOLDENS / name), config)
        assert fused.wholes
        arrays = [load(source, tp, ep)[1] for source in (fused, single)]
        assert fused.store.bytes_read <= fused.num_bytes
        fused.close()
        single.close()
    for one, other in zip(*arrays, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
