"""The fields of the options as keywords of the library's functions, for type checkers and editors.

The dataclasses say what they mean and what is left out means; a test holds that the two have the same names and types.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from podquant.config.scheme import CacheDtype
from podquant.engine.options import Device


class PlanKeywords(TypedDict, total=False):
    """Fields of `SourceOptions` beside the places."""

    revision: str | None
    tp_size: int
    strict_rules: bool
    weights_only: bool
    allow_extra_tensors: bool


class ConvertKeywords(PlanKeywords, total=False):
    """Fields of `ConvertJob` beside the places and the cluster."""

    overwrite: bool
    allow_nonfinite: bool


class EngineKeywords(TypedDict, total=False):
    """Fields of `EngineOptions` beside the model."""

    quantization_config_path: str | None
    tp_size: int
    ep_size: int | None
    device: Device
    dtype: Literal["auto", "bfloat16", "float32"]
    max_running_requests: int | None
    max_queued_requests: int
    max_total_tokens: int | None
    context_length: int | None
    chunked_prefill_size: int | None
    page_size: int | None
    kv_cache_dtype: CacheDtype
    mem_fraction_static: float | None
    random_seed: int
    skip_tokenizer_init: bool
    skip_server_warmup: bool
    generation_config: str
    max_logprobs: int
    allow_extra_tensors: bool
    allow_nonfinite: bool
    disable_radix_cache: bool
    speculative_num_draft_tokens: int
    compilation_cache_dir: str | None
    revision: str | None
    download_dir: str | None


class SamplingKeywords(TypedDict, total=False):
    """Fields of `SamplingParams`."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
