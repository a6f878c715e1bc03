"""How often the loops of a compiled step run, by their names, and that the programs have these names."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from podquant.cluster.topology import parse_slice
from podquant.config.scheme import Scheme
from podquant.engine.ahead import Load, cache_shape, load_of
from podquant.engine.capacity import ServingOptions, Subject, plan_serving
from podquant.engine.hlo import Instruction
from podquant.engine.programs import Bucket, lower_step
from podquant.families.declaration import declare
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from tests.engine.shapes import LLAMA_3_8B, QWEN3_30B

INT8 = Scheme("int8")


def laid_out(config: dict[str, Any], mesh: Mesh | AbstractMesh, ep_size: int = 1) -> Model:
    return Model(read_model_config(config, ()), lambda module: INT8, Numerics("bfloat16", "tpu"), mesh, ep_size)


def trips(load: Load, model: Model, path: str) -> float:
    loop = Instruction("%while", "s32[]", "while", (), f'metadata={{op_name="jit(_step)/while/body/{path}"}}', False)
    return load.trips(model, loop)


def test_attention_walks_as_far_as_the_rows_are_long() -> None:
    model = laid_out(LLAMA_3_8B, AbstractMesh((8,), (TP,)))
    load = Load(num_decodes=20, context=1000, num_prompt=300)
    assert trips(load, model, "short_rows/while") == 3  # of eight rows
    assert trips(load, model, "short_rows/while/body/walk/while") == 4  # of 256 tokens
    assert trips(load, model, "long_rows/while") == 5  # of 64 tokens
    assert trips(load, model, "long_rows/while/body/walk/while") == (1 + 1 + 1 + 1 + 2) / 5
    assert trips(Load(20, 1000, 0), model, "long_rows/while") == 0
    assert trips(load, model, "cond/branch_1_fun/while") == 1


def test_experts_are_read_as_often_as_their_tokens_fill_tiles() -> None:
    """By drawing tokens: 64 of them, eight experts each; and 2,048, whose tiles are of 128 rows."""
    model = laid_out(QWEN3_30B, AbstractMesh((8,), (TP,)), 8)
    random = np.random.default_rng(0)
    for tokens, tile in ((64, 8), (2048, 128)):
        drawn = [np.bincount(random.integers(0, 128, 8 * tokens), minlength=128) for _ in range(200)]
        mean = np.mean([(-(-rows // tile)).sum() / 8 for rows in drawn])
        assert trips(Load(tokens, 1, 0), model, "experts/while") == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LLAMA_3_8B, {"short_rows/while", "long_rows/while", "walk/while"}),
        (QWEN3_30B, {"short_rows/while", "long_rows/while", "walk/while", "experts/while"}),
    ],
)
def test_the_loops_of_a_step_have_these_names(config: dict[str, Any], names: set[str]) -> None:
    small = config | {"num_hidden_layers": 2, "vocab_size": 256}
    model = laid_out(small, Mesh(np.array(jax.devices()[:1]), (TP,)))
    text = lower_step(model, CacheShape(9, 128, 4, 512), Bucket(16), 1).as_text(debug_info=True)
    assert {name for name in names if f'{name}"' in text} == names


def test_a_step_is_counted_with_as_many_sequences_as_have_room() -> None:
    config = read_model_config(LLAMA_3_8B, ())
    subject = Subject(config, declare(config), lambda module: INT8)
    plan = plan_serving(subject, parse_slice("v5e:1x1"), ServingOptions())
    assert load_of(plan, Bucket(16)) == Load(16, 2048, 0)
    assert load_of(plan, Bucket(2048)) == Load(256, plan.cache_tokens // 256, 2048 - 256)
    assert cache_shape(plan).num_pages == plan.cache_tokens // 128 + 1
