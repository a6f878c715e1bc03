"""The pages of the YAML files: jobs, from their dataclasses, and rules, from the keys that are legal there."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

from podquant.app.options import ServeOptions, flag_kinds
from podquant.config.job import ClusterOptions, ConvertJob, ServeJob
from podquant.config.rules import QUANTIZATION_KEYS, RULE_KEYS, SCHEME_KEYS
from tests.docs.markdown import attributes, page, prose, table


def jobs_page() -> str:
    """docs/reference/jobs.md."""
    return page(
        "Job files",
        prose("""
            What the Ray jobs of `jobs/` read; [run on a pod](../howto/pod.md) shows how. `configs/jobs/` has one of
            each kind to copy. An unknown key, a duplicate key or a value of another type is refused with its line. A
            key without a default is required.
        """),
        "## jobs/convert.py\n",
        _keys(ConvertJob),
        "## jobs/serve.py\n",
        _keys(ServeJob, "flags"),
        "`serve` holds flags of `podquant serve`, see [serve](#serve).\n",
        "## jobs/quantize_and_serve.py\n",
        prose("""
            The keys of `jobs/convert.py`, and `serve`. `tp_size` is the server's too unless `serve` says otherwise.
        """),
        "## cluster\n",
        _keys(ClusterOptions),
        "## serve\n",
        prose("""
            Flags of [`podquant serve`](cli.md#podquant-serve) by their names with `_` for `-`; null is the default.
        """),
        table(["key", "value", "default", "meaning"], _serve_flags()),
    )


def rules_page() -> str:
    """docs/reference/rules.md."""
    return page(
        "Rules files",
        prose("""
            What `--quantization-config-path` reads; [choose rules](../howto/rules.md) has an example. The file has one
            key, `quantization`. An unknown key, a duplicate key or a value of another type is refused with its line.
        """),
        "## quantization\n",
        _documented(QUANTIZATION_KEYS),
        "## quantization.dense.rules\n",
        prose("""
            A list of mappings. A pattern is applied with Python's `re.match` to the module's name in the checkpoint: it
            must match from the start of the name, and need not reach its end. A pattern with a `/` in it is applied to
            the name spelled with slashes (`model/layers/0/mlp`), then with brackets (`model/layers[0]/mlp`).
        """),
        _documented(RULE_KEYS),
        "## quantization.moe\n",
        _documented(SCHEME_KEYS),
    )


def _documented(keys: Mapping[str, str]) -> str:
    return table(["key", "meaning"], [[f"`{name}`", text] for name, text in keys.items()])


def _keys(kind: type, *left_out: str) -> str:
    """The fields of a dataclass that are keys of a file; `name` is the file's own."""
    meanings, hints = attributes(kind.__doc__ or ""), typing.get_type_hints(kind)
    rows = []
    for field in dataclasses.fields(kind):
        if field.name in ("name", *left_out):
            continue
        meaning = meanings.get(field.name, "")
        if hints[field.name] is ClusterOptions:
            meaning = "see [cluster](#cluster)"
        rows.append([f"`{field.name}`", _type(hints[field.name]), _default(field), meaning])
    return table(["key", "value", "default", "meaning"], rows)


_TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}


def _type(hint: Any) -> str:
    if hint is ClusterOptions or typing.get_origin(hint) is Mapping:
        return "mapping"
    return " or ".join(_TYPES[part] for part in typing.get_args(hint) or [hint])


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    if field.default is dataclasses.MISSING:
        return ""
    return "`{}`" if isinstance(field.default, ClusterOptions) else f"`{json.dumps(field.default)}`"


def _serve_flags() -> list[list[str]]:
    options = {field.name: field for field in dataclasses.fields(ServeOptions)}
    rows = []
    for name, kind in flag_kinds().items():
        value = " or ".join(f"`{word}`" for word in kind) if isinstance(kind, tuple) else _TYPES[kind]
        default = options[name].default
        rows.append([f"`{name}`", value, f"`{json.dumps(default)}`", options[name].metadata["help"]])
    return rows
