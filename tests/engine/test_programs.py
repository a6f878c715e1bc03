"""How models are laid out over devices, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from podquant.config.scheme import Scheme
from podquant.engine.programs import NUM_INTS, Bucket, Floats, Row, pack_rows, step_positions
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


def test_positions_of_padding_are_written_to_page_zero() -> None:
    shape = CacheShape(9, 16, 2, 256)
    table = jnp.asarray(np.arange(1, 33, dtype=np.int32).reshape(2, 16))
    starts, lengths = jnp.asarray([15, 0]), jnp.asarray([3, 0])
    at = step_positions(model(1), shape, starts, lengths, starts + lengths, table, 4)
    assert np.asarray(at.positions).tolist() == [[15, 16, 17, 17], [0, 0, 0, 0]]
    assert np.asarray(at.write_pages).tolist() == [1, 2, 2, 0, 0, 0, 0, 0]
    assert np.asarray(at.write_slots).tolist() == [15, 0, 1, 0, 0, 0, 0, 0]


def test_rows_are_padded_to_the_bucket() -> None:
    shape = CacheShape(9, 16, 2, 256)
    row = Row(1, 5, 3, 40, 7, True, 8, True, False, [4, 6])
    rows = pack_rows([row], [Floats(0.5, 0.9, 0.1, 1.2, 0.3, 0.4)], 2, shape)
    assert rows.ints.shape == (2, NUM_INTS + 16)
    assert rows.ints[0, : NUM_INTS + 3].tolist() == [1, 5, 3, 40, 7, 1, 8, 1, 0, 4, 6, 0]
    assert rows.ints[1].tolist() == [2] + [0] * 24  # the slot behind the last, and page 0
    np.testing.assert_allclose(rows.floats, np.asarray([[0.5, 0.9, 0.1, 1.2, 0.3, 0.4], [0.0] * 6]), rtol=1e-6)


def test_a_bucket_of_one_token_is_a_decode_step() -> None:
    assert Bucket(4, 1).is_decode
    assert not Bucket(1, 2).is_decode
