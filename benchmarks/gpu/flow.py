"""Control flow of a kernel's machine code: its loops, and what is issued on the best way through one of them.

    loops = find_loops(blocks := parse(listing))       listing: what `cuobjdump -sass` prints of one function
    opcodes = best_path(blocks, loops, loop, inside, key)

A path of a loop leads from its first block back to it. A loop within it counts as one block.
Predicated instructions count: they are issued, whatever their predicate.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Opcodes = Counter[str]  # how often each instruction is issued, by its name with all its suffixes

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
BRANCHES = ("BRA", "JMP", "CALL")  # the compiler also leaves loops by a call that does not return
ENDS = ("EXIT", "RET", "BRX", "JMX")


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Address of a branch's target, None for another instruction."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name in BRANCHES else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A branch has its condition before its name or as an operand."""
        if self.name not in ("BRA", "JMP", *ENDS):
            return True
        return bool(self.predicate or re.match(r"!?U?P\d", self.operands) or ".DIV" in self.opcode)


class Block(NamedTuple):
    """Instructions that are issued one after the other."""

    opcodes: Opcodes
    successors: tuple[int, ...]


class Loop(NamedTuple):
    """A natural loop: its first block, through which every path into it leads, and all its blocks."""

    first: int
    blocks: frozenset[int]


def parse(listing: str) -> list[Block]:
    """Blocks of a function in the order of their addresses; the first is its entry."""
    code = [
        Instruction(int(address, 16), predicate, opcode, operands.strip())
        for address, predicate, opcode, operands in INSTRUCTION.findall(listing)
    ]
    after_jumps = (b.address for a, b in itertools.pairwise(code) if a.name in (*BRANCHES, *ENDS))
    starts = sorted({code[0].address, *after_jumps, *(each.target for each in code if each.target is not None)})
    members: list[list[Instruction]] = [[] for _ in starts]
    for each in code:
        members[bisect_right(starts, each.address) - 1].append(each)
    blocks = []
    for index, block in enumerate(members):
        last = block[-1]
        successors = [] if last.target is None else [starts.index(last.target)]
        if last.falls_through and index + 1 < len(members):
            successors.append(index + 1)
        blocks.append(Block(Counter(each.opcode for each in block), tuple(dict.fromkeys(successors))))
    return blocks


def find_loops(blocks: list[Block]) -> list[Loop]:
    """Natural loops, the smallest first; those with one first block are one loop."""
    predecessors: list[set[int]] = [set() for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].add(index)
    dominators = _dominators(blocks, predecessors)
    bodies: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for first in dominators[index].intersection(block.successors):
            body, reached = bodies.setdefault(first, {first}), [index]
            while reached:
                if (current := reached.pop()) not in body:
                    body.add(current)
                    reached.extend(predecessors[current])
    return sorted((Loop(first, frozenset(body)) for first, body in bodies.items()), key=lambda loop: len(loop.blocks))


def _dominators(blocks: list[Block], predecessors: list[set[int]]) -> list[set[int]]:
    """Blocks through which every path to a block leads; none for a block that cannot be reached."""
    reachable, order = {0}, [0]
    for index in order:
        for successor in blocks[index].successors:
            if successor not in reachable:
                reachable.add(successor)
                order.append(successor)
    dominators = [set(reachable) if index in reachable else set() for index in range(len(blocks))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in order[1:]:
            found = set.intersection(*(dominators[each] for each in predecessors[index] & reachable)) | {index}
            changed |= found != dominators[index]
            dominators[index] = found
    return dominators


def children(loops: list[Loop], loop: Loop) -> list[Loop]:
    """Loops directly within a loop."""
    inner = [each for each in loops if each.blocks < loop.blocks]
    return [each for each in inner if not any(each.blocks < other.blocks for other in inner)]


def best_path(
    blocks: list[Block], loops: list[Loop], loop: Loop, inside: Callable[[Loop], Opcodes], key: Callable[[Opcodes], Any]
) -> Opcodes:
    """Instructions of an iteration of a loop, on the path with the largest key, which must be a function of sums.

    `inside` gives the instructions that are counted for a loop directly within it.
    """
    child_of = {block: child for child in children(loops, loop) for block in child.blocks}
    best: dict[int, Opcodes | None] = {}

    def visit(index: int) -> Iterator[int]:
        """Yields the blocks that have to be visited first, then sets the best path from a block to the loop's end."""
        child = child_of.get(index)
        members = {index} if child is None else child.blocks
        own = blocks[index].opcodes if child is None else inside(child)
        left = {successor for member in members for successor in blocks[member].successors} - members
        ways = [Counter[str]()] if loop.first in left | ({index} & set(blocks[index].successors)) else []
        for successor in sorted(left & loop.blocks - {loop.first}):
            yield successor
            ways += [way for way in (best[successor],) if way is not None]
        best[index] = max((own + way for way in ways), key=key, default=None)

    waiting = [visit(loop.first)]
    while waiting:
        needed = next(waiting[-1], None)
        if needed is None:
            waiting.pop()
        elif needed not in best:
            waiting.append(visit(needed))
    path = best[loop.first]
    assert path is not None, "a loop has a path back to its first block"
    return path
