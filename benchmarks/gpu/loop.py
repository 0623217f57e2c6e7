"""Costs of a kernel's inner loop for each pair of rows that it compares, counted in its machine code.

    count_loops(listing, tile) -> a LoopCost for each loop that holds products and exponentials

The loop is the innermost one that holds both; loops of products within it, over features, count `steps` times. A
kernel may have several such loops: one for weights of one exponential, say, and one for those of two. In a kernel
without one, which has a program for each tile, it is the whole code.

Of the paths that compute all products, `slots` is that of the cheapest, for a tile that needs no mask, and
`slots_masked` that of the dearest. An issue slot is an instruction of a thread: one of a warp fills 32.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from benchmarks.gpu.flow import Block, Loop, Opcodes, best_path, find_loops, parse

# Operations of dense bf16 products in a clock of a multiprocessor. HMMA has the rate of sm_80 on each architecture.
TENSOR_RATE = {80: 2048, 90: 4096, 100: 8192}
PRODUCTS = re.compile(r"HG?MMA\.|UTC\w*MMA")
SHAPE = re.compile(r"(HG?MMA)\.(?:(\d+)x(\d+)x(\d+)|(16)(8)(\d+))\.")
EXPONENTIALS = re.compile(r"MUFU\.EX2")
SYNCHRONOUS_LOADS = re.compile(r"LDG\b")
PASSED = "loops of products"  # an entry of Opcodes for those that a path goes through


class Tile(NamedTuple):
    """What an iteration of the loop computes."""

    architecture: int
    rows: int
    columns: int
    depth: int  # multiply-adds on the tensor cores that each pair needs: their sum over all products
    warps: int
    steps: int = 1  # iterations of a loop over features


class LoopCost(NamedTuple):
    """Costs for each pair, and the instructions of a warp that they are made of."""

    slots: float
    slots_masked: float
    mufu: float  # special-function operations
    tensor: float  # 1/16 clocks of the tensor cores
    loads: float  # for each tile, instructions of a warp that wait for global memory
    least: Opcodes  # cheapest path
    most: Opcodes  # dearest path


def count_loops(listing: str, tile: Tile) -> list[LoopCost]:
    """Costs of the loops that hold products and exponentials, the cheapest first.

    `listing` is what `cuobjdump -sass` prints of one kernel, which no table needs to have:

        count_loops(listing, Tile(architecture=90, rows=64, columns=128, depth=128 + 128, warps=4))

    tf32x3 has three products for each of float32.
    """
    blocks = parse(listing)
    loops = find_loops(blocks)
    found = [loop for loop in loops if _has(PRODUCTS, blocks, loop) and _has(EXPONENTIALS, blocks, loop)]
    innermost = [loop for loop in found if not any(other.blocks < loop.blocks for other in found)]
    if not innermost:  # a program for each tile: a loop of one iteration
        blocks = [block if block.successors else block._replace(successors=(0,)) for block in blocks]
        innermost = [Loop(0, frozenset(range(len(blocks))))]
    return sorted((_cost(blocks, loops, loop, tile) for loop in innermost), key=lambda cost: cost.slots)


def _has(instruction: re.Pattern[str], blocks: list[Block], loop: Loop) -> bool:
    return any(instruction.match(opcode) for block in loop.blocks for opcode in blocks[block].opcodes)


def _cost(blocks: list[Block], loops: list[Loop], loop: Loop, tile: Tile) -> LoopCost:
    pairs = tile.rows * tile.columns
    least, most = (_path(blocks, loops, loop, tile.steps, sign) for sign in (-1, 1))
    operations, needed = _operations(least, tile.warps), 2 * tile.depth * pairs
    if 0 < operations < needed:
        print(tile, operations, needed)  # 0 on sm_100, whose instructions do not name their size
        raise ValueError(f"an iteration has {operations:,.0f} operations, its tile needs {needed:,}")
    threads = 32 * tile.warps / pairs
    slots = _total(least)
    if not operations:  # on sm_100 one warp issues the products
        slots += (_total(_path(blocks, loops, loop, tile.steps, sign=-1, issues=True)) - slots) / tile.warps
    return LoopCost(
        slots=slots * threads, slots_masked=_total(most) * threads, mufu=_count(re.compile("MUFU"), least) * threads,
        tensor=_tensor_clocks(most, tile, pairs), loads=_count(SYNCHRONOUS_LOADS, least),
        least=least, most=most,
    )  # fmt: skip


def _path(blocks: list[Block], loops: list[Loop], loop: Loop, steps: int, sign: int, issues: bool = False) -> Opcodes:
    """Instructions of the cheapest (sign -1) or the dearest path (1) among those with all products.

    Those of sm_100 are not required, since one warp alone issues them, unless `issues`.
    """

    def inside(child: Loop) -> Opcodes:
        path = best_path(blocks, loops, child, inside, key)
        if not _has(PRODUCTS, blocks, child):
            return path
        return Counter({opcode: steps * count for opcode, count in path.items()} | {PASSED: 1})  # type: ignore[dict-item]

    def key(opcodes: Opcodes) -> tuple[float, float, float]:
        products = _count(PRODUCTS, opcodes) if issues else _operations(opcodes, warps=4)
        return opcodes[PASSED], products, sign * _total(opcodes)

    return best_path(blocks, loops, loop, inside, key)


def _total(opcodes: Opcodes) -> float:
    return opcodes.total() - opcodes[PASSED]


def _count(instruction: re.Pattern[str], opcodes: Opcodes) -> float:
    return sum(count for opcode, count in opcodes.items() if instruction.match(opcode))


def _operations(opcodes: Opcodes, warps: int, of: str = "") -> float:
    """Operations of the products whose size is in the name of their instruction: each of a warp, or of four warps."""
    operations = 0.0
    for opcode, count in opcodes.items():
        if (found := SHAPE.match(opcode)) and of in opcode:
            m, n, k = (int(size) for size in found.groups()[1:] if size)
            operations += 2 * m * n * k * count * (warps if found[1] == "HMMA" else warps / 4)
    return operations


def _tensor_clocks(opcodes: Opcodes, tile: Tile, pairs: int) -> float:
    """1/16 clocks of the tensor cores for each pair; tf32 takes twice those of bf16."""
    if asynchronous := [opcode for opcode in opcodes if opcode.startswith("UTC") and "MMA" in opcode]:
        operations = 2 * tile.depth * (2 if any("TF32" in each or "QMMA" in each for each in asynchronous) else 1)
        return 16 * operations / TENSOR_RATE[tile.architecture]
    clocks = 0.0
    for name, architecture in (("HMMA", 80), ("HGMMA", 90)):
        own = Counter({opcode: count for opcode, count in opcodes.items() if opcode.startswith(f"{name}.")})
        operations = _operations(own, tile.warps) + _operations(own, tile.warps, of="TF32")
        clocks += operations / TENSOR_RATE[architecture]
    return 16 * clocks / pairs
