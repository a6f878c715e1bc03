"""An artifact made by hand: a quantized linear, whole or cut for two ranks, and a few tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from podquant.artifact.manifest import Manifest, ModuleRule, OutputFile, Piece, Source, TensorEntry
from podquant.checkpoint.header import encode_header
from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME
from tests.conversion.conftest import source

__all__ = ["source"]

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[dict[str, bytes]], None]
INT8 = Scheme("int8")
CODES = (np.arange(24, dtype=np.int8) - 12).reshape(6, 4)
SCALES = np.linspace(0.5, 1, 6, dtype=np.float32).reshape(6, 1)
NORM = np.arange(4).astype(ml_dtypes.bfloat16)
STEPS = np.asarray(3, np.int64)
WHOLE: dict[str, Array] = {"a.weight": CODES, "a.weight_scale": SCALES, "norm.weight": NORM, "steps": STEPS}


def file_of(tensors: Mapping[str, Array]) -> bytes:
    """A safetensors file."""
    entries = [(name, BY_NAME[array.dtype.name], array.shape) for name, array in tensors.items()]
    return encode_header(entries, {"format": "pt"}) + b"".join(array.tobytes() for array in tensors.values())


def write_artifact(place: Path, tp_size: int, axis: int, change: Change) -> None:
    """Write it with `a.weight` cut along `axis`; `change` damages the files before sizes and checksums are taken."""
    shared = "model-00001-of-00001.safetensors" if tp_size == 1 else "shared/model.safetensors"
    parts = {shared: dict(WHOLE)}
    pieces: tuple[Piece, ...] = (Piece(shared, None, (0, 0), (6, 4)),)
    if tp_size > 1:
        del parts[shared]["a.weight"]
        cuts = np.split(CODES, tp_size, axis)
        names = [f"tp-{rank:02d}-of-{tp_size:02d}/model.safetensors" for rank in range(tp_size)]
        parts |= {name: {"a.weight": cut} for name, cut in zip(names, cuts, strict=True)}
        pieces = tuple(
            Piece(
                name, rank, tuple(rank * cut.shape[axis] * (at == axis) for at in (0, 1)), (cut.shape[0], cut.shape[1])
            )
            for rank, (name, cut) in enumerate(zip(names, cuts, strict=True))
        )
    tensors = {"a.weight": TensorEntry(BY_NAME["int8"], (6, 4), pieces, INT8, "a.weight_scale")}
    for name, array in list(WHOLE.items())[1:]:
        piece = Piece(shared, None, (0,) * array.ndim, array.shape)
        tensors[name] = TensorEntry(BY_NAME[array.dtype.name], array.shape, (piece,))
    figures = {"sqnr_db": 40.5, "max_error_ratio": 0.1, "zeros_share": 0, "scale_min": 0.5, "scale_max": 1.0}
    files = {name: file_of(part) for name, part in parts.items()}
    files["config.json"] = b'{"model_type": "llama"}'
    files["quality.json"] = json.dumps({"tensors": {"a.weight": figures}}).encode()
    if tp_size == 1:
        files["model.safetensors.index.json"] = json.dumps({"weight_map": dict.fromkeys(WHOLE, shared)}).encode()
    change(files)
    manifest = Manifest(
        "podquant 9.9",
        Source("tiny", {}),
        tp_size,
        {"a": ModuleRule(INT8, "by hand")},
        {name: OutputFile(len(data), int(google_crc32c.value(data))) for name, data in files.items()},
        tensors,
    )
    for name, data in {**files, "podquant.json": manifest.encode()}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Path]:
    """Makes the artifact and tells where it is."""

    def make(tp_size: int = 1, axis: int = 0, change: Change = lambda files: None) -> Path:
        write_artifact(tmp_path / "artifact", tp_size, axis, change)
        return tmp_path / "artifact"

    return make


@pytest.fixture
def whole() -> dict[str, Array]:
    """The tensors of the artifact, put together."""
    return dict(WHOLE)
