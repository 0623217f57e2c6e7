"""Operators and Triton launches of a step, forward and backward, and the host's time beside that of plain PyTorch.

    python -m benchmarks.gpu.launch_count      # prints and writes launches.csv

Counted on CPU tensors with impl="triton": a launch is recorded and computes nothing. An operator counts if it starts a
kernel on a GPU: views and allocations do not. The host's time is that of all code up to Triton's launcher, with the
dispatch of launches or what replaces it (`mcl_kernels/backends/triton_launch.py`): kernels are stubs that do nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import peers
from benchmarks.cases import own_nt_xent, ten_clusters
from benchmarks.conditions import conditions
from benchmarks.gpu.stand_in import dispatch
from benchmarks.measure import Row, write_rows
from mcl_kernels import _traced, clip_loss, masked_info_nce
from mcl_kernels.backends import table
from mcl_kernels.logsumexp import device_plan

PATH = Path(__file__).with_name("launches.csv")
D = 128
ROUNDS = 300  # of a timed step
COLUMNS = ("loss", "labels", "n", "operators", "launches", "eager_operators", "host_us", "eager_host_us", "slower",
           "torch", "processor", "commit")  # fmt: skip

Loss = Callable[..., Tensor]


class Case(NamedTuple):
    """A loss and the same in plain PyTorch, of the same arguments."""

    name: str
    ours: Loss
    eager: Loss
    leaves: tuple[Tensor, ...]
    arguments: tuple[Tensor, ...] = ()

    def step(self, loss: Loss) -> Callable[[], None]:
        """Forward and backward of one of the losses."""
        leaves = [x.clone().requires_grad_() for x in self.leaves]

        def run() -> None:
            for x in leaves:
                x.grad = None
            loss(*leaves, *self.arguments).backward()  # type: ignore[no-untyped-call]

        return run


def own_queue(query: Tensor, positive: Tensor, queue: Tensor, *labels: Tensor) -> Tensor:
    """The loss of MoCo with all rows normalised by the loss, as by default."""
    return masked_info_nce(query, queue, *labels, positive=positive, temperature=peers.TEMPERATURE, impl="triton")


def eager_queue(query: Tensor, positive: Tensor, queue: Tensor, *labels: Tensor) -> Tensor:
    """The same by MoCo's code, which has no labels."""
    return peers.dense_moco(query, F.normalize(positive, dim=1), F.normalize(queue, dim=1))


def own_clip(image: Tensor, text: Tensor, logit_scale: Tensor, *labels: Tensor) -> Tensor:
    """CLIP's loss of rows of unit length."""
    return clip_loss(image, text, *labels, logit_scale=logit_scale, impl="triton")


def eager_clip(image: Tensor, text: Tensor, logit_scale: Tensor, *labels: Tensor) -> Tensor:
    """The same by open_clip's code, which has no labels."""
    return peers.dense_clip(image, text, logit_scale)


def make_cases(n: int) -> list[Case]:
    """Cases of n samples, without labels and with those of ten clusters."""
    a, b, queue = torch.randn(3, n, D, generator=torch.Generator().manual_seed(0))
    cases = []
    for labels in ((), (ten_clusters(n),)):
        views = Case("nt_xent", lambda *x: own_nt_xent(*x, impl="triton"), peers.dense_nt_xent, (a, b), labels)
        rows = (F.normalize(a, dim=1), F.normalize(b, dim=1), torch.tensor(20.0))
        keys = Case("masked_info_nce, queue", own_queue, eager_queue, (a,), (b, queue, *labels * 2))
        cases += [views, Case("clip_loss", own_clip, eager_clip, rows, labels), keys]
    return cases


class Operators(TorchDispatchMode):
    """Counts the operators that start a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.returns)
        written = any(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        if written and not is_view and "empty" not in function.__name__:
            self.counted[function.__name__] += 1
        return result


@contextmanager
def recorded_launches() -> Iterator[Counter[str]]:
    """Lets impl="triton" take CPU tensors, and counts its launches by the names of kernels in place of launching."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    counted: Counter[str] = Counter()

    def record(self: Any, *arguments: Any, **options: Any) -> None:
        counted[self.fn.__name__] += 1

    available = table.TABLE["triton"]._replace(unavailable_reason=lambda device: None)
    with (
        patch.dict(table.TABLE, {"triton": available}),
        patch.object(device_plan, "_is_built", lambda device: False),
        patch.object(JITFunction, "run", record),
        patch.object(InterpretedFunction, "run", record),
    ):
        yield counted


def count(step: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Operators and Triton launches of a step, by name."""
    with recorded_launches() as launches, patch.object(_traced, "_get_current_dispatch_mode", lambda: None):
        step()
        launches.clear()
        with Operators() as operators:
            step()
    return operators.counted, launches


def host_seconds(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each step, called in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def count_case(case: Case, n: int) -> Row:
    """Row of a case: counts of both losses and the host's times."""
    operators, launches = count(case.step(case.ours))
    eager, _ = count(case.step(case.eager))
    with dispatch(), patch.object(device_plan, "_is_built", lambda device: False):
        times = host_seconds({"ours": case.step(case.ours), "eager": case.step(case.eager)})
    return {
        "loss": case.name, "labels": "yes" if any(not x.is_floating_point() for x in case.arguments) else "no", "n": n,
        "operators": operators.total(), "launches": launches.total(), "eager_operators": eager.total(),
        "host_us": 1e6 * times["ours"], "eager_host_us": 1e6 * times["eager"],
        "slower": times["ours"] / times["eager"],
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    found = conditions(torch.device("cpu"))
    common = {"torch": torch.__version__, "processor": found["processor"], "commit": found["commit"]}
    rows = []
    # The eager loss computes on the CPU: with few rows nearly all of its time is that of the host, as on a GPU.
    for case in make_cases(16):
        rows.append(count_case(case, 16) | common)
        print(*(f"{name}={rows[-1][name]}" for name in COLUMNS[:9]))
    write_rows(PATH, COLUMNS, rows)


if __name__ == "__main__":
    main()
