"""The ranks of a process group: a check that they agree, work that one does for all, errors that all raise."""

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

TEXT_BYTES, DESCRIBED = 8192, 100
FAILED = 2**57  # above any digest of 56 bits
MOMENT = 0.5  # seconds
T = TypeVar("T")


class OtherRankError(ValueError):
    """An error that another rank of the group has raised, and that all ranks raise."""


class Ranks(NamedTuple):
    """The ranks of a process group, and which of them this process is."""

    group: Any
    rank: int
    world_size: int

    def row_ids(self, rows: Tensor) -> Tensor:
        """An id for each row of this rank that no row of another rank has."""
        return torch.arange(len(rows), device=rows.device) * self.world_size + self.rank


def ranks_of(group: Any) -> Ranks:
    """Checks that `group` is a process group that this process belongs to."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group needs torch.distributed: call torch.distributed.init_process_group() first")
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group() hands to a process outside of the group
        raise ValueError("group must be one that this process belongs to: got one of other ranks")
    if not isinstance(group, dist.ProcessGroup):
        expected = "a process group (torch.distributed.group.WORLD is all ranks), or None for this process alone"
        raise TypeError(f"group must be {expected}: got {type(group).__name__}")
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


def check_alike(ranks: Ranks, device: torch.device, arguments: Mapping[str, object]) -> None:
    """Raises on every rank where `arguments` differ between the ranks: otherwise some would wait forever."""
    with agreement(ranks, device, arguments):
        pass


@contextmanager
def agreement(ranks: Ranks, device: torch.device, arguments: Mapping[str, object]) -> Iterator[None]:
    """Raises on every rank what one of them raises inside, or at the end where `arguments` differ: one all-reduce."""
    text, error = b"", None
    try:
        yield
        text = json.dumps({name: _described(value)[:DESCRIBED] for name, value in arguments.items()}).encode()
    except Exception as caught:
        error = caught
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    # The two largest values add up to 0 only where all digests are equal.
    extremes = torch.tensor([digest, -digest] if error is None else [FAILED, FAILED], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks.group)
    difference = int(extremes.sum())
    if difference == 0:
        return
    if difference == 2 * FAILED:
        _raise_for_all(error, ranks, device)
    described = [json.loads(described) for described in _gather_texts(text, ranks, device)]
    for name in dict.fromkeys(chain.from_iterable(described)):
        values = [of_rank.get(name, "nothing") for of_rank in described]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{name} must be alike on every rank of the group: "
                f"got {values[0]} on rank 0 and {values[other]} on rank {other}"
            )


def check_none_failed(ranks: Ranks, device: torch.device, error: BaseException | None) -> None:
    """Raises on every rank where one of them has an error: there that error, elsewhere one that names the rank."""
    failed = torch.tensor([int(error is not None)], device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=ranks.group)
    if int(failed):
        _raise_for_all(error, ranks, device)


def _raise_for_all(error: BaseException | None, ranks: Ranks, device: torch.device) -> NoReturn:
    texts = _gather_texts(b"" if error is None else f"{type(error).__name__}: {error}".encode(), ranks, device)
    if error is not None:
        raise error
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text.strip())
    raise OtherRankError(f"rank {rank} of the group met an error: {text.decode(errors='replace').strip()}")


def work_of_each(work: Callable[[], T], ranks: Ranks, device: torch.device) -> T:
    """Returns what `work()` returns on this rank; an error on one rank is raised on every rank."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    check_none_failed(ranks, device, error)
    return result  # type: ignore[return-value]


def work_of_first(work: Callable[[], T], ranks: Ranks, device: torch.device) -> T | None:
    """Returns what `work()` returns on the first rank, None elsewhere; an error of it is raised on every rank.

    Meanwhile the ranks communicate every `MOMENT`: no collective lasts as long as the work and times out, and a rank
    that is gone ends the others.
    """

    def on_device() -> T:  # the current CUDA device is a thread's own
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(on_device) if ranks.rank == 0 else None
        done = torch.zeros(1, dtype=torch.int64, device=device)
        while not int(done):
            if future is not None:
                done[0] = int(bool(wait([future], timeout=MOMENT).done))
            dist.all_reduce(done, dist.ReduceOp.MAX, group=ranks.group)
    check_none_failed(ranks, device, None if future is None else future.exception())
    return None if future is None else future.result()


def meeting_device(ranks: Ranks) -> torch.device:
    """Device of the tensors through which the ranks compare and share values: a GPU with NCCL, else the CPU."""
    on_gpus = dist.get_backend(ranks.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def _gather_texts(text: bytes, ranks: Ranks, device: torch.device) -> list[bytes]:
    """Texts of all ranks, cut or padded with spaces to a common length."""
    padded = torch.frombuffer(bytearray(text[:TEXT_BYTES].ljust(TEXT_BYTES)), dtype=torch.uint8)
    return [bytes(row.tolist()) for row in all_gather(padded.to(device), ranks).cpu().view(ranks.world_size, -1)]


def _described(value: object) -> str:
    """Text of the part of an argument that must be the same on all ranks."""
    if isinstance(value, Tensor):
        shape = ", ".join(["rows", *map(str, value.shape[1:])][: value.ndim])
        with_grad = " that requires grad" if value.requires_grad and torch.is_grad_enabled() else ""
        on_device = f" on {value.device.type}" if value.ndim and value.device.type != "cpu" else ""
        return f"[{shape}] {str(value.dtype).removeprefix('torch.')}{on_device}{with_grad}"
    if isinstance(value, Real) and not isinstance(value, bool):  # numpy's and Python's are alike where they are equal
        number = float(value)
        return repr(number).removesuffix(".0") if number == value else str(value)
    if isinstance(value, partial):
        return f"{_described(value.func)} of {_described(value.args)} {_described(value.keywords)}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_described(of_name)}" for name, of_name in value.items())
    if is_dataclass(value) and not isinstance(value, type):
        of_fields = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{type(value).__name__}({_described(of_fields)})"
    if callable(value):  # by name: its address differs between processes
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)


def all_gather(rows: Tensor, ranks: Ranks) -> Tensor:
    """Rows of all ranks, equally many of each, in the order of the ranks."""
    gathered = rows.new_empty(ranks.world_size * len(rows), *rows.shape[1:])
    # The name since torch 2.13, else the earlier one; the same in reduce_scatter.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(gathered, rows, group=ranks.group)
    return gathered


def reduce_scatter(rows: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks of this rank's part of the rows."""
    own = rows.new_empty(len(rows) // ranks.world_size, *rows.shape[1:])
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(own, rows, group=ranks.group)
    return own
