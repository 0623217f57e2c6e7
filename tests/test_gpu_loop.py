"""The counter of inner loops, on listings small enough to count by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.gpu.flow import find_loops, parse
from benchmarks.gpu.loop import LoopCost, Tile, count_loops
from benchmarks.gpu.traffic import feature_bytes

# 4 warps, 64 x 8 pairs: an instruction of each warp is 1/4 slot of a pair. A product of D = 16 is one instruction.
TILE = Tile(architecture=90, rows=64, columns=8, depth=16, warps=4)
PRODUCT = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"


def listing(text: str) -> str:
    """What the disassembler prints: an instruction each 16 bytes, jumps to the address of a label."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels, code = {}, []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{16 * len(code):x}"
        else:
            code.append(line)
    for label, address in labels.items():
        code = [line.replace(f" {label}", f" {address}") for line in code]
    return "\n".join(
        f"        /*{16 * at:04x}*/    {line} ;    /* 0x000000000000794d */\n" + " " * 60 + "/* 0x000fea0003800000 */"
        for at, line in enumerate(code)
    )


def count(text: str, tile: Tile = TILE) -> list[LoopCost]:
    return count_loops(listing(text), tile)


def slots(cost: LoopCost) -> tuple[float, float]:
    return 4 * cost.slots, 4 * cost.slots_masked


MASKED = f"""
    LDG.E R1, [R2.64]
    loop:
    LDG.E.64 R4, [R2.64]
    {PRODUCT}
    @P0 BRA unmasked
    FSEL R1, R2, -INF, P1
    @!P2 FSEL R3, R4, -INF, P1
    unmasked:
    MUFU.EX2 R5, R6
    MUFU.EX2 R7, R8
    @!P1 BRA loop
    EXIT
    end:
    BRA end
"""


def test_a_mask_is_on_the_dearest_path_alone() -> None:
    (cost,) = count(MASKED)
    assert slots(cost) == (6, 8)
    assert (cost.mufu, cost.loads) == (2 / 4, 1)
    assert cost.tensor == 2 * 64 * 8 * 16 / 4096 * 16 / (64 * 8)


def test_predicated_instructions_are_issued() -> None:
    (cost,) = count(MASKED.replace("FSEL R1", "@P3 FSEL R1").replace("MUFU.EX2 R7", "@!PT MUFU.EX2 R7"))
    assert slots(cost) == (6, 8)


def test_a_loop_over_features_counts_as_often_as_it_runs() -> None:
    text = f"""
        loop:
        IADD3 R1, R1, 0x1, RZ
        @!P0 BRA after
        inner:
        LDGSTS.E.BYPASS.128 [R19], desc[UR14][R22.64], P6
        {PRODUCT}
        @P1 BRA inner
        after:
        MUFU.EX2 R5, R6
        @P2 BRA loop
        EXIT
    """
    (cost,) = count(text, TILE._replace(depth=64, steps=4))
    assert slots(cost) == (2 + 4 * 3 + 2,) * 2  # the way around the products is no path of a tile
    assert cost.loads == 0


def test_the_innermost_loop_that_has_all_is_counted() -> None:
    """A loop over tiles of rows, with an exponential of its own, around the loop over columns and after a search."""
    text = f"""
        search:
        LDG.E R1, [R2.64]
        @P0 BRA search
        rows:
        MUFU.EX2 R9, R10
        NOP
        loop:
        {PRODUCT}
        MUFU.EX2 R5, R6
        @P1 BRA loop
        @P2 BRA rows
        EXIT
    """
    (cost,) = count(text)
    assert slots(cost) == (3, 3)


def test_two_loops_are_counted_apart_the_cheaper_first() -> None:
    text = f"""
        @P0 BRA one
        two:
        {PRODUCT}
        MUFU.EX2 R5, R6
        MUFU.EX2 R7, R8
        @P1 BRA two
        EXIT
        one:
        {PRODUCT}
        MUFU.EX2 R5, R6
        @P1 BRA one
        EXIT
    """
    assert [slots(cost) for cost in count(text)] == [(3, 3), (4, 4)]


def test_a_wait_in_cold_code_is_on_no_cheapest_path() -> None:
    text = f"""
        loop:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R6
        @!P1 BRA wait
        again:
        {PRODUCT}
        MUFU.EX2 R5, R6
        @P2 BRA loop
        EXIT
        wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R6
        @!P1 BRA wait
        BRA again
    """
    (cost,) = count(text)
    assert slots(cost) == (5, 8)


