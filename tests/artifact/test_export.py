"""What `podquant export` writes, read without podquant: the artifact's own codes and scales, laid out otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from podquant.artifact.export import export_artifact
from podquant.artifact.reader import Artifact
from podquant.cli.main import main
from podquant.conversion.run import convert
from podquant.errors import ArtifactError, StorageError, UnsupportedModelError
from tests.storage.gcs.emulator import GcsEmulator
from tests.weights.quantized_checkpoints import Tensors, read_file

BLOCKS = "quantization:\n  weight_block_size: [16, 24]\n  dense:\n    rules: [{module_path: '.*', weight_dtype: %s}]\n"
Make = Callable[..., Path]


@pytest.fixture
def make(source: Any, tmp_path: Path) -> Make:
    """Converts the tiny Llama."""

    def make(rules: str, **options: Any) -> Path:
        checkpoint, plan = source.plan(rules, **options)
        convert(checkpoint, plan, str(tmp_path / "artifact"), threads=1)
        checkpoint.close()
        return tmp_path / "artifact"

    return make


def read(place: Path) -> Tensors:
    index = json.loads((place / "model.safetensors.index.json").read_text())
    files = {file: read_file(place / file) for file in sorted(set(index["weight_map"].values()))}
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    tensors = {name: array for part in files.values() for name, array in part.items()}
    assert sum(array.nbytes for array in tensors.values()) == index["metadata"]["total_size"]
    assert not (place / "podquant.json").exists()
    assert (place / "tokenizer.json").read_text() == '{"a": 1}\n'
    return tensors


def section(place: Path) -> dict[str, Any]:
    config = json.loads((place / "config.json").read_text())
    assert config["model_type"] == "llama"
    return dict(config.get("quantization_config", {}))


def unpacked(tensors: Tensors, module: str) -> Any:
    """The codes, by the arithmetic of the convention."""
    words = tensors[f"{module}.weight_packed"].astype(np.int64) & 0xFFFFFFFF
    codes = np.stack([(words >> (8 * place)) & 0xFF for place in range(4)], axis=-1) - 128
    return codes.reshape(tensors[f"{module}.weight_shape"]).astype(np.int8)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_packed(make: Make, tmp_path: Path, tp_size: int) -> None:
    artifact = make("int8_keep_embedding.yaml", tp_size=tp_size)
    seen: list[int] = []
    export_artifact(str(artifact), str(tmp_path / "out"), form="pack-quantized", on_bytes=seen.append)
    tensors, says = read(tmp_path / "out"), section(tmp_path / "out")
    assert (says["quant_method"], says["format"], says["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    assert [group["format"] for group in says["config_groups"].values()] == ["pack-quantized"]
    opened = Artifact.open(str(artifact))
    for name, entry in opened.tensors.items():
        module = name.removesuffix(".weight")
        if entry.scheme is not None:
            np.testing.assert_array_equal(unpacked(tensors, module), opened.read_tensor(name))
        else:
            assert tensors[name].tobytes() == opened.read_tensor(name).tobytes()
    assert sum(seen) <= sum(file.size for file in opened.manifest.files.values())
    opened.close()


def test_portable(make: Make, tmp_path: Path) -> None:
    artifact = make("int8_w8a8.yaml")
    export_artifact(str(artifact), str(tmp_path / "out"), portable=True)
    tensors, says = read(tmp_path / "out"), section(tmp_path / "out")
    opened = Artifact.open(str(artifact))
    for module in ("model.embed_tokens", "lm_head"):
        codes, scales = (opened.read_tensor(f"{module}.{leaf}") for leaf in ("weight", "weight_scale"))
        assert tensors[f"{module}.weight"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            tensors[f"{module}.weight"], (codes.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
        )
        assert f"{module}.weight_scale" not in tensors
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(tensors[name], opened.read_tensor(name))
    opened.close()
    assert [group["targets"] for group in says["config_groups"].values()] == [["Linear"]]
    assert says["ignore"] == ["lm_head"]


def test_fp8_block(make: Make, tmp_path: Path) -> None:
    artifact = make(BLOCKS % "float8_e4m3fn")
    export_artifact(str(artifact), str(tmp_path / "out"), form="fp8-block")
    tensors = read(tmp_path / "out")
    assert section(tmp_path / "out") == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [16, 24],
        "modules_to_not_convert": ["lm_head"],
    }
    opened = Artifact.open(str(artifact))
    module = "model.layers.1.mlp.up_proj"
    for ours, theirs in (
        (f"{module}.weight", f"{module}.weight"),
        (f"{module}.weight_scale", f"{module}.weight_scale_inv"),
    ):
        assert tensors[theirs].tobytes() == opened.read_tensor(ours).tobytes()
    codes, scales = (opened.read_tensor(f"lm_head.{leaf}") for leaf in ("weight", "weight_scale"))
    wide = scales.repeat(16, axis=0)[:96].repeat(24, axis=1)[:, :32]
    np.testing.assert_array_equal(
        tensors["lm_head.weight"], (codes.astype(np.float32) * wide).astype(ml_dtypes.bfloat16)
    )
    opened.close()


@pytest.mark.parametrize(
    ("rules", "form", "message"),
    [
        ("int8_w8a8.yaml", "pack-quantized", "the artifact holds int8_w8a8: other software loads that as it is"),
        ("fp8.yaml", "pack-quantized", "pack-quantized is for int8 weight-only"),
        ("fp8.yaml", "fp8-block", "fp8-block is for float8_e4m3fn in blocks .* is float8_e4m3fn: convert the original"),
        (BLOCKS % "int8", "fp8-block", r"q_proj is int8\[16,24\]|is int8\[16,24\]"),
    ],
)
def test_schemes_without_a_place_in_the_form_are_refused(
    make: Make, tmp_path: Path, rules: str, form: Any, message: str
) -> None:
    artifact = make(rules)
    with pytest.raises(UnsupportedModelError, match=message):
        export_artifact(str(artifact), str(tmp_path / "out"), form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_found_before_anything_appears(make: Make, tmp_path: Path, file: str) -> None:
    artifact = make("int8.yaml")
    name = sorted(artifact.glob(file.replace("00001", "*")))[-1]
    data = bytearray(name.read_bytes())
    data[-1] ^= 1
    name.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name.name}: expected CRC32C .* the content has changed"):
        export_artifact(str(artifact), str(tmp_path / "out"), portable=True)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(StorageError, match="out"):
        export_artifact(str(make("int8.yaml")), str(tmp_path / "out"), portable=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_bucket_gets_and_gives_the_same_bytes(
    make: Make, tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make("int8.yaml")
    export_artifact(str(artifact), str(tmp_path / "here"), form="pack-quantized", portable=True)
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        checkpoint, plan = source.plan("int8.yaml")
        convert(checkpoint, plan, "gs://b/artifact", threads=1)
        checkpoint.close()
        export_artifact("gs://b/artifact", "gs://b/out", form="pack-quantized", portable=True)
        export_artifact("gs://b/artifact", str(tmp_path / "there"), form="pack-quantized", portable=True)
        export_artifact(str(artifact), "gs://b/again", form="pack-quantized", portable=True)
        files = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
        for folder in ("out", "again"):
            found = {n: data for n, data in bucket_files(emulator).items() if n.startswith(f"{folder}/")}
            assert found == {f"{folder}/{name}": data for name, data in files.items()}


def bucket_files(emulator: GcsEmulator) -> dict[str, bytes]:
    from podquant.storage.store import open_store

    store = open_store("gs://b/")
    files = {name: store.read(name, 1 << 20) for name in store.list()}
    store.close()
    return files


def test_the_command_line(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, out = str(make("int8.yaml")), str(tmp_path / "out")
    assert main(["export", artifact, out]) == 1
    assert "say what is to change, by --format (pack-quantized, fp8-block) or --portable" in capsys.readouterr().err
    assert main(["export", artifact, out, "--format", "pack-quantized", "--portable"]) == 0
    assert f"{out}: " in (text := capsys.readouterr().out)
    assert "compressed-tensors pack-quantized" in text
    assert section(tmp_path / "out")["format"] == "pack-quantized"
