"""`quantization_config` of config.json, in the compressed-tensors convention: describes exactly what was done.

Knows nothing of files or arrays. The convention, as transformers and vLLM read it: a module belongs to the group that
has as a target its name, a `re:` pattern that `re.match`es its name, or its class, in that order; `ignore` overrides
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from podquant.artifact.manifest import ModuleRule
from podquant.config.scheme import Scheme
from podquant.families.modules import kind_of

_NUMBER = re.compile(r"\d+")


def quantization_config(modules: Mapping[str, ModuleRule], *, tied: bool) -> dict[str, Any] | None:
    """The section for config.json; None when nothing was quantized.

    Args:
        modules: every module that has a weight matrix, in the order of the checkpoint.
        tied: lm_head shares the embedding's tensor, and so its group, though it is not a module of its own on disk.
    """
    linears: dict[str, Scheme | None] = {}
    ends: dict[str, Scheme | None] = {}
    for name, module in modules.items():
        kind, scheme = kind_of(name), module.scheme
        if kind == "embedding":
            # A lookup has no activations to quantize; only the head that shares its tensor has.
            ends[name] = None if scheme is None else replace(scheme, activation_dtype=None)
            if tied:
                ends["lm_head"] = scheme
        else:
            (ends if kind == "lm_head" else linears)[name] = scheme
    by_scheme = _by_scheme(linears)
    groups = [
        _group(scheme, ["Linear"] if len(by_scheme) == 1 else _targets(members, list(linears)))
        for scheme, members in by_scheme.items()
    ]
    groups += [_group(scheme, members) for scheme, members in _by_scheme(ends).items()]
    if not groups:
        return None
    ignore = _targets([name for name, scheme in linears.items() if scheme is None], list(linears))
    ignore += [name for name, scheme in ends.items() if scheme is None and kind_of(name) == "lm_head"]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def _by_scheme(schemes: Mapping[str, Scheme | None]) -> dict[Scheme, list[str]]:
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            groups.setdefault(scheme, []).append(name)
    return groups


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    is_int = scheme.weight_dtype == "int8"
    weights: dict[str, Any] = {
        "num_bits": 8,
        "type": "int" if is_int else "float",
        "strategy": "channel" if scheme.weight_block_size is None else "block",
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
    }
    if scheme.weight_block_size is not None:
        weights["block_structure"] = list(scheme.weight_block_size)
    activations = None
    if scheme.activation_dtype is not None:
        activations = {
            "num_bits": 8,
            "type": "int" if scheme.activation_dtype == "int8" else "float",
            "strategy": "token",
            "symmetric": True,
            "dynamic": True,
            "group_size": None,
        }
    return {
        "targets": targets,
        "format": "int-quantized" if is_int else "float-quantized",
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }


def _targets(members: Sequence[str], universe: Sequence[str]) -> list[str]:
    """Names and `re:` patterns that match `members` and nothing else of `universe`.

    Modules that differ only in numbers (the layers) become one pattern: with `\\d+` if all of them are members, with
    the numbers listed if some are and only one number differs; otherwise they are named one by one.
    """
    chosen, targets = set(members), []
    for template, names in _by_template(universe).items():
        inside = [name for name in names if name in chosen]
        if len(inside) <= 1:
            targets += inside
        elif len(inside) == len(names):
            targets.append(f"re:^{_pattern(template, r'\d+')}$")
        elif template.count("#") == 1:
            numbers = "|".join(number for name in inside for number in _NUMBER.findall(name))
            targets.append(f"re:^{_pattern(template, f'({numbers})')}$")
        else:
            targets += inside
    return targets


def _by_template(names: Iterable[str]) -> dict[str, list[str]]:
    """The names, grouped by what they are with every number replaced by `#`."""
    templates: dict[str, list[str]] = {}
    for name in names:
        templates.setdefault(_NUMBER.sub("#", name), []).append(name)
    return templates


def _pattern(template: str, number: str) -> str:
    return number.join(re.escape(part) for part in template.split("#"))
