"""What `podquant serve` is told, declared once: each field is a flag, its help and its check.

`ServeOptions` is a frozen dataclass; `add_options` turns its fields into flags, `read_options` turns parsed flags into
it. The flags are those of SGLang's `launch_server`, with the meaning its users know.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from podquant.errors import ConfigError

if TYPE_CHECKING:
    from podquant.runtime.options import EngineOptions


def _flag(help: str, default: Any = None, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The flags of `podquant serve`, documented by their help. Raises ConfigError for what cannot be."""

    model_path: str = _flag(
        "an artifact or a checkpoint: a local directory, or a Hugging Face id (org/name)", "", "MODEL"
    )
    quantization_config_path: str | None = _flag(
        "quantize a checkpoint by these rules while loading it: a path, or the name of a file that podquant ships, "
        "such as int8.yaml; an artifact is quantized already",
        metavar="YAML",
    )
    revision: str | None = _flag("branch, tag or commit of a Hugging Face id")
    download_dir: str | None = _flag("where to keep what is downloaded (Hugging Face's cache)", metavar="DIR")
    trust_remote_code: bool = _flag(
        "accepted for the sake of existing command lines; podquant never runs code from a checkpoint", False
    )
    dtype: Literal["auto", "bfloat16", "float32"] = _flag(
        "of activations and of weights that are not quantized; auto: as the checkpoint, and bfloat16 for float16",
        "auto",
    )
    skip_tokenizer_init: bool = _flag("serve token ids only, for checkpoints without a tokenizer", False)

    host: str = _flag("address to listen on; 0.0.0.0 for all, which wants an --api-key", "127.0.0.1")
    port: int = _flag("port to listen on; 0 takes a free one", 30000)
    api_key: str | None = _flag("what callers must send as `Authorization: Bearer KEY`")
    served_model_name: str | None = _flag("what callers call the model (default: as --model-path)", metavar="NAME")
    enable_metrics: bool = _flag("serve GET /metrics for Prometheus", True)
    log_level: Literal["debug", "info", "warning", "error"] = _flag(
        "what to log to stderr; debug logs every request", "info"
    )
    drain_seconds: float = _flag("how long requests on the way may go on after SIGTERM or Ctrl-C", 30.0, "SECONDS")

    device: Literal["tpu", "cpu", "cuda"] | None = _flag(
        "what to run on (default: a TPU if there is one, then CUDA, then CPU)"
    )
    tp_size: int = _flag("devices to cut the model over", 1, "N")
    nnodes: int = _flag("hosts to serve on; only 1 in this version", 1, "N")
    node_rank: int = _flag("which of the hosts this is, from 0", 0, "RANK")
    dist_init_addr: str | None = _flag("HOST:PORT where the hosts meet; not used with one host", metavar="HOST:PORT")
    mem_fraction_static: float = _flag("share of a device's memory for weights and KV cache", 0.85, "SHARE")

    context_length: int | None = _flag(
        "tokens of a prompt and its output (default: what the model was trained for)", metavar="N"
    )
    max_running_requests: int = _flag("sequences computed at a time", 8, "N")
    max_queued_requests: int = _flag("sequences that may wait for that; one more is refused with 429", 1024, "N")
    max_total_tokens: int | None = _flag(
        "tokens the KV cache holds (default: what the memory has room for)", metavar="N"
    )
    max_prefill_tokens: int = _flag("bounds --chunked-prefill-size", 16384, "N")
    chunked_prefill_size: int = _flag(
        "prompt tokens of one step, a power of two: larger is faster, smaller disturbs others less", 256, "N"
    )
    page_size: int = _flag("tokens of a page of the KV cache, a power of two", 64, "N")
    max_logprobs: int = _flag("log-probabilities of most likely tokens a request may ask for at a position", 20, "N")
    disable_radix_cache: bool = _flag("keep no prefixes for later requests; this version never does", False)
    random_seed: int = _flag("from which requests without a seed draw theirs", 0, "SEED")
    skip_server_warmup: bool = _flag("compile each shape at its first use instead of before the first request", False)

    def __post_init__(self) -> None:
        self._require(bool(self.model_path), "model_path", "a model", "name an artifact or a checkpoint")
        self._require(0 <= self.port < 65536, "port", "0 to 65535", "choose a port of TCP's")
        self._require(self.drain_seconds >= 0, "drain_seconds", "0 or more", "0 ends requests at once")
        self._require(0 < self.mem_fraction_static <= 1, "mem_fraction_static", "above 0 and up to 1", "0.85 is usual")
        self._require(self.max_logprobs >= 0, "max_logprobs", "0 or more", "0 gives only the chosen tokens'")
        self._require(self.nnodes == 1, "nnodes", "1", "serving on several hosts is not part of this version")
        self._require(self.node_rank == 0, "node_rank", "0, as --nnodes is 1", "start one process")
        self._require(self.api_key != "", "api_key", "at least one character", "leave it out to serve anybody")
        for name in ("tp_size", "max_running_requests", "max_queued_requests", "max_prefill_tokens"):
            self._require(getattr(self, name) >= 1, name, "1 or more", "the default will do")
        for name in ("chunked_prefill_size", "page_size"):
            value = getattr(self, name)
            self._require(value >= 2 and value & (value - 1) == 0, name, "a power of two from 2", "the default will do")
        for name in ("context_length", "max_total_tokens"):
            self._require((getattr(self, name) or 1) >= 1, name, "1 or more", "leave it out for the default")
        if self.dist_init_addr is not None:
            host, _, port = self.dist_init_addr.rpartition(":")
            self._require(bool(host) and port.isdecimal(), "dist_init_addr", "HOST:PORT", "as in 10.0.0.1:10011")

    def _require(self, holds: bool, name: str, expected: str, advice: str) -> None:
        if not holds:
            raise ConfigError(f"{_option(name)}: expected {expected}, got {getattr(self, name)!r}; {advice}")

    @property
    def engine_options(self) -> EngineOptions:
        """The engine's part of it."""
        from podquant.runtime.options import EngineOptions

        chunk = min(self.chunked_prefill_size, 1 << (self.max_prefill_tokens.bit_length() - 1))
        return EngineOptions(
            model_path=self.model_path,
            quantization_config_path=self.quantization_config_path,
            tp_size=self.tp_size,
            device=self.device or detect_device(Path("/dev")),
            dtype=self.dtype,
            max_running_requests=self.max_running_requests,
            max_waiting_requests=self.max_queued_requests,
            max_total_tokens=self.max_total_tokens,
            context_length=self.context_length,
            chunked_prefill_size=chunk,
            page_size=self.page_size,
            mem_fraction_static=self.mem_fraction_static,
            random_seed=self.random_seed,
            skip_tokenizer_init=self.skip_tokenizer_init,
            skip_server_warmup=self.skip_server_warmup,
            max_logprobs=self.max_logprobs,
            revision=self.revision,
            download_dir=self.download_dir,
        )


def detect_device(devices: Path) -> Literal["tpu", "cpu", "cuda"]:
    """What this machine has, by the device files (in /dev) of TPU VMs and of NVIDIA's driver."""
    if (devices / "accel0").exists() or (devices / "vfio" / "0").exists():
        return "tpu"
    return "cuda" if (devices / "nvidia0").exists() else "cpu"


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `ServeOptions`, and the model as a positional argument too."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="the same as --model-path")
    kinds = typing.get_type_hints(ServeOptions)
    for option in dataclasses.fields(ServeOptions):
        parser.add_argument(_option(option.name), **_argument(option, kinds[option.name]))


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


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(option: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    """argparse's view of a field of type bool, str, int, float or Literal, or one of these or None."""
    argument: dict[str, Any] = {"default": option.default, "help": option.metadata["help"]}
    if option.default not in (None, "", False) and kind is not bool:
        argument["help"] += " (%(default)s)"
    if kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return argument | {"choices": typing.get_args(kind)}
    return argument | {"type": kind, "metavar": option.metadata["metavar"]}
