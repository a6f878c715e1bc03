"""Where tensors are cut: by name and shape, and so that the slices cover them."""

from __future__ import annotations

import pytest

from podquant.artifact.slices import Cut, cut_of, cut_of_scales, pieces_of
from podquant.families.declaration import DiskTensor


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("model.layers.0.self_attn.o_proj.weight", 1),
        ("model.layers.0.mlp.down_proj.weight", 1),
        ("model.layers.0.mlp.experts.7.up_proj.weight", 0),
        ("model.layers.0.mlp.experts.7.down_proj.weight", 1),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", 0),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", 1),
        ("model.layers.0.mlp.shared_experts.down_proj.weight", 1),
        ("transformer.h.0.mlp.c_proj.weight", 1),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", 1),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", 0),
        ("gpt_neox.layers.0.attention.dense.weight", 1),
        ("model.decoder.layers.0.self_attn.out_proj.weight", 1),
        ("model.embed_tokens.weight", 0),
        ("lm_head.weight", 0),
        ("model.layers.0.mlp.gate.weight", None),
        ("model.layers.0.mlp.down_proj.bias", None),
        ("model.layers.0.mlp.experts.down_proj", None),
    ],
)
def test_the_name_decides(name: str, axis: int | None) -> None:
    cut = cut_of(name, (8, 12), 4)
    assert (None if cut is None else cut.axis) == axis
    assert cut_of(name, (8, 12), 1) is None


@pytest.mark.parametrize(("declared", "axis"), [(0, 0), (1, 1), (None, None)])
def test_what_the_family_declares_comes_before_the_name(declared: int | None, axis: int | None) -> None:
    """`w2` is the gate of the first Qwens, and what Mixtral's experts put out."""
    cut = cut_of("transformer.h.0.mlp.w2.weight", (8, 12), 4, DiskTensor("", (8, 12), "dense", declared))
    assert (None if cut is None else cut.axis) == axis


@pytest.mark.parametrize("shape", [(), (8,), (8, 12, 2), (0, 8), (8, 0)])
def test_only_matrices_are_cut(shape: tuple[int, ...]) -> None:
    assert cut_of("a.weight", shape, 2) is None


@pytest.mark.parametrize(
    ("size", "tp_size", "bounds"),
    [
        (8, 4, (0, 2, 4, 6, 8)),
        (7, 2, (0, 4, 7)),
        (9, 4, (0, 3, 6, 9, 9)),
        (5, 4, (0, 2, 4, 5, 5)),
        (1, 3, (0, 1, 1, 1)),
    ],
)
def test_slices_are_of_equal_size_but_for_the_last(size: int, tp_size: int, bounds: tuple[int, ...]) -> None:
    assert cut_of("a.weight", (size, 3), tp_size) == Cut(0, bounds)
    assert cut_of("a.down_proj.weight", (3, size), tp_size) == Cut(1, bounds)
    pieces = pieces_of("f", (3, size), Cut(1, bounds), tp_size)
    columns = [column for piece in pieces for column in range(piece.start[1], piece.start[1] + piece.shape[1])]
    assert columns == list(range(size))
    assert [(piece.rank, piece.file) for piece in pieces] == [
        (rank, f"tp-{rank:02d}-of-{tp_size:02d}/f") for rank in range(tp_size)
    ]


@pytest.mark.parametrize(
    ("shape", "tp_size", "block", "bounds"),
    [
        ((8, 12), 4, None, (0, 2, 4, 6, 8)),
        ((9, 12), 4, None, (0, 3, 6, 9, 9)),
        ((512, 12), 2, (128, 4), (0, 2, 4)),
        ((512, 12), 8, (128, 4), None),  # a slice of 64 rows splits a block
        ((300, 12), 2, (50, 4), (0, 3, 6)),
        ((290, 12), 2, (29, 5), (0, 5, 10)),
        ((291, 12), 2, (146, 5), (0, 1, 2)),
        ((5, 12), 2, (8, 5), None),
        ((1, 12), 2, (8, 5), (0, 1, 1)),
    ],
)
def test_scales_go_with_their_slice_unless_a_block_is_split(
    shape: tuple[int, int], tp_size: int, block: tuple[int, int] | None, bounds: tuple[int, ...] | None
) -> None:
    scales = (-(-shape[0] // (block[0] if block else 1)), 1)
    cut = cut_of_scales(cut_of("a.weight", shape, tp_size), scales, block)
    assert (None if cut is None else cut.bounds) == bounds
    assert cut_of_scales(cut_of("a.o_proj.weight", shape, tp_size), scales, block) is None


def test_what_is_not_cut_is_shared() -> None:
    (piece,) = pieces_of("f", (4,), None, 2)
    assert (piece.file, piece.rank, piece.start, piece.shape) == ("shared/f", None, (0,), (4,))
    assert pieces_of("f", (4,), None, 1)[0].file == "f"
