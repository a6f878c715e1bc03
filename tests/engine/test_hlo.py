"""Bytes read off scheduled HLO, of small programs in the compiler's own words, counted by hand."""

from __future__ import annotations

import pytest

from podquant.engine.hlo import Instruction, Program, arrays_of

CARRIED = (
    "(s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, s8[4,128,256]{2,1,0:T(32,128)(4,1)}, "
    "bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=4*/s32[8]{0:T(128)S(1)})"
)
LOOP = """HloModule jit_step, is_scheduled=true

%fused_dot (param_0: s8[4,128,256], param_1: s32[], param_2: bf16[8,256]) -> bf16[8,128] {
  %param_0 = s8[4,128,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice.1 = s8[1,128,256]{2,1,0:T(8,128)(4,1)} dynamic-slice(%param_0, %param_1, %zero, %zero)
  %flat = s8[128,256]{1,0:T(8,128)(4,1)} bitcast(%slice.1)
  %param_2 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  ROOT %dot = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convolution(%param_2, %flat), dim_labels=bf_oi->bf
}

%fused_write (param_0.1: bf16[64,128], param_1.1: s32[8], param_2.1: bf16[8,128]) -> bf16[64,128] {
  %param_0.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[8]{0:T(128)S(1)} parameter(1)
  %param_2.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  ROOT %put = bf16[64,128]{1,0:T(8,128)(2,1)} scatter(%param_0.1, %param_1.1, %param_2.1), to_apply=%last
}

%last (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  ROOT %b = bf16[]{:T(256)} parameter(1)
}

%body (carried: (s32[], bf16[8,256], s8[4,128,256], bf16[64,128], s32[8])) -> (s32[]) {
  %carried = CARRIED parameter(0)
  %count = s32[]{:T(128)S(6)} get-tuple-element(%carried), index=0
  %x = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carried), index=1
  %w = s8[4,128,256]{2,1,0:T(32,128)(4,1)} get-tuple-element(%carried), index=2
  %cache = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=3
  %rows = s32[8]{0:T(128)S(1)} get-tuple-element(%carried), index=4
  %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %count, %x), kind=kOutput, calls=%fused_dot
  %cache.1 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%cache, %rows, %y), kind=kCustom, calls=%fused_write
  %sum = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, to_apply=%last
  ROOT %next = CARRIED tuple(%count, %sum, %w, %cache.1, %rows)
}

%condition (carried.1: (s32[], bf16[8,256], s8[4,128,256], bf16[64,128], s32[8])) -> pred[] {
  %carried.1 = CARRIED parameter(0)
  %count.1 = s32[]{:T(128)S(6)} get-tuple-element(%carried.1), index=0
  %limit = s32[]{:T(128)S(6)} LIMIT
  ROOT %less = pred[]{:T(512)S(6)} compare(%count.1, %limit), direction=LT
}

ENTRY %main (p0: bf16[8,256], p1: s8[4,128,256], p2: bf16[64,128], p3: s32[8]) -> bf16[64,128] {
  %p0 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s8[4,128,256]{2,1,0:T(32,128)(4,1)} parameter(1)
  %p2 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %p3 = s32[8]{0:T(128)} parameter(3)
  %copy-start = (bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[8,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p0)
  %copy-done = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %begin = s32[]{:T(128)S(6)} constant(0)
  %ids = s32[8]{0:T(128)S(1)} copy(%p3)
  %first = CARRIED tuple(%begin, %copy-done, %p1, %p2, %ids)
  %loop = CARRIED while(%first), condition=%condition, body=%body
  ROOT %result = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=3
}
""".replace("CARRIED", CARRIED)
BODY = 128 * 256 + 8 * 128 * 2
"""A layer of codes, and eight rows written; everything else lies in VMEM, or is the same array."""
BEFORE = 8 * 256 * 2 + 128 * 4
"""The activations are fetched, and the row numbers, in a whole tile."""


def test_a_loop_over_a_constant_is_counted_as_often_as_it_runs() -> None:
    program = Program(LOOP.replace("LIMIT", "constant(4)"))
    assert program.hbm_bytes == BEFORE + 4 * BODY
    assert program.collectives == {"all-reduce": 4}


def test_a_loop_over_a_value_is_counted_as_the_caller_says() -> None:
    asked: list[str] = []
    text = LOOP.replace("LIMIT", "get-tuple-element(%carried.1), index=0")

    def trips(loop: Instruction) -> float:
        asked.append(loop.name)
        return 2.5

    program = Program(text, trips)
    assert program.hbm_bytes == BEFORE + 2.5 * BODY
    assert set(asked) == {"%loop"}


def test_an_array_that_is_used_whole_is_counted_whole() -> None:
    whole = LOOP.replace("convolution(%param_2, %flat)", "convolution(%param_2, %flat, %param_0)")
    assert Program(whole.replace("LIMIT", "constant(4)")).hbm_bytes == BEFORE + 4 * (BODY + 3 * 128 * 256)


def test_of_branches_the_cheapest_counts() -> None:
    text = """HloModule jit_step

%nothing (a: f32[8,128]) -> f32[8,128] {
  ROOT %a = f32[8,128]{1,0:T(8,128)} parameter(0)
}

%double (b: f32[8,128]) -> f32[8,128] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %twice = f32[8,128]{1,0:T(8,128)} add(%b, %b)
}

ENTRY %main (p0: f32[8,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %chosen = f32[8,128]{1,0:T(8,128)} conditional(%p1, %p0, %p0), branch_computations={%nothing, %double}
}
"""
    assert Program(text).hbm_bytes == 0
    assert Program(text.replace("{%nothing, %double}", "{%double}")).hbm_bytes == 2 * 8 * 128 * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[3,64]{1,0:T(8,128)(2,1)}", [(8 * 128 * 2, True)]),
        ("bf16[3,64]{0,1:T(8,128)(2,1)}", [(128 * 64 * 2, True)]),
        ("f32[32,128,1]{1,2,0:T(1,128)}", [(32 * 128 * 4, True)]),
        ("(s8[2,2]{1,0:S(1)}, s4[10]{0}, pred[7]{0}, token[])", [(4, False), (5, True), (7, True), (0, True)]),
        ("f8e4m3fn[16,16]{1,0:T(8,128)(4,1)}", [(16 * 128, True)]),
    ],
)
def test_arrays_take_whole_tiles(text: str, expected: list[tuple[float, bool]]) -> None:
    assert list(arrays_of(text)) == expected


def test_what_the_run_before_has_fetched_is_counted_once() -> None:
    text = """HloModule jit_step

ENTRY %main (p0: f32[8,128]) -> f32[8,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %first = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p0), cross_program_prefetch_index=0
  %there = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%first)
  %last = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p0)
  %again = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%last)
  ROOT %sum = f32[8,128]{1,0:T(8,128)S(1)} add(%there, %again)
}
"""  # noqa: E501
    assert Program(text).hbm_bytes == 8 * 128 * 4
    alone = text.replace("copy-start(%p0)\n", "copy-start(%there)\n")
    assert Program(alone).hbm_bytes == 2 * 8 * 128 * 4


def test_a_slice_that_is_fetched_is_counted_by_its_own_size() -> None:
    text = """HloModule jit_step

ENTRY %main (p0: s8[4096]) -> s8[1024] {
  %p0 = s8[4096]{0:T(1024)(128)(4,1)} parameter(0)
  %start = ((s8[4096]{0:T(1024)(128)(4,1)}), s8[1024]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%p0)
  ROOT %done = s8[1024]{0:T(1024)(128)(4,1)S(1)} slice-done(%start)
}
"""
    assert Program(text).hbm_bytes == 1024
