"""What `podquant serve` is told, declared once: each field is a flag, its help and its check.

`ServeOptions` is a frozen dataclass; `add_options` turns its fields into flags, `read_options` turns parsed flags into
it. The flags are those of SGLang's `launch_server`, with the meaning its users know.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from podquant.config.job import Kind
from podquant.errors import ConfigError

if TYPE_CHECKING:
    from podquant.app.serving import HttpOptions
    from podquant.engine.options import EngineOptions
    from podquant.group.service import Members


API_KEY_VARIABLE = "PODQUANT_API_KEY"
SECRET_VARIABLE = "PODQUANT_GROUP_SECRET"
_LEAST_SECRET = 16


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
    api_key: str | None = _flag(
        "what callers must send as `Authorization: Bearer KEY` (default: what PODQUANT_API_KEY holds, which other "
        "users of the machine cannot see)"
    )
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
    ep_size: int = _flag("share routed experts out among N groups of the --tp-size devices, whole ones to each", 1, "N")
    dp_size: int = _flag("replicas of the model, each on --tp-size devices, behind one port", 1, "N")
    nnodes: int = _flag(
        "hosts to serve on; start one process on each, with the same flags but for --node-rank, and the same secret in "
        "PODQUANT_GROUP_SECRET",
        1,
        "N",
    )
    node_rank: int = _flag("which of the hosts this is, from 0, which answers HTTP", 0, "RANK")
    dist_init_addr: str | None = _flag(
        "HOST:PORT of host 0, where the hosts meet; not used with one host", metavar="HOST:PORT"
    )
    liveness_seconds: float = _flag(
        "a host or a process of several that gives no sign of life for so long is lost, and all start anew",
        10.0,
        "SECONDS",
    )
    arrival_seconds: float = _flag("how long to wait for all of several hosts", 600.0, "SECONDS")
    step_seconds: float = _flag("a step that takes longer, on any of several hosts, has failed", 120.0, "SECONDS")
    start_seconds: float = _flag("how long several hosts may take to load and compile", 1800.0, "SECONDS")
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
        self._require(0 <= self.node_rank < self.nnodes, "node_rank", f"0 to {self.nnodes - 1}", "as --nnodes says")
        self._require(
            self.nnodes == 1 or self.dist_init_addr is not None,
            "dist_init_addr",
            "HOST:PORT of host 0 where there are several hosts",
            "as in 10.0.0.1:10011",
        )
        for name in ("liveness_seconds", "arrival_seconds", "step_seconds", "start_seconds"):
            self._require(getattr(self, name) >= 1, name, "1 or more", "the default will do")
        self._require(self.api_key != "", "api_key", "at least one character", "leave it out to serve anybody")
        for name in (
            "tp_size",
            "ep_size",
            "dp_size",
            "nnodes",
            "max_running_requests",
            "max_queued_requests",
            "max_prefill_tokens",
        ):
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

    def members(self, secret: str) -> Members:
        """The hosts that serve together.

        Args:
            secret: what all of them know; may be empty where there is one host.

        Raises:
            ConfigError: several hosts without a secret, or replicas that do not come out even.
        """
        from podquant.group.launch import Deadlines
        from podquant.group.service import Members

        if self.nnodes > 1 and len(secret) < _LEAST_SECRET:
            raise ConfigError(
                f"{SECRET_VARIABLE}: several hosts need a secret of {_LEAST_SECRET} characters or more that all of "
                "them have, so that no stranger joins them: make one with `openssl rand -hex 32`"
            )
        host, _, port = (self.dist_init_addr or "127.0.0.1:0").rpartition(":")
        if self.nnodes > 1 and host in ("", "0.0.0.0", "::", "[::]"):
            raise ConfigError(
                f"--dist-init-addr {self.dist_init_addr}: expected host 0's own address, which the other hosts call"
            )
        deadlines = Deadlines(
            self.liveness_seconds, self.step_seconds, self.arrival_seconds, self.start_seconds, self.drain_seconds
        )
        key = (secret or secrets.token_hex(32)).encode()
        return Members(self.nnodes, self.dp_size, (host.strip("[]"), int(port)), key, deadlines)

    @property
    def http_options(self) -> HttpOptions:
        """The server's part of it."""
        from podquant.app.serving import HttpOptions

        return HttpOptions(
            host=self.host,
            port=self.port,
            api_key=self.api_key,
            served_model_name=self.served_model_name,
            with_metrics=self.enable_metrics,
            access_log=self.log_level == "debug",
            drain_seconds=self.drain_seconds,
        )

    @property
    def engine_options(self) -> EngineOptions:
        """The engine's part of it."""
        from podquant.engine.options import EngineOptions

        chunk = min(self.chunked_prefill_size, 1 << (self.max_prefill_tokens.bit_length() - 1))
        return EngineOptions(
            model_path=self.model_path,
            quantization_config_path=self.quantization_config_path,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
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
        parser.add_argument(_option(option.name), **_argument(option, _kind(kinds[option.name])))


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
    values["api_key"] = values["api_key"] or os.environ.get(API_KEY_VARIABLE)
    return ServeOptions(**values)


OF_THE_HOSTS = ("model_path", "quantization_config_path", "revision", "nnodes", "node_rank", "dist_init_addr")
"""Fields that a job decides otherwise than by its section `serve`."""


def flag_kinds() -> dict[str, Kind]:
    """The flags that a job file's section `serve` may hold, and what each takes."""
    kinds = typing.get_type_hints(ServeOptions)
    names = [option.name for option in dataclasses.fields(ServeOptions) if option.name not in OF_THE_HOSTS]
    return {name: _kind(kinds[name]) for name in names}


def _kind(hint: Any) -> Kind:
    """The type behind a field's annotation: of what it may be besides None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return tuple(typing.get_args(hint))
    kind: Kind = hint
    return kind


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(option: dataclasses.Field[Any], kind: Kind) -> dict[str, Any]:
    """argparse's view of a field."""
    argument: dict[str, Any] = {"default": option.default, "help": option.metadata["help"]}
    if option.default not in (None, "", False) and kind is not bool:
        argument["help"] += " (%(default)s)"
    if kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
    if isinstance(kind, tuple):
        return argument | {"choices": kind}
    return argument | {"type": kind, "metavar": option.metadata["metavar"]}
