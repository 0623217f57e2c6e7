"""Communication within a process group: checks that the ranks agree, work that one rank does for all, shared errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TEXT_BYTES, MAX_DESCRIPTION = 8192, 100
FAILED_DIGEST = 2**57  # above any digest of 56 bits
POLL_SECONDS = 0.5
T = TypeVar("T")


class OtherRankError(ValueError):
    """An error of another rank of the group, raised on every rank."""


class Ranks(NamedTuple):
    """A process group as this process sees it: the group, the rank of this process and the number of ranks."""

    group: Any
    rank: int
    world_size: int

    def row_ids(self, rows: Tensor) -> Tensor:
        """Ids of the rows of this rank, [N], that differ from those of every other rank."""
        return torch.arange(len(rows), device=rows.device) * self.world_size + self.rank


def ranks_of(group: Any) -> Ranks:
    """Returns the ranks of `group`; raises unless it is a process group that this process belongs to."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group needs torch.distributed: call torch.distributed.init_process_group() first")
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # returned by new_group() to a process outside the group
        raise ValueError("group must be one that this process belongs to: got one of other ranks")
    if not isinstance(group, dist.ProcessGroup):
        expected = "a process group (torch.distributed.group.WORLD is all ranks), or None for this process alone"
        raise TypeError(f"group must be {expected}: got {type(group).__name__}")
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


def check_same_on_all_ranks(ranks: Ranks, device: torch.device, arguments: Mapping[str, object]) -> None:
    """Raises on every rank if `arguments` differ between ranks: otherwise some ranks would wait forever."""
    with agreement(ranks, device, arguments):
        pass


@contextmanager
def agreement(ranks: Ranks, device: torch.device, arguments: Mapping[str, object]) -> Iterator[None]:
    """Raises an error of the block on every rank, also if only one rank has it; or an error if `arguments` differ.

    Costs one all-reduce of two integers.
    """
    text, error = b"", None
    try:
        yield
        text = json.dumps({name: describe(value)[:MAX_DESCRIPTION] for name, value in arguments.items()}).encode()
    except Exception as caught:
        error = caught
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    # The maxima of digest and -digest add up to 0 only if all digests are equal.
    extremes = torch.tensor([digest, -digest] if error is None else [FAILED_DIGEST, FAILED_DIGEST], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks.group)
    difference = int(extremes.sum())
    if difference == 0:
        return
    if difference == 2 * FAILED_DIGEST:
        _raise_on_all_ranks(error, ranks, device)
    _raise_difference([json.loads(described) for described in _gather_texts(text, ranks, device)])


def _raise_difference(descriptions: list[dict[str, str]]) -> None:
    """Raises ValueError for the first argument whose descriptions, one dictionary per rank, differ."""
    for name in dict.fromkeys(chain.from_iterable(descriptions)):
        values = [description.get(name, "nothing") for description in descriptions]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{name} must be alike on every rank of the group: "
                f"got {values[0]} on rank 0 and {values[other]} on rank {other}"
            )


def check_none_failed(ranks: Ranks, device: torch.device, error: BaseException | None) -> None:
    """Raises on every rank if one of them has an error: there its own error, elsewhere one that names the rank."""
    failed = torch.tensor([int(error is not None)], device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=ranks.group)
    if int(failed):
        _raise_on_all_ranks(error, ranks, device)


def _raise_on_all_ranks(error: BaseException | None, ranks: Ranks, device: torch.device) -> NoReturn:
    texts = _gather_texts(b"" if error is None else f"{type(error).__name__}: {error}".encode(), ranks, device)
    if error is not None:
        raise error
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text.strip())
    raise OtherRankError(f"rank {rank} of the group met an error: {text.decode(errors='replace').strip()}")


def run_on_each(work: Callable[[], T], ranks: Ranks, device: torch.device) -> T:
    """Returns what `work()` returns on this rank; an error on one rank is raised on every rank."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    check_none_failed(ranks, device, error)
    return result  # type: ignore[return-value]


def run_on_first(work: Callable[[], T], ranks: Ranks, device: torch.device) -> T | None:
    """Returns what `work()` returns on the first rank, None elsewhere; an error of it is raised on every rank.

    Meanwhile the ranks communicate every `POLL_SECONDS`: no collective waits as long as the work takes, so none times
    out, and the end of one process ends the others.
    """

    def run_on_device() -> T:  # each thread has its own current CUDA device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_on_device) if ranks.rank == 0 else None
        done = torch.zeros(1, dtype=torch.int64, device=device)
        while not int(done):
            if future is not None:
                done[0] = int(bool(wait([future], timeout=POLL_SECONDS).done))
            dist.all_reduce(done, dist.ReduceOp.MAX, group=ranks.group)
    check_none_failed(ranks, device, None if future is None else future.exception())
    return None if future is None else future.result()


def collective_device(ranks: Ranks) -> torch.device:
    """Device for collectives on CPU data: NCCL needs CUDA tensors, gloo takes CPU tensors."""
    needs_cuda = dist.get_backend(ranks.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if needs_cuda else torch.device("cpu")


def _gather_texts(text: bytes, ranks: Ranks, device: torch.device) -> list[bytes]:
    """Texts of all ranks, cut or padded with spaces to a common length."""
    padded = torch.frombuffer(bytearray(text[:TEXT_BYTES].ljust(TEXT_BYTES)), dtype=torch.uint8)
    return [bytes(row.tolist()) for row in all_gather(padded.to(device), ranks).cpu().view(ranks.world_size, -1)]


def describe(value: object) -> str:
    """Text of the part of an argument that must be the same on all ranks."""
    if isinstance(value, Tensor):
        shape = ", ".join(["rows", *map(str, value.shape[1:])][: value.ndim])
        with_grad = " that requires grad" if value.requires_grad and torch.is_grad_enabled() else ""
        on_device = f" on {value.device.type}" if value.ndim and value.device.type != "cpu" else ""
        return f"[{shape}] {str(value.dtype).removeprefix('torch.')}{on_device}{with_grad}"
    if isinstance(value, Real) and not isinstance(value, bool):  # equal numbers of numpy and Python are alike
        number = float(value)
        return repr(number).removesuffix(".0") if number == value else str(value)
    if isinstance(value, partial):
        return f"{describe(value.func)} of {describe(value.args)} {describe(value.keywords)}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={describe(entry)}" for key, entry in value.items())
    if is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{type(value).__name__}({describe(entries)})"
    if callable(value):  # by name: its address differs between processes
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)


def all_gather(rows: Tensor, ranks: Ranks) -> Tensor:
    """Gathers equally many rows from each rank, in rank order."""
    gathered = rows.new_empty(ranks.world_size * len(rows), *rows.shape[1:])
    # The name since torch 2.13, else the earlier one; the same in reduce_scatter.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(gathered, rows, group=ranks.group)
    return gathered


def reduce_scatter(rows: Tensor, ranks: Ranks) -> Tensor:
    """Sums the rows over the ranks, and returns this rank's equal part of them."""
    own = rows.new_empty(len(rows) // ranks.world_size, *rows.shape[1:])
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(own, rows, group=ranks.group)
    return own
