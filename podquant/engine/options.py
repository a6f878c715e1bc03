"""What an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from podquant.config.scheme import CacheDtype

Device = Literal["tpu", "cpu", "cuda"]

MOST_DRAFTS = 16
"""Tokens of a sequence that may be guessed at a time."""

_DEVICES = Path("/dev")


def detect_device(devices: Path = _DEVICES) -> Device:
    """What this machine has, by the device files of TPU VMs and of NVIDIA's driver."""
    if (devices / "accel0").exists() or (devices / "vfio" / "0").exists():
        return "tpu"
    return "cuda" if (devices / "nvidia0").exists() else "cpu"


@dataclass(frozen=True)
class EngineOptions:
    """How to load a model and run it; None: as suits the device, see `device_defaults`.

    Attributes:
        model_path: a directory with an artifact or a Hugging Face checkpoint, or a Hugging Face id.
        quantization_config_path: quantize a checkpoint by these rules while loading it.
        tp_size: devices to cut the model over.
        ep_size: groups of these among which routed experts are shared out, each with whole ones; divides tp_size.
        device: the JAX platform; by default what this machine has: a TPU, else CUDA, else the CPU.
        dtype: of activations and unquantized weights; `auto` takes the checkpoint's (float16 becomes bfloat16).
        max_running_requests: sequences that are computed at a time.
        max_queued_requests: requests that may wait for their turn; one more is refused.
        max_total_tokens: tokens the KV cache holds; None: what `mem_fraction_static` leaves, or 32,768 on a CPU.
        context_length: tokens of prompt and output together; None: what the model was trained for.
        chunked_prefill_size: tokens of one step, of sequences that are generating and, for the rest, of prompts; a
            power of two. Prompts have half of a step at least, which is larger where it must be for that.
        page_size: tokens of a KV-cache page; a power of two up to 256.
        kv_cache_dtype: what keys and values are kept in; in 8 bits they have a scale for each token and head.
        mem_fraction_static: share of a device's memory for weights and KV cache.
        random_seed: from which requests without a seed draw theirs.
        skip_tokenizer_init: serve token ids only.
        skip_server_warmup: compile each shape at its first use instead of before the first request.
        generation_config: defaults of sampling: `auto`, those of the model's generation_config.json; `none`; or a
            directory with such a file.
        max_logprobs: the most log-probabilities of top tokens a request may ask for at a position.
        allow_extra_tensors: serve a checkpoint that holds tensors which its model does not use.
        allow_nonfinite: serve a checkpoint with NaN or infinities in what is not quantized.
        disable_radix_cache: compute every prompt whole; keep nothing of it for others that begin alike.
        speculative_num_draft_tokens: tokens of each sequence that are guessed at a time, by what followed the last
            tokens earlier in its text, and computed together; only what would have been chosen counts. 0: none.
        compilation_cache_dir: where compiled programs are kept for the next start, a directory or `gs://…`; `none`:
            nowhere; None: in the user's cache.
        revision, download_dir: of a Hugging Face id, as in `huggingface_hub`.
    """

    model_path: str
    quantization_config_path: str | None = None
    tp_size: int = 1
    ep_size: int | None = None
    device: Device = field(default_factory=detect_device)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_running_requests: int | None = None
    max_queued_requests: int = 1024
    max_total_tokens: int | None = None
    context_length: int | None = None
    chunked_prefill_size: int | None = None
    page_size: int | None = None
    kv_cache_dtype: CacheDtype = "auto"
    mem_fraction_static: float | None = None
    random_seed: int = 0
    skip_tokenizer_init: bool = False
    skip_server_warmup: bool = False
    generation_config: str = "auto"
    max_logprobs: int = 20
    allow_extra_tensors: bool = False
    allow_nonfinite: bool = False
    disable_radix_cache: bool = False
    speculative_num_draft_tokens: int = 0
    compilation_cache_dir: str | None = None
    revision: str | None = None
    download_dir: str | None = None
