"""From options to an engine that can be started: open, lay out, load, compile."""

from __future__ import annotations

import logging
import os
import time
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Self

import jax

from podquant.cluster.topology import generation_of
from podquant.config.rules import load_quantization_config
from podquant.config.scheme import CacheDtype
from podquant.engine import defaults as sampling_defaults
from podquant.engine.cache_size import cache_tokens
from podquant.engine.compile_cache import open_cache
from podquant.engine.compiled import Programs
from podquant.engine.defaults import PLAIN, SamplingDefaults
from podquant.engine.device_defaults import device_defaults
from podquant.engine.engine import LocalEngine
from podquant.engine.executor import Announce, Executor
from podquant.engine.limits import Limits
from podquant.engine.options import MOST_DRAFTS, EngineOptions
from podquant.engine.pages import PagePool
from podquant.engine.programs import step_sizes
from podquant.engine.scheduler import Scheduler
from podquant.engine.settings import Settings, notes, settle
from podquant.errors import ConfigError
from podquant.families.config import ModelConfig
from podquant.foreign import shown
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import Exchange, advise, exchange_over, make_mesh
from podquant.model.paged_attention import CHUNK_TOKENS
from podquant.storage.hub.ids import download_model, is_offline
from podquant.storage.places import SCHEME_HUB
from podquant.storage.store import open_store
from podquant.tokenizer.tokenizer import FILES, Tokenizer
from podquant.weights.load import load_weights
from podquant.weights.source import WeightSource, check_source, open_source

_log = logging.getLogger(__name__)

_SMALL_BYTES = 64 << 20
"""No file of a tokenizer is larger."""


OnLoad = Callable[[int, int], None]
"""Called with the bytes that this process has read so far, and the bytes of the whole model."""


@dataclass(frozen=True)
class Opened:
    """A model found and checked, of which nothing is loaded yet; a context manager that lets go of its files.

    Attributes:
        options: as given, but for the revision of a model on the Hugging Face hub, which is a commit now: whoever opens
            a model by them has the same files, wherever the branch points by then.
    """

    options: EngineOptions
    source: WeightSource
    config: ModelConfig

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.options.context_length or self.config.max_positions


def open_model(options: EngineOptions, *, by_ranges: bool = False) -> Opened:
    """Find a model and check what can be checked without reading a weight.

    Args:
        by_ranges: read a Hugging Face id from the hub, each process what it needs, instead of downloading it whole.

    Raises:
        ConfigError, CheckpointError, ArtifactError, MeshError, StorageError: the options, or what is there, are wrong.
    """
    _check(options)
    rules = load_quantization_config(options.quantization_config_path) if options.quantization_config_path else None
    uri, revision = _locate(options, by_ranges=by_ranges)
    source = open_source(uri, rules, allow_nonfinite=options.allow_nonfinite)
    if source.store.uri.startswith(SCHEME_HUB):
        revision = source.store.uri.rpartition("@")[2]
    options = replace(options, revision=revision or options.revision)
    try:
        checked = check_source(source, options.tp_size, options.ep_size or 1, allow_extra=options.allow_extra_tensors)
        _check_context(options, checked.config)
        for note in (*source.notes, *checked.notes):
            _log.warning("%s", note)
    except BaseException:
        source.close()
        raise
    return Opened(options, source, checked.config)


