"""What a server is told, declared once: each field is a flag of `podquant serve`, its help and its check.

The flags are those of SGLang's `launch_server`, with the meaning its users know. Knows nothing of command lines or of
what the options do: `podquant.cli.options` makes flags of them, `podquant.app.serve` what they mean.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from podquant.config.job import FlagType
from podquant.engine.options import MOST_DRAFTS
from podquant.errors import ConfigError
from podquant.foreign import shown

API_KEY_VARIABLE = "PODQUANT_API_KEY"
SECRET_VARIABLE = "PODQUANT_GROUP_SECRET"


def _flag(help: str, default: Any = None, metavar: str | None = None, *, is_secret: bool = False) -> Any:
    return field(default=default, repr=not is_secret, metadata={"help": help, "metavar": metavar})


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
        "accepted for existing command lines, and ignored: podquant never runs code from a checkpoint", False
    )
    dtype: Literal["auto", "bfloat16", "float32"] = _flag(
        "type of activations and of weights that are not quantized; auto: the checkpoint's, and bfloat16 for float16",
        "auto",
    )
    skip_tokenizer_init: bool = _flag("serve token ids only, for checkpoints without a tokenizer", False)

    host: str = _flag("address to listen on; 0.0.0.0 for all addresses, which takes an API key", "127.0.0.1")
    port: int = _flag("port to listen on; 0 takes a free one", 30000)
    api_key: str | None = _flag(
        "what callers must send as `Authorization: Bearer KEY` (default: the value of PODQUANT_API_KEY, which other "
        "users of the machine cannot see)",
        is_secret=True,
    )
    api_key_file: str | None = _flag(
        "file that holds that key and nothing else, such as a mounted Secret; read once, when the server starts",
        metavar="FILE",
    )
    allow_anonymous: bool = _flag(
        "listen where other machines reach the server, although no API key is set: whoever does is answered", False
    )
    served_model_name: str | None = _flag("what callers call the model (default: --model-path)", metavar="NAME")
    enable_metrics: bool = _flag("serve GET /metrics for Prometheus", True)
    log_level: Literal["debug", "info", "warning", "error"] = _flag(
        "what to log to stderr; debug logs every request", "info"
    )
    drain_seconds: float = _flag("how long requests in flight may continue after SIGTERM or Ctrl-C", 30.0, "SECONDS")

    device: Literal["tpu", "cpu", "cuda"] | None = _flag(
        "what to run on (default: a TPU if there is one, else CUDA, else the CPU)"
    )
    tp_size: int = _flag("devices to cut the model over", 1, "N")
    ep_size: int | None = _flag(
        "share routed experts out among N groups of the --tp-size devices, whole ones to each (default: on a TPU "
        "as many groups as come out even, else 1)",
        metavar="N",
    )
    dp_size: int = _flag("replicas of the model, each on --tp-size devices, behind one port", 1, "N")
    nnodes: int = _flag(
        "hosts to serve on; start one process on each, with the same flags but for --node-rank, and the same secret in "
        "PODQUANT_GROUP_SECRET",
        1,
        "N",
    )
    node_rank: int = _flag("which of the hosts this is, counted from 0; host 0 answers HTTP", 0, "RANK")
    dist_init_addr: str | None = _flag(
        "HOST:PORT of host 0, where the hosts meet; not used with one host", metavar="HOST:PORT"
    )
    liveness_seconds: float = _flag(
        "with several hosts or processes: one that sends no heartbeat for this long is lost, and all of them restart",
        10.0,
        "SECONDS",
    )
    arrival_seconds: float = _flag("with several hosts: how long to wait until all have connected", 600.0, "SECONDS")
    step_seconds: float = _flag(
        "with several hosts: a step that takes longer, on any of them, has failed", 120.0, "SECONDS"
    )
    start_seconds: float = _flag("with several hosts: how long they may take to load and compile", 1800.0, "SECONDS")
    max_failed_starts: int | None = _flag(
        "with several hosts or processes: give up after so many failed starts in a row, before the first that serves "
        "(default: try without end, with pauses of up to 30 s); what is wrong with the model or the flags ends at once",
        metavar="N",
    )
    mem_fraction_static: float | None = _flag(
        "share of a device's memory for weights and KV cache (default: 0.9 on a TPU, else 0.85)", metavar="SHARE"
    )

    context_length: int | None = _flag(
        "tokens of a prompt and its output (default: what the model was trained for)", metavar="N"
    )
    max_running_requests: int | None = _flag(
        "sequences computed at a time (default: 256 on a TPU, else 8)", metavar="N"
    )
    max_queued_requests: int = _flag("sequences that may wait for that; a further one is refused with 429", 1024, "N")
    max_total_tokens: int | None = _flag(
        "tokens that the KV cache holds (default: as many as the memory has room for)", metavar="N"
    )
    max_prefill_tokens: int | None = _flag("bounds --chunked-prefill-size", metavar="N")
    chunked_prefill_size: int | None = _flag(
        "tokens of one step, a power of two: one of each sequence that is generating, the rest of prompts; more is "
        "faster, less delays other requests less (default: 2048 on a TPU, 1024 on v5e, else 256)",
        metavar="N",
    )
    page_size: int | None = _flag(
        "tokens in a page of the KV cache, a power of two (default: 128 on a TPU, else 64)", metavar="N"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "int8", "fp8"] = _flag(
        "what keys and values are kept in: int8 and fp8 take half the memory, with a scale for each token and head "
        "(auto: what the model computes in)",
        "auto",
    )
    generation_config: str = _flag(
        "what requests get that do not say how to choose tokens: auto, as the model's generation_config.json "
        "recommends; none, plain sampling; or a directory with another generation_config.json",
        "auto",
        "auto|none|DIR",
    )
    max_logprobs: int = _flag(
        "how many most likely tokens, with their log-probabilities, a request may ask for at each position", 20, "N"
    )
    allow_extra_tensors: bool = _flag("serve a checkpoint that holds tensors which its model does not use", False)
    allow_nonfinite: bool = _flag("serve a checkpoint with NaN or infinities in what is not quantized", False)
    disable_radix_cache: bool = _flag(
        "compute every prompt whole: keep nothing of it for later prompts that begin with the same tokens", False
    )
    random_seed: int = _flag("seed from which requests that give none draw theirs", 0, "SEED")
    speculative_num_draft_tokens: int = _flag(
        "guess so many tokens of each sequence at a time, by what followed its last tokens earlier in the text, and "
        "compute them together: faster where text repeats itself; only what would have been chosen counts (0: none)",
        0,
        "N",
    )
    compilation_cache_dir: str | None = _flag(
        "where compiled programs are kept, so that the next start compiles nothing: a directory or gs://…; none: "
        "nowhere (default: podquant/programs in the user's cache)",
        metavar="DIR",
    )
    skip_server_warmup: bool = _flag("compile each shape at its first use instead of before the first request", False)

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, most = getattr(self, option.name), 2**63 if option.name == "random_seed" else 2**31
            if isinstance(value, int | float):
                self._require(abs(value) < most, option.name, f"less than {most:,}", "the default will do")
        self._require(bool(self.model_path), "model_path", "a model", "name an artifact or a checkpoint")
        self._require(0 <= self.port < 65536, "port", "0 to 65535", "choose a port of TCP's")
        self._require(self.drain_seconds >= 0, "drain_seconds", "0 or more", "0 ends requests at once")
        fraction = self.mem_fraction_static
        self._require(
            fraction is None or 0 < fraction <= 1, "mem_fraction_static", "above 0 and up to 1", "0.9 is usual"
        )
        self._require(
            0 <= self.speculative_num_draft_tokens <= MOST_DRAFTS,
            "speculative_num_draft_tokens",
            f"0 to {MOST_DRAFTS}",
            "4 is usual",
        )
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
        self._require(
            self.api_key is None or self.api_key_file is None,
            "api_key_file",
            "only one of it and --api-key",
            "leave one out",
        )
        for name in ("tp_size", "dp_size", "nnodes", "max_queued_requests"):
            self._require(getattr(self, name) >= 1, name, "1 or more", "the default will do")
        for name in ("chunked_prefill_size", "page_size"):
            value = getattr(self, name)
            is_power = value is None or (value >= 2 and value & (value - 1) == 0)
            self._require(is_power, name, "a power of two from 2", "leave it out for the default")
        for name in (
            "ep_size",
            "max_running_requests",
            "max_prefill_tokens",
            "context_length",
            "max_total_tokens",
            "max_failed_starts",
        ):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "1 or more", "leave it out for the default")
        if self.dist_init_addr is not None:
            host, _, port = self.dist_init_addr.rpartition(":")
            is_port = port.isdecimal() and len(port) <= 5 and int(port) < 65536
            self._require(bool(host) and is_port, "dist_init_addr", "HOST:PORT", "as in 10.0.0.1:10011")

    def _require(self, holds: bool, name: str, expected: str, advice: str) -> None:
        if not holds:
            raise ConfigError(f"{option_name(name)}: expected {expected}, got {shown(getattr(self, name))}; {advice}")


OF_THE_HOSTS = (
    "model_path",
    "quantization_config_path",
    "revision",
    "api_key",
    "nnodes",
    "node_rank",
    "dist_init_addr",
)
"""Fields that a job decides otherwise than by its section `serve`."""


def flag_kinds() -> dict[str, FlagType]:
    """The flags that a job file's section `serve` may hold, and what each takes."""
    return {name: kind for name, kind in option_kinds().items() if name not in OF_THE_HOSTS}


def option_kinds() -> dict[str, FlagType]:
    """What each field of `ServeOptions` takes, besides None."""
    kinds = typing.get_type_hints(ServeOptions)
    return {option.name: _kind(kinds[option.name]) for option in dataclasses.fields(ServeOptions)}


def option_name(name: str) -> str:
    """A field's flag."""
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> FlagType:
    """The type behind a field's annotation: of what it may be besides None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return tuple(typing.get_args(hint))
    kind: FlagType = hint
    return kind
