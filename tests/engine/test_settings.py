"""Flags as given, else as suits the device."""

from __future__ import annotations

from podquant.cluster.topology import generation_of
from podquant.engine.device_defaults import device_defaults
from podquant.engine.options import EngineOptions
from podquant.engine.settings import notes, settle
from podquant.families.registry import read_model_config
from tests.engine.shapes import LLAMA_3_8B

CONFIG = read_model_config(LLAMA_3_8B, ())


def test_what_is_given_counts() -> None:
    defaults = device_defaults(generation_of("TPU v6 lite"), CONFIG, 8)
    options = EngineOptions("m", device="tpu", max_running_requests=3, mem_fraction_static=0.5)
    settings = settle(options, defaults)
    assert (settings.max_running_requests, settings.mem_fraction_static) == (3, 0.5)
    assert (settings.chunked_prefill_size, settings.page_size, settings.ep_size) == (2048, 128, 1)
    flags = [line.split(":")[0] for line in notes(options, defaults)]
    assert flags == ["--chunked-prefill-size 2048", "--page-size 128", "--ep-size 1"]


def test_half_of_a_step_is_for_prompts() -> None:
    defaults = device_defaults(None, CONFIG, 1)
    for running, chunk, expected in ((8, 256, 256), (200, 256, 512), (1, 2, 2), (3, 4, 8)):
        options = EngineOptions("m", device="cpu", max_running_requests=running, chunked_prefill_size=chunk)
        assert settle(options, defaults).step_tokens == expected
