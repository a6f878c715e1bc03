"""The flags of `podquant serve` on which depends what it takes of a slice, for commands that say so beforehand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from podquant.cli.arguments import up_to
from podquant.errors import ConfigError
from podquant.foreign import cut

if TYPE_CHECKING:
    from podquant.app.plan_serving import Served, ServingOptions

FLAGS = (
    "ep_size",
    "kv_cache_dtype",
    "mem_fraction_static",
    "context_length",
    "max_running_requests",
    "chunked_prefill_size",
    "page_size",
)
"""Beside --tp-size; fields of `ServingOptions`."""

_MOST = 2**31 - 1
_MOST_PAGE = 256
_MOST_PREFILL = 1 << 20


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that mean what they mean to `podquant serve`; without one of them the device decides."""
    group = parser.add_argument_group("serving", "as for `podquant serve`; without them, what suits the chips")
    group.add_argument(
        "--ep-size",
        metavar="N",
        type=up_to(_MOST),
        help="share routed experts out among N groups of the --tp-size devices",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "bfloat16", "int8", "fp8"),
        help="what keys and values are kept in (auto: the model's dtype)",
    )
    group.add_argument(
        "--mem-fraction-static",
        metavar="SHARE",
        type=_share,
        help="share of a device's memory for weights and KV cache",
    )
    group.add_argument("--context-length", metavar="N", type=up_to(_MOST), help="tokens of a prompt and its output")
    group.add_argument("--max-running-requests", metavar="N", type=up_to(1 << 16), help="sequences computed at a time")
    group.add_argument(
        "--chunked-prefill-size",
        metavar="N",
        type=_power_up_to(_MOST_PREFILL),
        help="tokens of a step, of sequences that are generating and of prompts, a power of two",
    )
    group.add_argument(
        "--page-size",
        metavar="N",
        type=_power_up_to(_MOST_PAGE),
        help="tokens in a page of the KV cache, a power of two",
    )


def read_serving_flags(arguments: argparse.Namespace) -> ServingOptions:
    """The options of a parsed command line."""
    from podquant.app.plan_serving import ServingOptions

    given = {name: getattr(arguments, name) for name in FLAGS}
    return ServingOptions(tp_size=arguments.tp_size, **given | {"kv_cache_dtype": arguments.kv_cache_dtype or "auto"})


def read_served(arguments: argparse.Namespace) -> Served:
    """The model of a parsed command line, and by which rules it is quantized."""
    from podquant.app.plan_serving import Served

    return Served(
        arguments.model,
        arguments.quantization_config_path,
        revision=arguments.revision,
        download_dir=arguments.download_dir,
        allow_extra_tensors=arguments.allow_extra_tensors,
    )


def refuse_serving_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if one is given where there is no slice to serve on."""
    for name in FLAGS:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for serving on a slice: give --topology as well")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {cut(text)}")
    return value


def _power_up_to(most: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not 2 <= value <= most or value & (value - 1):
            raise argparse.ArgumentTypeError(f"expected a power of two from 2 to {most:,}, got {cut(text)}")
        return value

    return integer
