"""What a quantized checkpoint says about itself: `quantization_config` of config.json, read strictly.

Two conventions are understood, as transformers and vLLM read them: compressed-tensors in 8 bits, and float8 in blocks
as DeepSeek publishes it (`quant_method: fp8`). Anything else is refused by name. Knows no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import regex

from podquant.config.scheme import Scheme
from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.modules import kind_of
from podquant.foreign import cut, shown

Layout = Literal["plain", "packed", "inverse"]
Strategy = Literal["tensor", "channel", "block"]

KEYS = ("quantization_config", "compression_config")
"""Of config.json, newer name first."""

_FORMATS: Mapping[str, tuple[Layout, tuple[str, ...]]] = {
    "int-quantized": ("plain", ("int",)),
    "float-quantized": ("plain", ("float",)),
    "naive-quantized": ("plain", ("int", "float")),
    "pack-quantized": ("packed", ("int",)),
}
"""Formats of compressed-tensors → the layout of codes on disk, and the types they may have."""

_DTYPES = {"int": "int8", "float": "float8_e4m3fn"}
_MOST_PATTERN = 4096
"""Characters of a pattern: one of 1,000,000 takes a second to compile."""

_PATTERN_SECONDS = 1.0
"""For a pattern on a name; an honest one takes microseconds."""

_ADVICE = (
    "podquant serves compressed-tensors in 8 bits (int-quantized, float-quantized, pack-quantized) and fp8 in blocks "
    "as they are: convert or serve the original checkpoint instead"
)


@dataclass(frozen=True)
class Stored:
    """How the weight of a module is stored.

    Attributes:
        scheme: what codes and scales mean, and how activations are quantized.
        strategy: whether a scale is for the whole `tensor`, an output `channel` or a `block`.
        layout: `plain`: codes in `X.weight`, scales in `X.weight_scale`. `packed`: codes in `X.weight_packed`, four
            int8 to an int32. `inverse`: as `plain`, with scales in `X.weight_scale_inv` (they are multiplied too).
    """

    scheme: Scheme
    strategy: Strategy
    layout: Layout


class Targets:
    """Modules by their names, by `re:` patterns that match from a name's start, or by class (`Linear`, `Embedding`).

    Patterns are a stranger's, and some would take for ever on a name that they do not match: `regex`, unlike `re`, can
    be stopped.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._names = frozenset(targets)
        self._patterns = [regex.compile(target[3:]) for target in targets if target.startswith("re:")]

    def rank(self, module: str) -> int | None:
        """How specifically they match a module: 0 by name, 1 by a pattern, 2 by class; None: not at all.

        Raises:
            CheckpointError: a pattern takes too long.
        """
        if module in self._names:
            return 0
        if any(_matches(pattern, module) for pattern in self._patterns):
            return 1
        return 2 if ("Embedding" if kind_of(module) == "embedding" else "Linear") in self._names else None


def _matches(pattern: regex.Pattern[str], module: str) -> bool:
    try:
        return pattern.match(module, timeout=_PATTERN_SECONDS) is not None
    except TimeoutError:
        raise CheckpointError(
            f"config.json: the section on quantization: the regular expression {shown(pattern.pattern)} takes longer "
            f"than {_PATTERN_SECONDS:g} s on the name {shown(module)}. Write one without repetitions inside repetitions"
        ) from None


@dataclass(frozen=True)
class Quantization:
    """What the section says.

    Attributes:
        method: its `quant_method`.
        groups: modules that are stored alike, in the section's order.
        ignore: modules that are in no group, whatever the groups say.
        left: names of modules that are not quantized, with everything below them.
    """

    method: str
    groups: tuple[tuple[Targets, Stored], ...]
    ignore: Targets
    left: frozenset[str] = frozenset()

    def stored(self, module: str) -> Stored | None:
        """How a module is stored if it is quantized; None if the section leaves it out.

        A group that names it takes precedence over one with a matching pattern, and that over one with its class.
        """
        parts = module.split(".")
        if self.ignore.rank(module) is not None or any(
            ".".join(parts[:count]) in self.left for count in range(1, len(parts) + 1)
        ):
            return None
        ranked = [
            (rank, number) for number, group in enumerate(self.groups) if (rank := group[0].rank(module)) is not None
        ]
        return self.groups[min(ranked)[1]][1] if ranked else None


def quant_method(config: Mapping[str, Any]) -> str | None:
    """How config.json says the checkpoint is quantized, in words; None if it says nothing."""
    for key in KEYS:
        if section := config.get(key):
            method = section.get("quant_method", "an unnamed method") if isinstance(section, dict) else section
            return f"{key} with quant_method {cut(method) if isinstance(method, str) else shown(method)}"
    return None


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization | None:
    """The section of config.json; None if there is none.

    Args:
        config: config.json.
        where: the file, for messages.

    Raises:
        UnsupportedModelError: it describes something podquant does not serve.
        CheckpointError: it is malformed.
    """
    key = next((key for key in KEYS if config.get(key)), None)
    if key is None:
        return None
    at, section = f"{where}: {key}", config[key]
    if not isinstance(section, dict):
        _malformed(at, "an object", section)
    method = section.get("quant_method", "compressed-tensors" if "config_groups" in section else None)
    if method == "compressed-tensors":
        return _read_compressed_tensors(section, at)
    if method == "fp8":
        return _read_fp8(section, at)
    named = "has no quant_method" if method is None else f"quant_method {shown(method)} is not supported"
    raise UnsupportedModelError(f"{at}: the checkpoint is already quantized, and {named}. {_ADVICE}")


