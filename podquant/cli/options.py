"""The flags of `podquant serve`: one for each field of `ServeOptions`, with its help and its default."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from podquant.app.options import ServeOptions, option_kinds, option_name
from podquant.config.job import FlagType
from podquant.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `ServeOptions`, and the model as a positional argument too."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="the same as --model-path")
    kinds = option_kinds()
    for option in dataclasses.fields(ServeOptions):
        parser.add_argument(option_name(option.name), **_argument(option, kinds[option.name]))


def read_options(arguments: argparse.Namespace) -> ServeOptions:
    """The options of a parsed command line. Raises ConfigError."""
    values = {option.name: getattr(arguments, option.name) for option in dataclasses.fields(ServeOptions)}
    if arguments.model is not None:
        if values["model_path"] not in ("", arguments.model):
            raise ConfigError(
                f"two models: {arguments.model!r} and --model-path {values['model_path']!r}; one server serves one: "
                "leave one out"
            )
        values["model_path"] = arguments.model
    return ServeOptions(**values)


def _argument(option: dataclasses.Field[Any], kind: FlagType) -> dict[str, Any]:
    """argparse's view of a field."""
    argument: dict[str, Any] = {"default": option.default, "help": option.metadata["help"]}
    if option.default not in (None, "", False) and kind is not bool:
        argument["help"] += " (%(default)s)"
    if kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
    if isinstance(kind, tuple):
        return argument | {"choices": kind}
    return argument | {"type": kind, "metavar": option.metadata["metavar"]}
