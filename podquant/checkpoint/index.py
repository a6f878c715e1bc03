"""A Hugging Face checkpoint on disk: which tensors it has, and which file each is in.

Reads config.json, the index and the headers, never a tensor. Knows nothing of what a model does with its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from podquant.checkpoint.companions import companions
from podquant.checkpoint.experts import name_experts
from podquant.checkpoint.header import Header, TensorInfo, read_header
from podquant.checkpoint.jsonfile import read_object
from podquant.checkpoint.shards import INDEX, adapter_note, find_shards
from podquant.checkpoint.undeclared import declared_config
from podquant.checkpoint.versions import Versions, refuse_changed
from podquant.checkpoint.wrappers import unwrapped
from podquant.errors import CheckpointError
from podquant.storage.publication import refuse_half_replaced
from podquant.storage.runs import Run, Whole
from podquant.storage.store import Store, open_store

_CONFIG = "config.json"

_AT_A_TIME = 16  # headers being read: a bucket takes some 50 ms for each


@dataclass(frozen=True)
class FileInfo:
    """What tells a safetensors file from another one.

    Attributes:
        size: in bytes.
        header_sha256: of its header, as `Header.sha256`.
        header_crc32c: of the same bytes.
        header_nbytes: how many these are.
    """

    size: int
    header_sha256: str
    header_crc32c: int
    header_nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `close()` it when done.

    Attributes:
        store: where its bytes are.
        config: config.json, less a section on quantization that no weight bears out.
        tensors: by name; ordered by file, then by place in the file. Experts that are fused are there one by one.
        files: the safetensors files, by name.
        versions: of config.json, the index and the safetensors files, as they were read.
        other_files: names to copy beside quantized weights (tokenizer, chat template, generation config …).
        notes: what a user should know of how the directory was read, a sentence each.
    """

    store: Store
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: dict[str, FileInfo]
    versions: Versions
    other_files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, uri: str) -> Checkpoint:
        """Open the checkpoint in a directory, see `find_shards`.

        Every header is validated, the index against the headers, and the routed experts against config.json. Raises
        `CheckpointError`, `StorageError`, or `UnsupportedModelError` for experts fused in a form that is not read.
        """
        store = open_store(uri)
        try:
            sizes = store.list()
            adapter = adapter_note(store, sizes)
            if _CONFIG not in sizes:
                refuse_half_replaced(store.uri)
                raise CheckpointError(
                    f"{store.uri}: no {_CONFIG}. Expected the directory of a Hugging Face checkpoint."
                )
            versions = {name: store.version(name) for name in (_CONFIG, INDEX) if name in sizes}
            config = read_object(store, _CONFIG)
            shards = find_shards(store, sizes)
            versions |= {name: store.version(name) for name in shards.files}
            with ThreadPoolExecutor(_AT_A_TIME) as threads:
                found = threads.map(lambda file: read_header(store, file), shards.files)
                headers = dict(zip(shards.files, found, strict=True))
            tensors = _collect(store, headers)
            shards.check_index(store.uri, headers)
            tensors, wrapped = _unwrapped(tensors)
            config, notes = declared_config(config, tensors, store.uri)
            tensors = name_experts(tensors, config, store.uri)
            refuse_changed(store, versions, "while it was opened. Let nothing write to it, and start again")
        except BaseException:
            store.close()
            raise
        infos = {
            file: FileInfo(header.size, header.sha256, header.crc32c, header.data_offset)
            for file, header in headers.items()
        }
        notes += (*wrapped, *shards.notes, *(() if adapter is None else (adapter,)))
        return cls(store, config, tensors, infos, versions, companions(store, sizes), notes)

    @property
    def wholes(self) -> dict[str, Whole]:
        """The safetensors files whose checksums the storage keeps, as they should be, with the headers read of them."""
        known = ((name, info, self.store.known_crc32c(name)) for name, info in self.files.items())
        return {
            name: Whole(info.size, crc32c, Run(name, 0, info.header_nbytes, info.header_crc32c))
            for name, info, crc32c in known
            if crc32c is not None
        }

    def close(self) -> None:
        """Close the store."""
        self.store.close()


def _unwrapped(tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors under their own names, where training wrappers have changed them, and what to say of it."""
    names = unwrapped(tensors)
    if not names:
        return tensors, ()
    first = next(name for name in names if names[name] != name)
    note = f"names are taken without those of training wrappers: {first} is read as {names[first]}"
    return {names[name]: replace(info, name=names[name]) for name, info in tensors.items()}, (note,)


def _collect(store: Store, headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{store.uri}: tensor {name!r} is in both {tensors[name].file} and {file}. They are from two "
                    "saves: remove the one that does not belong to the checkpoint."
                )
            tensors[name] = info
    return tensors