def test_a_call_that_does_not_return_leaves_a_loop() -> None:
    text = f"""
        loop:
        {PRODUCT}
        inner:
        NOP
        @P1 CALL.REL.NOINC after
        BRA inner
        after:
        MUFU.EX2 R5, R6
        @P2 BRA loop
        EXIT
    """
    (cost,) = count(text)
    assert slots(cost) == (1 + 3 + 2,) * 2


def test_products_of_one_warp_are_shared_out_over_all() -> None:
    """On sm_100 one warp issues the products; their size is not in their names."""
    text = """
        loop:
        BRA.U !UP0, others
        UTCHMMA gdesc[UR14], gdesc[UR8], tmem[UR12], tmem[UR24], idesc[UR25], !UPT
        UTCBAR [UR13], URZ
        NOP
        NOP
        others:
        MUFU.EX2 R5, R6
        @P2 BRA loop
        EXIT
    """
    (cost,) = count(text, TILE._replace(architecture=100))
    assert 4 * cost.slots == 3 + 4 / 4
    assert cost.tensor == 2 * 16 / 8192 * 16


def test_a_kernel_without_a_loop_is_one_tile() -> None:
    text = f"""
        S2R R0, SR_TID.X
        {PRODUCT}
        MUFU.EX2 R5, R6
        @P0 EXIT
        STG.E [R2.64], R5
        EXIT
    """
    (cost,) = count(text)
    assert slots(cost) == (6, 6)


def test_fewer_products_than_the_tile_needs_are_an_error() -> None:
    with pytest.raises(ValueError, match="has 16,384 operations, its tile needs 32,768"):
        count(MASKED, TILE._replace(depth=32))


def test_products_of_tf32_take_twice_the_time_and_other_warps_none_of_them() -> None:
    text = MASKED.replace(PRODUCT, "HMMA.1688.F32.TF32 R36, R32, R24, R36")
    (cost,) = count(text, Tile(architecture=80, rows=16, columns=16, depth=8, warps=2))
    assert cost.tensor == 2 * 2 * (2 * 16 * 8 * 8) / 2048 * 16 / 256


def test_loops_are_nested() -> None:
    blocks = parse(listing("a:\nNOP\nb:\nNOP\n@P0 BRA b\n@P1 BRA a\nEXIT"))
    assert [block.opcodes for block in blocks] == [
        Counter(NOP=1), Counter(NOP=1, BRA=1), Counter(BRA=1), Counter(EXIT=1)
    ]  # fmt: skip
    assert [sorted(loop.blocks) for loop in find_loops(blocks)] == [[1], [0, 1, 2]]


TTGIR = """
    %x = tt.load %a : tensor<64x32x!tt.ptr<bf16>, #blocked>
    %r:2 = scf.for %c = %0 to %n step %1 iter_args(%m = %i) -> (tensor<64xf32>) {
      %v = tt.load %w : tensor<8x!tt.ptr<f32>, #slice>
      %p = ttg.async_copy_global_to_local %y, %z : tensor<8x16x!tt.ptr<bf16>, #blocked> -> <8x16xbf16, #shared>
      %s = scf.for %f = %0 to %d step %1 iter_args(%k = %i) -> (tensor<64x8xf32>) {
        %q = ttg.async_copy_global_to_local %y, %z : tensor<8x16x!tt.ptr<bf16>, #blocked> -> <8x16xbf16, #shared>
        %t = ttng.warp_group_dot %x, %p, %s : !ttg.memdesc<64x16xbf16> * !ttg.memdesc<16x8xbf16> -> tensor<64x8xf32>
        scf.yield %t
      }
      %e = math.exp2 %t : tensor<64x8xf32>
      ttng.async_tma_copy_global_to_local %g[%c, %0] %l, %b : !tt.tensordesc<8x32xbf16, #shared>, -> <8x32xbf16>
      scf.yield %e
    }
"""


def test_bytes_are_those_that_the_inner_loop_loads() -> None:
    """What a loop over features loads ahead of it is not loaded in its last steps; vectors do not count."""
    assert feature_bytes(TTGIR, TILE._replace(steps=3)) == (3 * 8 * 16 * 2 + 8 * 32 * 2) / (64 * 8)
