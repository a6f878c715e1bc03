"""How models are laid out over devices, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.config.scheme import Scheme
from podquant.engine.programs import NUM_INTS, Bucket, Floats, Inputs, Row, pack_rows, pad_inputs, step_sizes
from podquant.engine.slots import NUM_ENDS
from podquant.families.registry import read_model_config
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh

LLAMA = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "llama" / "config.json").read_text())
NUMERICS = Numerics("float32", "cpu")


def model(tp: int, scheme: Scheme | None = None, **changes: Any) -> Model:
    config = read_model_config({**LLAMA, **changes}, ())
    return Model(config, lambda module: scheme, NUMERICS, make_mesh("cpu", tp))


def test_leaves_are_the_decoders_arrays_stacked_over_layers() -> None:
    leaves = {".".join(map(str, leaf.path)): leaf for leaf in model(2).leaves}
    assert leaves["segments.0.layers.self_attn.k_proj.weight"].shape == (3, 32, 64)
    assert leaves["segments.0.layers.self_attn.k_proj.weight"].axes == ("layers", "kv_heads", "embed")
    assert leaves["embed_tokens.table.weight"].shape == (512, 64)
    assert len(leaves) == 9 + 3


def test_layers_quantized_alike_are_one_segment() -> None:
    config = read_model_config(LLAMA, ())

    def keep_first(module: str) -> Scheme | None:
        return None if ".layers.0." in module else Scheme("int8")

    def layers(model: Model) -> set[tuple[int | None, ...]]:
        return {tuple(weight.layer for weight in leaf.weights) for leaf in model.leaves}

    assert layers(Model(config, keep_first, NUMERICS, make_mesh("cpu", 1))) == {(None,), (0,), (1, 2)}
    assert layers(model(1)) == {(None,), (0, 1, 2)}


def test_a_shard_has_the_scales_of_every_block_that_it_touches() -> None:
    """456 columns are 114 for each of 4 shards: the first lies in one block of 128, the others in two."""
    scheme = Scheme("int8", None, (128, 128))
    leaves = {leaf.path[-2:]: leaf for leaf in model(4, scheme, intermediate_size=456).leaves}
    assert leaves["down_proj", "weight"].shape == (3, 64, 456)
    assert leaves["down_proj", "weight_scale"].shape == (3, 64, 8)
    assert leaves["down_proj", "weight_scale"].blocks == (0, 0, 0, 1, 1, 2, 2, 3)


def test_shards_inside_one_block_have_its_scale() -> None:
    scheme = Scheme("int8", None, (128, 128))
    leaves = {leaf.path[-2:]: leaf for leaf in model(8, scheme, head_dim=64, intermediate_size=1024).leaves}
    assert leaves["o_proj", "weight"].shape == (3, 64, 512)
    assert leaves["o_proj", "weight_scale"].blocks == (0, 0, 1, 1, 2, 2, 3, 3)


def test_whole_blocks_on_each_shard_fit() -> None:
    scheme = Scheme("int8", None, (128, 128))
    leaves = {leaf.path[-2:]: leaf for leaf in model(4, scheme, head_dim=64, intermediate_size=512).leaves}
    assert leaves["down_proj", "weight_scale"].shape == (3, 64, 4)
    assert leaves["down_proj", "weight_scale"].axes == ("layers", "embed", "ffn_block")
    # Every output channel has its own row of scales, so a cut along the outputs asks nothing of the blocks.
    assert leaves["q_proj", "weight_scale"].shape == (3, 512, 1)


def test_one_block_over_the_whole_input_may_be_cut() -> None:
    scheme = Scheme("int8", None, (128, 128))
    leaves = {leaf.path[-2:]: leaf for leaf in model(4, scheme, intermediate_size=128).leaves}
    assert leaves["o_proj", "weight"].shape == (3, 64, 64)
    assert leaves["o_proj", "weight_scale"].axes == ("layers", "embed", "one")


def test_table_width_holds_the_context_in_whole_chunks() -> None:
    assert CacheShape(9, 16, 1, 257).table_width == 32
    assert CacheShape(9, 256, 1, 256).table_width == 1


def test_what_is_packed_is_padded_to_the_bucket() -> None:
    shape = CacheShape(9, 16, 2, 256)
    row = Row(1, 5, 3, 40, 7, True, 8, True, False, 1, [4, 6])
    tokens, ends = np.asarray([7, 8, 9], np.int32), np.asarray([[0, 30]], np.int32)
    packed = Inputs(*pack_rows([row], [Floats(0.5, 0.9, 0.1, 1.2, 0.3, 0.4)]), tokens, ends)
    assert packed.rows.shape == (1, NUM_INTS + 2)
    padded = pad_inputs(packed, Bucket(4), shape)
    assert padded.rows.shape == (2, NUM_INTS + 16)
    assert padded.rows[0, : NUM_INTS + 3].tolist() == [1, 5, 3, 40, 7, 1, 8, 1, 0, 1, 4, 6, 0]
    assert padded.rows[1].tolist() == [2] + [0] * 25  # the slot behind the last, and page 0
    np.testing.assert_allclose(padded.floats, np.asarray([[0.5, 0.9, 0.1, 1.2, 0.3, 0.4], [0.0] * 6]), rtol=1e-6)
    assert padded.tokens.tolist() == [7, 8, 9, 0]
    assert padded.ends.tolist() == [[0, 30], *[[-1, -1]] * (NUM_ENDS - 1)]
    assert padded.targets is None
    scored = pad_inputs(packed._replace(targets=tokens), Bucket(4, scores=True), shape)
    assert scored.targets.tolist() == [7, 8, 9, -1]


def test_what_does_not_fit_the_bucket_is_refused() -> None:
    empty = Inputs(*pack_rows([], []), np.zeros(5, np.int32), np.zeros((0, 2), np.int32))
    with pytest.raises(ValueError, match="negative"):
        pad_inputs(empty, Bucket(4), CacheShape(9, 16, 2, 256))


def test_a_cpu_has_a_program_for_each_power_of_two_and_others_have_few() -> None:
    assert step_sizes("cpu", 24) == [1, 2, 4, 8, 16, 24]
    assert step_sizes("tpu", 2048) == [16, 64, 256, 1024, 2048]
    assert step_sizes("tpu", 16) == [16]
