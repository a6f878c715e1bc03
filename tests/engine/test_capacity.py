"""What serving takes on a slice: figures by hand, and what follows from flags."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from podquant.cluster.topology import parse_slice
from podquant.config.scheme import CacheDtype, Scheme
from podquant.engine.capacity import ServingOptions, ServingPlan, Subject, plan_serving
from podquant.errors import MeshError
from podquant.families.declaration import declare
from podquant.families.registry import read_model_config
from tests.engine.shapes import DEEPSEEK_V3, LLAMA_3_8B, LLAMA_3_70B, QWEN3_30B

W8A8 = Scheme("int8", "int8")
DEFAULT = ServingOptions()


def planned(
    config: dict[str, Any], tpu: str, scheme: Scheme | None = W8A8, options: ServingOptions = DEFAULT
) -> ServingPlan:
    model = read_model_config(config, ())
    return plan_serving(Subject(model, declare(model), lambda module: scheme), parse_slice(tpu), options)


def test_70b_on_eight_chips_of_v6e() -> None:
    """Weights by hand: an eighth of 70.6 GB of codes and scales; 160 KiB of keys and values a token over 8 chips."""
    plan = planned(LLAMA_3_70B, "v6e:2x4")
    assert (plan.tp_size, plan.dp_size, plan.copies) == (8, 1, 1)
    assert plan.weight_bytes == pytest.approx(70.6e9 / 8, rel=0.01)
    assert plan.token_bytes == 80 * 2 * 128 * 2
    assert plan.slot_bytes == pytest.approx(256 * 128256 / 8 * 4, rel=1e-3)
    assert plan.memory == int(int(31.24 * 2**30) * 0.9)
    assert plan.sequences(2048) == plan.cache_room // (2048 * plan.token_bytes) == 254
    assert plan.shortage == 0


def test_a_step_reads_all_weights_but_the_embedding_once_and_each_sequence() -> None:
    plan = planned(LLAMA_3_70B, "v6e:2x4")
    cost = plan.step(64)
    embedding = 128256 * (8192 + 4) // 8
    assert cost.weight_bytes == pytest.approx(plan.weight_bytes - embedding, rel=1e-4)
    assert cost.cache_bytes == 64 * 2048 * plan.token_bytes
    assert cost.read_seconds == pytest.approx((cost.weight_bytes + cost.cache_bytes) / 1638e9)
    assert cost.seconds == cost.read_seconds > cost.product_seconds
    assert plan.tokens_per_second(64) == pytest.approx(64 / cost.seconds)
    assert plan.tokens_per_second(256) is None  # 254 have room


def test_products_of_many_rows_take_longer_than_reading_where_the_chip_upcasts_them() -> None:
    """v5e: 2 x 8e9 x 256 operations over 8 chips of 197e12 in bfloat16, of 393e12 in int8."""
    weight_only, both = (planned(LLAMA_3_8B, "v5e:2x4", scheme).step(256) for scheme in (Scheme("int8"), W8A8))
    assert weight_only.product_seconds == pytest.approx(2 * 7.5e9 * 256 / 8 / 197e12, rel=0.01)
    assert both.product_seconds == pytest.approx(weight_only.product_seconds * 197 / 393)
    fp8 = planned(LLAMA_3_8B, "v5e:2x4", Scheme("float8_e4m3fn", "float8_e4m3fn")).step(256)
    assert fp8.product_seconds == pytest.approx(weight_only.product_seconds)


@pytest.mark.parametrize(("at_once", "share"), [(1, 8 / 128), (64, 1 - (1 - 8 / 128) ** 64)])
def test_of_routed_experts_a_step_reads_those_its_tokens_go_to(at_once: int, share: float) -> None:
    plan = planned(QWEN3_30B, "v6e:2x4")
    assert plan.ep_size == 8
    experts = 48 * (128 // 8) * (3 * 768 * 2048 + 4 * (2 * 768 + 2048))
    rest = plan.weight_bytes - experts - 151936 * (2048 + 4) // 8
    assert plan.step(at_once).weight_bytes == pytest.approx(rest + share * experts, rel=1e-3)


@pytest.mark.parametrize(("dtype", "factor"), [("auto", 1), ("bfloat16", 1), ("int8", 132 / 256), ("fp8", 132 / 256)])
def test_eight_bits_make_room(dtype: CacheDtype, factor: float) -> None:
    plan = planned(LLAMA_3_70B, "v6e:2x4", options=ServingOptions(kv_cache_dtype=dtype))
    assert plan.token_bytes == 80 * 2 * 128 * 2 * factor
    assert plan.sequences(2048) == int(plan.cache_room // (2048 * plan.token_bytes))


def test_a_window_is_all_that_its_layers_read() -> None:
    model = read_model_config(LLAMA_3_8B, ())
    windowed = replace(model, windows=(512,) * 8 + model.windows[8:])
    full, less = (
        plan_serving(Subject(each, declare(each), lambda module: W8A8), parse_slice("v6e:2x2"), DEFAULT).step(4)
        for each in (model, windowed)
    )
    assert less.cache_bytes == full.cache_bytes * (8 * 512 + 24 * 2048) // (32 * 2048)


def test_latents_are_on_every_chip() -> None:
    plan = planned(DEEPSEEK_V3, "v6e:4x8")
    assert (plan.tp_size, plan.ep_size, plan.copies) == (32, 32, 32)


@pytest.mark.parametrize(
    ("tpu", "tp_size", "dp_size"), [("v6e:2x2", 4, 1), ("v6e:8x8", 32, 2), ("tpu7x:2x2x1", 8, 1), ("v5p:2x2x1", 4, 1)]
)
def test_a_model_is_cut_over_all_devices_as_far_as_it_can_be(tpu: str, tp_size: int, dp_size: int) -> None:
    plan = planned(LLAMA_3_8B, tpu)
    assert (plan.tp_size, plan.dp_size) == (tp_size, dp_size)
    alone = planned(LLAMA_3_8B, tpu, options=ServingOptions(tp_size=1))
    assert alone.dp_size == tp_size * dp_size
    assert alone.sequences(2048) == alone.dp_size * (alone.cache_tokens // 2048)


def test_flags_decide() -> None:
    options = ServingOptions(
        tp_size=4, mem_fraction_static=0.5, context_length=100, max_running_requests=3, page_size=64
    )
    plan = planned(LLAMA_3_8B, "v6e:2x2", options=options)
    assert plan.memory == int(31.24 * 2**30) // 2
    assert plan.slot_bytes == pytest.approx(3 * 128256 // 4 * 4, rel=1e-4)
    assert plan.shortest == 100
    assert plan.sequences(100) == plan.cache_tokens // 128  # two pages
    assert plan.tokens_per_second(3) is not None
    assert plan.tokens_per_second(4) is None


def test_what_is_missing_is_told_to_the_byte() -> None:
    plan = planned(LLAMA_3_70B, "v5e:2x2")
    needed = plan.weight_bytes + plan.slot_bytes + 2048 * plan.token_bytes
    assert plan.shortage == needed - plan.memory > 0
    assert plan.sequences(2048) == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, r"--tp-size 3: v6e:2x4 has 8 devices; expected a size that divides them: 1, 2, 4, 8"),
        (16, r"--tp-size 16: v6e:2x4 has 8 devices"),
    ],
)
def test_a_size_that_the_slice_does_not_have_is_refused(size: int, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        planned(LLAMA_3_8B, "v6e:2x4", options=ServingOptions(tp_size=size))


def test_a_size_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(MeshError, match="LlamaForCausalLM cannot be cut into tp_size 64: 32 attention heads"):
        planned(LLAMA_3_8B, "v6e:8x8", options=ServingOptions(tp_size=64))
