"""Tiny checkpoints made with NumPy, and a reader of safetensors that owes nothing to podquant."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import Plan, plan_conversion

Array = np.ndarray[Any, np.dtype[Any]]
DISK = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
}
VOCABULARY, WIDTH, FFN, LAYERS = 96, 32, 80, 2


def tiny_tensors(*, tied: bool = False) -> dict[str, Array]:
    """A Llama of two layers: odd enough sizes, one row of zeros, one row tiny, one huge."""
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int, dtype: Any = ml_dtypes.bfloat16) -> Array:
        return random.standard_normal((rows, columns), np.float32).astype(dtype)

    tensors: dict[str, Array] = {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = matrix(WIDTH, WIDTH)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = matrix(1, WIDTH)[0]
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(FFN, WIDTH, np.float16)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(FFN, WIDTH, np.float32)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(WIDTH, FFN)
        tensors[f"{prefix}.input_layernorm.weight"] = matrix(1, WIDTH)[0]
    tensors["model.norm.weight"] = matrix(1, WIDTH)[0]
    if not tied:
        tensors["lm_head.weight"] = matrix(VOCABULARY, WIDTH)
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0
    tensors["model.layers.0.self_attn.k_proj.weight"][5] *= ml_dtypes.bfloat16(1e-38)
    tensors["model.layers.0.self_attn.v_proj.weight"][7] *= ml_dtypes.bfloat16(1e30)
    tensors["steps"] = np.asarray(7, np.int64)
    tensors["nothing"] = np.empty((0, 4), np.float32)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """The format by hand: length, header, bytes."""
    names = {dtype: name for name, dtype in DISK.items()}
    header, data = {}, b""
    for name, array in tensors.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of a file, by `struct` and NumPy alone."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    tensors, end = {}, 8 + length
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        assert first == end
        end = last
        tensors[name] = np.frombuffer(data[first:last], DISK[entry["dtype"]]).reshape(entry["shape"])
    assert end == len(data)
    return tensors


def read_artifact(directory: Path) -> dict[str, Array]:
    """Every tensor of an artifact, through its index."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = {file: read_safetensors(directory / file) for file in sorted(set(index["weight_map"].values()))}
    assert (
        sum(array.nbytes for tensors in files.values() for array in tensors.values()) == index["metadata"]["total_size"]
    )
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    return {name: array for tensors in files.values() for name, array in tensors.items()}


class Source:
    """A checkpoint directory to damage and to convert."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, tensors: Mapping[str, Array], config: Mapping[str, Any], *, files: int = 2) -> None:
        """Write it whole, over `files` files when more than one."""
        self.path.mkdir(exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(config))
        (self.path / "tokenizer.json").write_text('{"a": 1}\n')
        if files == 1:
            write_safetensors(self.path / "model.safetensors", tensors)
            return
        weight_map: dict[str, str] = {}
        names = list(tensors)
        for number in range(files):
            file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = names[number * len(names) // files : (number + 1) * len(names) // files]
            write_safetensors(self.path / file, {name: tensors[name] for name in part})
            weight_map |= dict.fromkeys(part, file)
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def plan(self, rules: str, **options: Any) -> tuple[Checkpoint, Plan]:
        """Open it and plan; `rules` is a file's name or the text of one."""
        path = rules
        if "\n" in rules:
            path = str(self.path.parent / "rules.yaml")
            Path(path).write_text(rules)
        checkpoint = Checkpoint.open(str(self.path))
        return checkpoint, plan_conversion(
            checkpoint, load_quantization_config(path), source_name=self.path.name, **options
        )


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of the tiny Llama."""
    return {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": False, **changes}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """The tiny Llama in two files."""
    source = Source(tmp_path / "source")
    source.write(tiny_tensors(), tiny_config())
    return source


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Source]:
    """Makes the tiny Llama with tensors added, replaced or (None) left out, and keys of config.json changed."""

    def make(changes: Mapping[str, Array | None] = {}, *, tied: bool = False, files: int = 2, **config: Any) -> Source:
        tensors = {**tiny_tensors(tied=tied), **changes}
        source = Source(tmp_path / "source")
        kept = {name: array for name, array in tensors.items() if array is not None}
        source.write(kept, tiny_config(**{"tie_word_embeddings": tied, **config}), files=files)
        return source

    return make


@pytest.fixture
def tensors() -> dict[str, Array]:
    """The tensors of `source`."""
    return tiny_tensors()


@pytest.fixture
def read() -> Callable[[Path], dict[str, Array]]:
    """Reads every tensor of an artifact without podquant."""
    return read_artifact


@pytest.fixture
def read_file() -> Callable[[Path], dict[str, Array]]:
    """Reads every tensor of one file without podquant."""
    return read_safetensors