def _read_fp8(section: Mapping[str, Any], at: str) -> Quantization:
    """Blocks of e4m3. Other software quantizes their activations 128 columns at a time; podquant leaves them alone."""
    for key, allowed in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("kv_cache_scheme", None)):
        if section.get(key) not in (None, allowed):
            _refuse(at, f"fp8 with {key}: {shown(section[key])}")
    block = section.get("weight_block_size")
    if block is None:
        _refuse(at, "fp8 without weight_block_size")
    stored = Stored(Scheme("float8_e4m3fn", None, _block(block, f"{at}: weight_block_size")), "block", "inverse")
    left = _names(section.get("modules_to_not_convert"), f"{at}: modules_to_not_convert")
    return Quantization("fp8", ((Targets(["re:"]), stored),), Targets([]), frozenset(left))


def _read_compressed_tensors(section: Mapping[str, Any], at: str) -> Quantization:
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if section.get(key):
            _refuse(at, f"compressed-tensors with {key}")
    sparsity = section.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        _refuse(at, "compressed-tensors with sparsity_config")
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _malformed(f"{at}: config_groups", "an object with groups", groups)
    read = tuple(_read_group(group, section.get("format"), f"{at}: {name}") for name, group in groups.items())
    return Quantization("compressed-tensors", read, Targets(_names(section.get("ignore"), f"{at}: ignore")))


def _read_group(group: Any, default_format: Any, at: str) -> tuple[Targets, Stored]:
    if not isinstance(group, dict):
        _malformed(at, "an object with targets and weights", group)
    targets = _names(group.get("targets"), f"{at}: targets")
    form = group.get("format") or default_format
    if form not in _FORMATS:
        _refuse(at, f"compressed-tensors in the format {shown(form)}")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        _refuse(at, "compressed-tensors without quantized weights")
    layout, types = _FORMATS[form]
    dtype = _dtype(weights, f"{at}: weights")
    if weights.get("type", "int") not in types:
        _malformed(f"{at}: weights: type", f"{' or '.join(types)}, as format {form} has", weights.get("type"))
    if weights.get("dynamic", False) is not False:
        _refuse(f"{at}: weights", f"dynamic: {shown(weights['dynamic'])}")
    strategy, block = _strategy(weights, f"{at}: weights")
    if layout == "packed" and strategy == "block":
        _refuse(at, "pack-quantized in blocks")
    if group.get("output_activations"):
        _refuse(at, "compressed-tensors with output_activations")
    activations = _activations(group.get("input_activations"), block, f"{at}: input_activations")
    return Targets(targets), Stored(Scheme(dtype, activations, block), strategy, layout)


def _strategy(weights: Mapping[str, Any], at: str) -> tuple[Strategy, tuple[int, int] | None]:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    if strategy == "block":
        return "block", _block(weights.get("block_structure"), f"{at}: block_structure")
    if strategy == "tensor":
        return "tensor", None
    if strategy == "channel":
        return "channel", None
    _refuse(at, f"strategy {shown(strategy)}" + (f" with group_size {shown(size)}" if size else ""))


def _activations(section: Any, block: tuple[int, int] | None, at: str) -> str | None:
    """The type activations are quantized to per token.

    With weights in blocks, activations meant to be quantized in groups of a block's columns stay as they are, which is
    more precise.
    """
    if section is None:
        return None
    if not isinstance(section, dict):
        _malformed(at, "an object or null", section)
    dtype = _dtype(section, at)
    if section.get("dynamic", False) is not True:
        _refuse(at, f"static activations (dynamic: {shown(section.get('dynamic', False))})")
    strategy = section.get("strategy")
    if strategy == "group" and block is not None and section.get("group_size") == block[1]:
        return None
    if strategy != "token":
        _refuse(at, f"strategy {shown(strategy)}")
    return dtype


def _dtype(section: Mapping[str, Any], at: str) -> str:
    bits, kind = section.get("num_bits", 8), section.get("type", "int")
    if bits != 8 or kind not in _DTYPES:
        _refuse(at, f"{shown(bits)}-bit {cut(kind) if isinstance(kind, str) else shown(kind)}")
    if section.get("symmetric", True) is not True:
        _refuse(at, "asymmetric codes (symmetric: false)")
    return _DTYPES[kind]


def _block(value: Any, at: str) -> tuple[int, int]:
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", value):
        value = [int(size) for size in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        _malformed(at, "two positive integers", value)
    return value[0], value[1]


def _names(value: Any, at: str) -> tuple[str, ...]:
    """Names and `re:` patterns; null for none."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(name, str) for name in value):
        _malformed(at, "a list of names", value)
    for name in value:
        if name.startswith("re:"):
            try:
                if len(name) > _MOST_PATTERN:
                    raise ValueError(f"it has {len(name):,} characters, at most {_MOST_PATTERN:,} are accepted")
                regex.compile(name[3:])
            except (regex.error, RecursionError, OverflowError, ValueError) as error:
                raise CheckpointError(f"{at}: {shown(name)} is not a regular expression: {error}. Correct it") from None
    return tuple(value)


def _refuse(at: str, what: str) -> NoReturn:
    raise UnsupportedModelError(f"{at}: the checkpoint is already quantized: {what} is not supported. {_ADVICE}")


def _malformed(at: str, expected: str, found: Any) -> NoReturn:
    raise CheckpointError(
        f"{at}: expected {expected}, got {shown(found)}. Correct config.json, or use the one that the tool wrote"
    )
