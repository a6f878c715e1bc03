"""A Hugging Face checkpoint on disk: which tensors it has, and in which file each lies.

Reads config.json, the index and the headers, never a tensor. Knows nothing of what a model does with its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from podquant.checkpoint.experts import name_experts
from podquant.checkpoint.header import Header, TensorInfo, read_header
from podquant.checkpoint.jsonfile import parse_object
from podquant.errors import CheckpointError
from podquant.storage.publication import refuse_half_replaced
from podquant.storage.runs import Run, Whole
from podquant.storage.store import Store, open_store

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_COPIED = (
    "tokenizer*",
    "tokenization_*",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "processor_config.json",
    "*preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files that mean the same beside quantized weights (`*` does not match a `/` here)."""

_AT_A_TIME = 16  # headers being read: a bucket takes some 50 ms for each
_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
"""Ends of names that hold weights: never copied."""


@dataclass(frozen=True)
class FileInfo:
    """What tells one safetensors file from a changed one.

    Attributes:
        size: in bytes.
        version: as its store tells it apart, `Store.version`.
        header_sha256: of its header, as `Header.sha256`.
        header_crc32c: of the same bytes.
        header_nbytes: how many these are.
    """

    size: int
    version: str
    header_sha256: str
    header_crc32c: int
    header_nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `close()` it when done.

    Attributes:
        store: where its bytes are.
        config: config.json, as it stands there.
        tensors: by name; ordered by file, then by place in the file. Experts that are fused are there one by one.
        files: the safetensors files, by name.
        other_files: names to copy beside quantized weights (tokenizer, chat template, generation config …).
    """

    store: Store
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: dict[str, FileInfo]
    other_files: tuple[str, ...]

    @classmethod
    def open(cls, uri: str) -> Checkpoint:
        """Open the checkpoint in a directory: `model.safetensors`, or the files of `model.safetensors.index.json`.

        Every header is validated, the index against the headers, and the routed experts against config.json. Raises
        `CheckpointError`, `StorageError`, or `UnsupportedModelError` for experts fused in a form that is not read.
        """
        store = open_store(uri)
        try:
            sizes = store.list()
            if _CONFIG not in sizes:
                refuse_half_replaced(store.uri)
                raise CheckpointError(
                    f"{store.uri}: no {_CONFIG}. Expected the directory of a Hugging Face checkpoint."
                )
            config = parse_object(store.read(_CONFIG), f"{store.uri}/{_CONFIG}")
            files, weight_map = _find_files(store, sizes)
            with ThreadPoolExecutor(_AT_A_TIME) as threads:
                headers = dict(zip(files, threads.map(lambda file: read_header(store, file), files), strict=True))
            tensors = _collect(store, headers)
            if weight_map is not None:
                _check_index(f"{store.uri}/{_INDEX}", weight_map, headers)
            tensors = name_experts(tensors, config, store.uri)
        except BaseException:
            store.close()
            raise
        infos = {
            file: FileInfo(header.size, store.version(file), header.sha256, header.crc32c, header.data_offset)
            for file, header in headers.items()
        }
        return cls(store, config, tensors, infos, tuple(name for name in sizes if _is_copied(name)))

    @property
    def wholes(self) -> dict[str, Whole]:
        """The safetensors files of which the storage keeps a checksum, as they should be, and the headers read."""
        known = ((name, info, self.store.known_crc32c(name)) for name, info in self.files.items())
        return {
            name: Whole(info.size, crc32c, Run(name, 0, info.header_nbytes, info.header_crc32c))
            for name, info, crc32c in known
            if crc32c is not None
        }

    def close(self) -> None:
        """Close the store."""
        self.store.close()


def _find_files(store: Store, sizes: Mapping[str, int]) -> tuple[list[str], dict[str, str] | None]:
    """The files to read, sorted, and the index's map from tensor to file if there is an index."""
    if _INDEX not in sizes:
        if _SINGLE not in sizes:
            raise _no_weights(store, sizes)
        return [_SINGLE], None
    where = f"{store.uri}/{_INDEX}"
    weight_map = parse_object(store.read(_INDEX), where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{where}: expected a weight_map from tensor names to file names.")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if file not in sizes]
    if missing:
        raise CheckpointError(f"{where}: names files that are not there: {_listed(missing)}. Download them.")
    if _SINGLE in sizes and _SINGLE not in files:
        raise CheckpointError(f"{store.uri}: holds both {_SINGLE} and an index of other files. Remove one of the two.")
    return files, weight_map


def _no_weights(store: Store, sizes: Mapping[str, int]) -> CheckpointError:
    text = f"{store.uri}: neither {_SINGLE} nor {_INDEX} is there. "
    if others := [name for name in sizes if name.endswith(".safetensors")]:
        return CheckpointError(text + f"Found {_listed(others)}: an adapter, or not in Hugging Face's layout.")
    if others := [name for name in sizes if name.endswith(_WEIGHTS)]:
        return CheckpointError(
            text + f"Found {_listed(others)}, which podquant does not read: save as safetensors first."
        )
    return CheckpointError(text + "Expected the directory of a Hugging Face checkpoint.")


def _collect(store: Store, headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{store.uri}: tensor {name!r} lies in both {tensors[name].file} and {file}. "
                    "The files are not of one checkpoint: download them again."
                )
            tensors[name] = info
    return tensors


def _check_index(where: str, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    absent = [name for name, file in weight_map.items() if name not in headers[file].tensors]
    if absent:
        raise CheckpointError(
            f"{where}: {weight_map[absent[0]]} does not hold the tensor the index places there: {_listed(absent)}. "
            "Index and files are not of the same checkpoint: download both again."
        )
    stray = [name for header in headers.values() for name in header.tensors if name not in weight_map]
    if stray:
        raise CheckpointError(
            f"{where}: the files hold tensors the index does not name: {_listed(stray)}. "
            "Index and files are not of the same checkpoint: download both again."
        )


def _is_copied(name: str) -> bool:
    if name.endswith(_WEIGHTS) or any(part.startswith(".") for part in name.split("/")):
        return False
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _COPIED)


def _listed(names: list[str]) -> str:
    """The first three names, and how many more."""
    text = ", ".join(names[:3])
    return text if len(names) <= 3 else f"{text} and {len(names) - 3} more"