def start_executor(
    opened: Opened,
    on_load: OnLoad = lambda done, total: None,
    announce: Announce = lambda bucket, inputs: None,
    eos_ids: frozenset[int] = frozenset(),
) -> tuple[Executor, CacheShape]:
    """Load and compile a model. Where several processes run it together, all must, at the same time.

    Args:
        announce: told of each step before it is dispatched, in the process that schedules.
        eos_ids: the model's end tokens, in the process that schedules.

    Raises:
        CheckpointError, ArtifactError, MeshError, CapacityError, StorageError: before weights are read where that is
            possible.
    """
    options, source = opened.options, opened.source
    mesh = make_mesh(options.device, options.tp_size)
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    defaults = device_defaults(generation_of(device.device_kind), opened.config, options.tp_size)
    settings = settle(options, defaults)
    for line in notes(options, defaults):
        _log.info("%s", line)
    dtype = opened.config.compute_dtype if options.dtype == "auto" else options.dtype
    numerics = Numerics(dtype, device.platform, device.device_kind)
    model = Model(opened.config, source.scheme_of, numerics, mesh, settings.ep_size)
    for line in advise(device.device_kind, model.schemes):
        _log.warning("%s", line)
    shape = _cache_shape(opened, settings, model, device, exchange_over(mesh))
    cache = open_cache(options.compilation_cache_dir)
    sizes = step_sizes(device.platform, settings.step_tokens)
    programs = Programs(model, shape, sizes, options.max_logprobs, is_lazy=options.skip_server_warmup)
    with ThreadPoolExecutor(1, "compile") as pool:
        compiling = pool.submit(programs.compile, programs.first)
        weights = _load(model, source, on_load)
        compiling.result()
    executor = Executor(programs, weights, eos_ids, announce)
    executor.warm_up()
    _log.info("%d of %d programs were compiled", programs.num_compiled, len(programs.first))
    cache.publish()
    programs.start_rest(cache.publish)
    return executor, shape


