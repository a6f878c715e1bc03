"""From options to an engine that can be started: open, lay out, load, compile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from podquant.config.rules import load_quantization_config
from podquant.errors import CapacityError, ConfigError
from podquant.model.attention import CHUNK_TOKENS
from podquant.model.config import ModelConfig
from podquant.model.families import read_model_config
from podquant.model.matmul import Numerics
from podquant.runtime.engine import Engine
from podquant.runtime.executor import Executor
from podquant.runtime.load import load_weights
from podquant.runtime.mesh import advise, make_mesh
from podquant.runtime.options import EngineOptions
from podquant.runtime.pages import PagePool
from podquant.runtime.programs import CacheShape, Model
from podquant.runtime.scheduler import Scheduler
from podquant.runtime.source import WeightSource, open_source
from podquant.runtime.tokenizer import Tokenizer
from podquant.storage.hub import download_model

_log = logging.getLogger(__name__)

_CPU_CACHE_TOKENS = 32768
"""KV-cache tokens on a CPU, whose memory is shared with everything else, unless told otherwise."""


def start_engine(options: EngineOptions, on_load: Callable[[int, int], None] = lambda done, total: None) -> Engine:
    """Load and compile a model; `Engine.start` then begins to serve.

    Args:
        options: what and how.
        on_load: called with the bytes read so far and in all.

    Raises:
        ConfigError, CheckpointError, ArtifactError, MeshError, CapacityError, StorageError: before weights are read
            where that is possible.
    """
    _check(options)
    rules = load_quantization_config(options.quantization_config_path) if options.quantization_config_path else None
    path = options.model_path
    if "://" in path:
        raise ConfigError(f"{path}: serving from a bucket is not supported yet; copy the artifact to a local directory")
    if not Path(path).exists():
        path = download_model(path, revision=options.revision, directory=options.download_dir).path
    source = open_source(path, rules)
    try:
        return _start(options, path, source, on_load)
    finally:
        source.close()


def _start(options: EngineOptions, path: str, source: WeightSource, on_load: Callable[[int, int], None]) -> Engine:
    config = read_model_config(source.config, f"{source.store.uri}/config.json")
    tokenizer = None if options.skip_tokenizer_init else Tokenizer.load(Path(path), source.config)
    mesh = make_mesh(options.device, options.tp_size)
    numerics = Numerics(_dtype(options, config), mesh.devices.flat[0].platform)
    model = Model(config, source.scheme_of, numerics, mesh)
    for line in advise(mesh.devices.flat[0].device_kind, model.schemes):
        _log.warning("%s", line)
    context_length = options.context_length or config.max_positions
    began = time.monotonic()
    read = 0

    def progress(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes
        on_load(read, source.num_bytes)

    weights = load_weights(model, source, progress)
    _log.info("loaded %.2f GB in %.1f s", read / 1e9, time.monotonic() - began)
    shape = _cache_shape(options, model, mesh, context_length)
    executor = Executor(model, weights, shape, options.chunked_prefill_size, options.max_logprobs)
    if not options.skip_server_warmup:
        began = time.monotonic()
        executor.warm_up(lambda bucket, seconds: _log.info("compiled %s in %.1f s", bucket, seconds))
        _log.info("compiled %d programs in %.1f s", len(executor.buckets), time.monotonic() - began)
    pool = PagePool(shape.num_pages, shape.page_size)
    scheduler = Scheduler(
        pool,
        max_running=options.max_running_requests,
        max_waiting=options.max_waiting_requests,
        chunk_size=options.chunked_prefill_size,
        context_length=context_length,
    )
    return Engine(
        model_name=options.model_path,
        executor=executor,
        scheduler=scheduler,
        pool=pool,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        context_length=context_length,
        max_logprobs=min(options.max_logprobs, config.vocab_size),
        eos_token_ids=frozenset(tokenizer.eos_ids if tokenizer else config.eos_token_ids),
        random_seed=options.random_seed,
    )


def _check(options: EngineOptions) -> None:
    for name in ("tp_size", "max_running_requests", "max_waiting_requests", "chunked_prefill_size", "page_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(options, name)}")
    for name, most in (("page_size", CHUNK_TOKENS), ("chunked_prefill_size", 1 << 20)):
        value = getattr(options, name)
        if value & (value - 1) or value > most or value < 2:
            raise ConfigError(f"{name} must be a power of two from 2 to {most}, got {value}")
    if not 0 < options.mem_fraction_static <= 1:
        raise ConfigError(f"mem_fraction_static must lie above 0 and up to 1, got {options.mem_fraction_static}")


def _dtype(options: EngineOptions, config: ModelConfig) -> str:
    if options.dtype != "auto":
        return options.dtype
    return "float32" if config.dtype == "float32" else "bfloat16"


def _cache_shape(options: EngineOptions, model: Model, mesh: Mesh, context_length: int) -> CacheShape:
    """How many pages there is room for, or were asked for."""
    wanted = options.max_running_requests * context_length
    tokens = options.max_total_tokens
    if tokens is None:
        stats = mesh.devices.flat[0].memory_stats()
        if mesh.devices.flat[0].platform == "cpu" or not stats or "bytes_limit" not in stats:
            tokens = min(_CPU_CACHE_TOKENS, wanted)
        else:
            free = stats["bytes_limit"] * options.mem_fraction_static - stats["bytes_in_use"]
            tokens = min(int(free // _token_bytes(model)), wanted)
    num_pages = tokens // options.page_size
    if num_pages < 1:
        raise CapacityError(
            f"the KV cache would hold {max(tokens, 0)} tokens, less than one page of {options.page_size}: the weights "
            "leave no room; raise --mem-fraction-static, use more devices, or quantize the weights"
        )
    return CacheShape(num_pages + 1, options.page_size, options.max_running_requests, context_length)


def _token_bytes(model: Model) -> int:
    """Bytes of one token's keys and values on one device."""
    heads = model.layout.num_kv_heads // model.layout.tp_size
    width = 4 if model.numerics.dtype == "float32" else 2
    return 2 * model.config.num_layers * heads * model.config.head_dim * width
