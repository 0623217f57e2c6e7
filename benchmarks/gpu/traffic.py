"""Bytes of features that a kernel's inner loop moves between L2 and a multiprocessor, from the compiler's own listing.

A tensor that is loaded, added to by atomics or stored counts once, whatever threads it is spread over; vectors, which
are one row of a tile's many, do not count.
"""

from __future__ import annotations

import math
import re
from collections import Counter

from benchmarks.gpu.loop import Tile

LOOP = re.compile(r"scf\.(?:for|while)\b")
PRODUCTS = re.compile(r"(?:dot|mma)\b .*? : ")
MOVES = re.compile(r"(?:tt\.load|tt\.store|tt\.atomic_rmw|async_copy_global_to_local|async_tma_copy_global_to_local)\b")
MATRIX = re.compile(r"tensor(?:desc)?<((?:\d+x){2,})(?:!tt\.ptr<)?[a-z]+(\d+)")


def feature_bytes(ttgir: str, tile: Tile) -> float:
    """Bytes for each pair of the innermost loop with products and exponentials in Triton's GPU dialect.

    Without such a loop, those of the whole kernel.
    """
    lines = ttgir.splitlines()
    loops = [range(at, _end(lines, at)) for at, line in enumerate(lines) if LOOP.search(line)]
    found = [loop for loop in loops if _has(lines, loop, "math.exp") and _has(lines, loop, PRODUCTS)]
    loop = min(found, key=len, default=range(len(lines)))
    inner = [each for each in loops if each != loop and each[0] in loop and _has(lines, each, PRODUCTS)]
    repeated = Counter(moved for each in inner for at in each if (moved := _moved(lines[at])))
    outside = [moved for at in loop if not any(at in each for each in inner) and (moved := _moved(lines[at]))]
    # The loop over features loads ahead: what is loaded before it is not loaded in its last iterations.
    once = sum(_bytes(moved) for moved in outside if moved not in repeated)
    steps = sum(_bytes(moved) * count * tile.steps for moved, count in repeated.items())
    return (once + steps) / (tile.rows * tile.columns)


def _end(lines: list[str], start: int) -> int:
    """Line after the one that closes a region."""
    indent = re.match(r" *", lines[start])[0]  # type: ignore[index]
    return next(at for at in range(start + 1, len(lines)) if re.match(rf"{indent}}}(?! do)", lines[at])) + 1


def _has(lines: list[str], loop: range, text: str | re.Pattern[str]) -> bool:
    return any(re.search(text, lines[at]) for at in loop)


def _moved(line: str) -> tuple[str, str, str] | None:
    """Kind, shape and bits of the matrix that a line moves."""
    move, matrix = MOVES.search(line), MATRIX.search(line)
    return (move[0], matrix[1], matrix[2]) if move and matrix else None


def _bytes(moved: tuple[str, str, str]) -> int:
    _, shape, bits = moved
    return math.prod(int(size) for size in shape.split("x")[:-1]) * int(bits) // 8