def _load(model: Model, source: WeightSource, on_load: OnLoad) -> tuple[jax.Array, ...]:
    began = time.monotonic()
    read = 0

    def progress(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes
        on_load(read, source.num_bytes)

    weights = load_weights(model, source, progress)
    seconds = time.monotonic() - began
    _log.info("loaded %.2f GB in %.1f s, %.2f GB/s", read / 1e9, seconds, read / seconds / 1e9)
    return weights


def start_engine(options: EngineOptions, on_load: OnLoad = lambda done, total: None) -> LocalEngine:
    """Open, load and compile a model in this process; `LocalEngine.start` then begins to serve.

    Raises:
        As `open_model`, `load_tokenizer`, `load_defaults` and `start_executor`, in this order.
    """
    with open_model(options) as opened:
        return build_engine(opened, load_tokenizer(opened), on_load, defaults=load_defaults(opened))


def build_engine(
    opened: Opened,
    tokenizer: Tokenizer | None,
    on_load: OnLoad = lambda done, total: None,
    announce: Announce = lambda bucket, inputs: None,
    defaults: SamplingDefaults = PLAIN,
) -> LocalEngine:
    """The engine over `start_executor`'s executor; in the process that schedules.

    Args:
        tokenizer: None to serve token ids only.
        defaults: how tokens are chosen where a request does not say.
    """
    options, config = opened.options, opened.config
    eos_ids = frozenset(tokenizer.eos_ids if tokenizer else config.eos_token_ids)
    executor, shape = start_executor(opened, on_load, announce, eos_ids)
    pool = PagePool(shape.num_pages, shape.page_size)
    scheduler = Scheduler(
        pool,
        max_running=shape.num_slots,
        max_tokens=executor.max_tokens,
        num_drafts=shape.num_drafts,
        keeps_prefixes=not (options.disable_radix_cache or config.rope.depends_on_prompt),
    )
    limits = Limits(
        vocab_size=config.vocab_size,
        context_length=opened.context_length,
        cache_tokens=pool.num_usable * pool.page_size,
        max_running=shape.num_slots,
        max_waiting=options.max_queued_requests,
        max_logprobs=min(options.max_logprobs, config.vocab_size),
        has_tokenizer=tokenizer is not None,
    )
    return LocalEngine(
        model_name=options.model_path,
        executor=executor,
        scheduler=scheduler,
        pool=pool,
        tokenizer=tokenizer,
        limits=limits,
        eos_token_ids=eos_ids,
        random_seed=options.random_seed,
        defaults=defaults,
    )


def load_tokenizer(opened: Opened) -> Tokenizer | None:
    """The model's tokenizer, wherever its files are; None where the options want none.

    Raises:
        CheckpointError: its files are missing or wrong, or are not of this model.
    """
    if opened.options.skip_tokenizer_init:
        return None
    store = opened.source.store
    with TemporaryDirectory(prefix="podquant-") as folder:
        for name in store.list():
            if any(PurePath("/", name).match("/" + pattern) for pattern in FILES):
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(store.read(name, _SMALL_BYTES))
        return Tokenizer.load(Path(folder), opened.source.config, vocab_size=opened.config.vocab_size, where=store.uri)


def load_defaults(opened: Opened) -> SamplingDefaults:
    """How tokens are chosen where a request does not say, by the generation_config.json that the options name.

    Raises:
        CheckpointError: the file is not a JSON object.
        ConfigError: the options name a place that has no such file.
        StorageError: the place cannot be read.
    """
    asked = opened.options.generation_config
    if asked == "none":
        return PLAIN
    store = opened.source.store if asked == "auto" else open_store(asked)
    if sampling_defaults.FILE not in store.list():
        if asked == "auto":
            return PLAIN
        raise ConfigError(
            f"generation_config {asked}: expected auto, none, or a directory with a {sampling_defaults.FILE}; this one "
            "has none"
        )
    where = f"{store.uri}/{sampling_defaults.FILE}"
    defaults, notes = sampling_defaults.read_defaults(store.read(sampling_defaults.FILE, _SMALL_BYTES), where)
    for note in notes:
        _log.warning("%s", note)
    if str(defaults):
        _log.info("requests that do not say otherwise get %s, by %s", defaults, where)
    return defaults


def _locate(options: EngineOptions, *, by_ranges: bool) -> tuple[str, str | None]:
    """Where the model is, and the commit of one that was downloaded. A revision counts more than the one in hf://…@…."""
    path, revision = options.model_path, options.revision
    if path.startswith(SCHEME_HUB) and revision is not None:
        return f"{path.partition('@')[0]}@{revision}", None
    if "://" in path or os.path.exists(os.path.expanduser(path)):
        return path, None
    if by_ranges and options.download_dir is None and not is_offline():
        return f"{SCHEME_HUB}{path}" + (f"@{revision}" if revision else ""), None
    snapshot = download_model(path, revision=revision, directory=options.download_dir)
    return snapshot.path, snapshot.name.rpartition("@")[2]


def _check(options: EngineOptions) -> None:
    for name in ("tp_size", "ep_size", "max_running_requests", "max_queued_requests"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    for name, most in (("page_size", CHUNK_TOKENS), ("chunked_prefill_size", 1 << 20)):
        value = getattr(options, name)
        if value is not None and (value & (value - 1) or value > most or value < 2):
            raise ConfigError(f"{name} must be a power of two from 2 to {most}, got {value}")
    fraction = options.mem_fraction_static
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"mem_fraction_static must lie above 0 and up to 1, got {fraction}")
    if not 0 <= options.speculative_num_draft_tokens <= MOST_DRAFTS:
        raise ConfigError(
            f"speculative_num_draft_tokens must be 0 to {MOST_DRAFTS}, got {options.speculative_num_draft_tokens}"
        )
    dtypes = typing.get_args(CacheDtype)
    if options.kv_cache_dtype not in dtypes:
        raise ConfigError(f"kv_cache_dtype must be one of {', '.join(dtypes)}, got {shown(options.kv_cache_dtype)}")


def _check_context(options: EngineOptions, config: ModelConfig) -> None:
    if config.rope.kind == "dynamic" and (options.context_length or 0) > config.max_positions:
        raise ConfigError(
            f"context_length {options.context_length}: with the rope type 'dynamic' this model runs up to the "
            f"{config.max_positions} positions of its `max_position_embeddings`: give at most that"
        )


def _cache_shape(
    opened: Opened, settings: Settings, model: Model, device: jax.Device, exchange: Exchange
) -> CacheShape:
    """As many pages as there is room for on every host, or as were asked for."""
    options, length = opened.options, opened.context_length
    stats = None if device.platform == "cpu" else device.memory_stats()
    memory = None
    if stats and "bytes_limit" in stats:
        memory = int(stats["bytes_limit"] * settings.mem_fraction_static) - stats["bytes_in_use"]
    dtype = options.kv_cache_dtype
    tokens = cache_tokens(model, settings, dtype, memory, length, options.max_total_tokens)
    if options.max_total_tokens is None:
        tokens = min(int(each) for each in exchange(str(tokens).encode()))
    page_size = settings.page_size
    drafts = options.speculative_num_draft_tokens
    return CacheShape(tokens // page_size + 1, page_size, settings.max_running_requests, length, dtype, drafts)
