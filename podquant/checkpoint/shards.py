"""Which safetensors files of a directory make up the checkpoint: its index if there is one, and their numbers.

The headers have the last word on what lies where; an index only says which files count. Reads no header itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice

from podquant.checkpoint.header import Header
from podquant.checkpoint.jsonfile import read_object
from podquant.errors import CheckpointError
from podquant.foreign import cut, shown
from podquant.storage.names import is_plain
from podquant.storage.store import Store

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
"""Ends of names that hold weights."""

_NUMBERED = re.compile(r"(?P<stem>[^/]+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint.

    Attributes:
        files: to read, sorted.
        weight_map: from tensor to file, as the index says; empty without one.
        notes: what of the directory is left out, a sentence each.
    """

    files: tuple[str, ...]
    weight_map: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def check_index(self, where: str, headers: Mapping[str, Header]) -> None:
        """Refuse an index that promises tensors which no file holds.

        Args:
            where: the checkpoint.
            headers: of all `files`.
        """
        held = {name for header in headers.values() for name in header.tensors}
        absent = [name for name in self.weight_map if name not in held]
        if absent:
            raise CheckpointError(
                f"{where}/{INDEX}: places {listed(absent)} in {self.weight_map[absent[0]]}, and neither that nor "
                "another file holds it: the index was made for other files. Fetch the file it was made for, or correct "
                "the index (numbered files, and model.safetensors, are read without one too)."
            )


def find_shards(store: Store, sizes: Mapping[str, int]) -> Shards:
    """The files that make up the checkpoint in `store`, whose files are `sizes`.

    An index says which files count; others of their series (`model-00003-of-00003.safetensors`) count with them, so
    that an index of an earlier save loses none. Without an index it is `model.safetensors`, or one whole series.

    Raises:
        CheckpointError: files are missing, or it is not clear which count.
    """
    if INDEX not in sizes:
        return _without_index(store, sizes)
    where = f"{store.uri}/{INDEX}"
    weight_map = read_object(store, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{where}: expected a weight_map from tensor names to file names.")
    named = set(weight_map.values())
    if outside := sorted(name for name in named if not is_plain(name)):
        raise CheckpointError(
            f"{where}: names {shown(outside[0])}, which is not a name inside the checkpoint. Take the index that came "
            "with the files, or remove it (numbered files, and model.safetensors, are read without one too)."
        )
    missing = sorted(named - sizes.keys())
    if missing:
        raise CheckpointError(f"{where}: names files that are missing: {listed(missing)}. Download them.")
    if SINGLE in sizes and SINGLE not in named:
        raise CheckpointError(f"{store.uri}: holds both {SINGLE} and an index of other files. Remove one of the two.")
    series = {_series(name) for name in named} - {None}
    files = sorted(named | {name for name in sizes if _series(name) in series})
    left_out = [name for name in sizes if name.endswith(".safetensors") and "/" not in name and name not in files]
    notes = (f"{INDEX} does not name {listed(left_out)}: left out",) if left_out else ()
    return Shards(tuple(files), weight_map, notes)


def _without_index(store: Store, sizes: Mapping[str, int]) -> Shards:
    series: dict[tuple[str, int], set[int]] = {}
    for name in sizes:
        if (key := _series(name)) is not None:
            series.setdefault(key, set()).add(_number(name))
    if SINGLE in sizes:
        if others := [name for name in sizes if (key := _series(name)) is not None and key[0] == "model"]:
            raise CheckpointError(
                f"{store.uri}: holds both {SINGLE} and {listed(others)}, and no {INDEX} says which count. Remove those "
                "that do not belong to the checkpoint."
            )
        return Shards((SINGLE,), {})
    if not series:
        raise _no_weights(store, sizes)
    if len(series) > 1:
        series = {key: numbers for key, numbers in series.items() if key[0] == "model"} or series
    if len(series) > 1:
        found = ", ".join(_numbered(*key, min(numbers)) for key, numbers in series.items())
        raise CheckpointError(
            f"{store.uri}: holds numbered files of several saves ({found}), and no {INDEX} says which count. Remove "
            "those that do not belong to the checkpoint."
        )
    ((stem, count), numbers) = next(iter(series.items()))
    if num_missing := count - len(numbers):
        missing = islice((number for number in range(1, count + 1) if number not in numbers), 3)
        named = ", ".join(_numbered(stem, count, number) for number in missing)
        more = f" and {num_missing - 3:,} more" if num_missing > 3 else ""
        raise CheckpointError(f"{store.uri}: of its {count:,} numbered files are missing: {named}{more}. Fetch them.")
    return Shards(tuple(sorted(_numbered(stem, count, number) for number in numbers)), {})


def _series(name: str) -> tuple[str, int] | None:
    """What numbered files of one save have in common; None for other files."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (match["stem"], int(match["count"]))


def _number(name: str) -> int:
    match = _NUMBERED.fullmatch(name)
    assert match is not None, name
    return int(match["number"])


def _numbered(stem: str, count: int, number: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _no_weights(store: Store, sizes: Collection[str]) -> CheckpointError:
    text = f"{store.uri}: expected {SINGLE} or {INDEX}, found neither. "
    if others := [name for name in sizes if name.endswith(".safetensors")]:
        return CheckpointError(text + f"Found {listed(others)}, which is not in Hugging Face's layout.")
    if others := [name for name in sizes if name.endswith(WEIGHTS)]:
        return CheckpointError(
            text + f"Found {listed(others)}, which podquant does not read: save as safetensors first."
        )
    return CheckpointError(text + "Expected the directory of a Hugging Face checkpoint.")


def adapter_note(store: Store, sizes: Collection[str]) -> str | None:
    """What to say of an adapter that lies beside the weights: it is not applied.

    Raises:
        CheckpointError: the adapter is all there is.
    """
    if _ADAPTER not in sizes:
        return None
    base = read_object(store, _ADAPTER).get("base_model_name_or_path")
    of = f" of {cut(base)}" if isinstance(base, str) and base else ""
    if SINGLE not in sizes and INDEX not in sizes and not any(_series(name) for name in sizes):
        raise CheckpointError(
            f"{store.uri}: this is a LoRA adapter{of}: merge it into its base first (peft: "
            "model.merge_and_unload().save_pretrained(DIR)), and give the merged checkpoint"
        )
    return f"{_ADAPTER} is there: the adapter{of} is not applied, only the full weights beside it are read"


def listed(names: Collection[str]) -> str:
    """The first three names, and how many more."""
    text = ", ".join(cut(name, 200) for name in list(names)[:3])
    return text if len(names) <= 3 else f"{text} and {len(names) - 3} more"
