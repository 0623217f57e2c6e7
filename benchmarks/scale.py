"""NT-Xent over many ranks, a model, and over a few, measured: `python -m benchmarks.scale`, into scale.csv.

    time = operations / rate of the device + bytes / rate of the network, of the rank that is done last

**The model** counts bytes, operations and memory; it knows no latency and overlaps nothing. Operations and bytes of
ours are those of `plan_exchange`, which the losses decide by; those of the others follow from the formulas below.

**The measurements** are processes of one thread that speak over gloo on this machine. What each sends and receives is
counted and has to be what `plan_exchange` says; seconds are those of a step's slowest process, the median of the steps.
One, two and four processes take turns. With more of them than cores seconds say what a step costs, not what another
rank gains.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.__main__ import conditions
from benchmarks.measure import Row, write_rows
from mcl_kernels import ExchangePlan, nt_xent, plan_exchange
from tests.traffic import count_traffic

HERE = Path(__file__).parent
D = 128
WORLDS = (1, 8, 64, 512, 4096)
OF_RANK = 16 << 10  # samples: of the figure
BATCHES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)  # the whole batch, at every number of ranks
CLUSTERS = 1000
DTYPE = torch.bfloat16

# H100 (SXM) by its data sheet: 989e12 dense bf16 operations a second, of which kernels like these reach less than half;
# 400 Gb/s of InfiniBand for each GPU, as in a DGX H100, of which collectives over many nodes reach most.
OPERATIONS_PER_SECOND = 0.4 * 989e12
BYTES_PER_SECOND = 0.8 * 400e9 / 8

VIEWS, WIDE, INTEGER = 2, 4, 8  # rows of a sample; bytes of fp32, in which gradients are summed, and of an integer

MEASURED_WORLDS = (1, 2, 4)
MEASURED_N, MEASURED_CLUSTERS = 8192, 100
WARM_UP, STEPS, TURNS = 2, 7, 3  # steps of each turn; numbers of processes in turns
ROUNDING = 8  # bytes by which a count may differ from the plan, which rounds the shares of an all-reduce

COLUMNS = (
    "kind", "contender", "labels", "clusters", "world", "batch", "features", "dtype", "sent", "received", "grad_sent",
    "grad_received", "bytes", "bytes_imbalance", "operations", "operations_imbalance", "memory", "seconds", "threads",
    "versions", "processor", "commit",
)  # fmt: skip


class Cost(NamedTuple):
    """Of one step, for each rank: arrays [W]."""

    sent: np.ndarray  # bytes of the forward pass
    received: np.ndarray
    grad_sent: np.ndarray  # of the backward pass
    grad_received: np.ndarray
    operations: np.ndarray
    memory: np.ndarray  # bytes: rows, their gradients, log-sum-exps, logits

    @property
    def bytes(self) -> np.ndarray:
        """The larger of both directions: a network card does both at once."""
        return np.maximum(self.sent + self.grad_sent, self.received + self.grad_received)

    @property
    def seconds(self) -> float:
        return float((self.operations / OPERATIONS_PER_SECOND + self.bytes / BYTES_PER_SECOND).max())


def balanced(n: int, clusters: int) -> list[int]:
    return np.diff(np.linspace(0, n, clusters + 1).round().astype(np.int64)).tolist()


def zipf(n: int, clusters: int) -> list[int]:
    """Cluster k has 1 / (k + 1) of what cluster 0 has."""
    shares = np.cumsum(1 / np.arange(1, clusters + 1))
    return np.diff((n * shares / shares[-1]).round().astype(np.int64), prepend=0).tolist()


LABELS = {"balanced": balanced, "zipf": zipf}


def _held(samples: np.ndarray, itemsize: int) -> np.ndarray:
    """Bytes of these samples' rows in the dtype, of their gradients in fp32 and of their log-sum-exps."""
    return VIEWS * samples * (D * (itemsize + WIDE) + WIDE)


def _of_plan(plan: ExchangePlan, memory: np.ndarray) -> Cost:
    sizes = (plan.sent, plan.received, plan.grad_sent, plan.grad_received, plan.operations)
    return Cost(*(x.numpy() for x in sizes), memory)


def ours_cluster(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """A rank holds its own samples, which it sends away, and those of the clusters that it computes."""
    plan = plan_exchange(sizes, world, features=D, dtype=dtype, exchange="cluster")
    pieces = [(rank, n) for n, ranks in zip(sizes, plan.owners, strict=True) for rank in ranks]
    ranks, samples = np.array(pieces, dtype=np.int64).reshape(-1, 2).T
    here = np.bincount(ranks, weights=samples, minlength=world)
    return _of_plan(plan, _held(sum(sizes) / world + here, dtype.itemsize))


def ours_gather(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """A rank holds its own samples and those of all; it compares its own with those of their clusters only."""
    plan = plan_exchange(sizes, world, features=D, dtype=dtype, exchange="gather")
    return _of_plan(plan, np.full(world, _held(np.float64(sum(sizes) * (1 + 1 / world)), dtype.itemsize)))


def dense_gather(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """open_clip's local_loss with gather_with_grad, and a mask: own rows against all, pairs of other clusters included.

    Keys come by an all-gather and their gradients go back by a reduce-scatter, both in the dtype; labels that a mask
    needs are not counted. 3 products: logits, and the gradients of either side. N / W x N pairs of samples, 4 pairs of
    rows each. Memory: own rows, all rows, and two matrices in the dtype, logits and their gradient: the least there is.
    """
    n = sum(sizes)
    own = n / world
    moved = (n - own) * VIEWS * D * dtype.itemsize
    pairs = VIEWS**2 * own * n
    memory = _held(np.float64(n + own), dtype.itemsize) + 2 * pairs * dtype.itemsize
    return _alike(world, moved, moved, 3 * 2 * D * pairs, float(memory))


def ring(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """Inf-CL: keys travel around a ring of ranks, each of which compares its own rows with whatever passes.

    Forward the keys make W - 1 steps. Backward they do so again, and their gradients, in fp32, W steps: back home.
    5 products over all pairs: the forward pass, and for each of two gradients the logits again (10 are of CLIP, in both
    directions). Memory: own rows, keys here and on their way, gradients of own rows, of keys here and on their way, and
    log-sum-exps; no logits. Keys travel in the dtype here and products are of the dtype: inf-cl itself has fp32.
    """
    n = sum(sizes)
    own = n / world
    rows = VIEWS * own
    keys = (world - 1) * rows * D * dtype.itemsize
    gradients = (world * rows * D * WIDE) if world > 1 else 0.0
    memory = rows * (3 * D * dtype.itemsize + 3 * D * WIDE + WIDE)
    return _alike(world, keys, keys + gradients, 5 * 2 * D * rows * VIEWS * n, memory)


def _alike(world: int, forward: float, backward: float, operations: float, memory: float) -> Cost:
    return Cost(*(np.full(world, x) for x in (forward, forward, backward, backward, operations, memory)))


CONTENDERS: dict[str, Callable[[list[int], int, torch.dtype], Cost]] = {
    "ours, cluster": ours_cluster,
    "ours, gather": ours_gather,
    "dense, gather": dense_gather,
    "ring": ring,
}


def _imbalance(of_ranks: np.ndarray) -> float:
    """The busiest rank's over the mean."""
    mean = float(of_ranks.mean())
    return float(of_ranks.max()) / mean if mean else 1.0


def model_row(contender: str, labels: str, clusters: int, world: int, batch: int) -> Row:
    """Figures of the busiest rank."""
    cost = CONTENDERS[contender](LABELS[labels](batch, clusters), world, DTYPE)
    most = {name: float(of_ranks.max()) for name, of_ranks in cost._asdict().items()}
    return {
        "kind": "model", "contender": contender, "labels": labels, "clusters": clusters, "world": world, "batch": batch,
        "features": D, "dtype": str(DTYPE).removeprefix("torch."), **most, "bytes": float(cost.bytes.max()),
        "bytes_imbalance": _imbalance(cost.bytes), "operations_imbalance": _imbalance(cost.operations),
        "seconds": cost.seconds,
    }  # fmt: skip


def model_rows() -> list[Row]:
    points = sorted({(world, n) for world in WORLDS for n in (*BATCHES, OF_RANK * world)})
    return [
        model_row(contender, labels, CLUSTERS, world, n)
        for labels in LABELS
        for world, n in points
        for contender in CONTENDERS
    ]


def _run_rank(rank: int, world: int, n: int, clusters: int, steps: int, directory: Path) -> None:
    """Writes the seconds of each step and the bytes of one, [[sent, received], [those of backward]]."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    here = slice(rank * n // world, (rank + 1) * n // world)
    views = [torch.randn(2, n, D, generator=torch.Generator().manual_seed(0))[i, here].clone() for i in range(2)]
    views = [view.requires_grad_() for view in views]
    results: dict[str, Any] = {"seconds": {}, "bytes": {}}
    problems = [
        (labels, contender) for labels in LABELS for contender in ("cluster", "gather")[: 1 if world == 1 else 2]
    ]
    labels_of = {labels: labels_at(labels, n, clusters)[here] for labels in LABELS}

    def loss(labels: str, exchange: str) -> torch.Tensor:
        over = {} if world == 1 else {"group": dist.group.WORLD, "exchange": exchange}
        return nt_xent(*views, labels_of[labels], **over)

    for labels, exchange in problems:
        with count_traffic() as traffic:
            value = loss(labels, exchange)
            forward = traffic.bytes.tolist()
            value.backward()
            results["bytes"][f"{labels}, {exchange}"] = [forward, (traffic.bytes - forward).tolist()]
    for step in range(WARM_UP + steps):
        for labels, exchange in problems:  # in turns
            dist.barrier()
            started = time.perf_counter()
            loss(labels, exchange).backward()
            if step >= WARM_UP:
                results["seconds"].setdefault(f"{labels}, {exchange}", []).append(time.perf_counter() - started)
    (directory / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def labels_at(labels: str, n: int, clusters: int) -> torch.Tensor:
    """Of the samples of all ranks, in no order."""
    of_cluster = torch.arange(clusters).repeat_interleave(torch.tensor(LABELS[labels](n, clusters)))
    return of_cluster[torch.randperm(n, generator=torch.Generator().manual_seed(1))]


def run_ranks(world: int, n: int, clusters: int, steps: int) -> list[dict[str, Any]]:
    """What each of `world` new processes wrote."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch.multiprocessing.spawn(_run_rank, (world, n, clusters, steps, directory), nprocs=world)
        return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(world)]


def measured_rows(worlds: tuple[int, ...], n: int, clusters: int, steps: int, turns: int) -> list[Row]:
    """A row for each number of processes, labels and exchange."""
    by_turn = [[run_ranks(world, n, clusters, steps) for world in worlds] for _ in range(turns)]
    return [row for of_turns in zip(*by_turn, strict=True) for row in _rows_of(of_turns, n, clusters)]


def _rows_of(turns: tuple[list[dict[str, Any]], ...], n: int, clusters: int) -> list[Row]:
    """Of what the ranks wrote, turn by turn. Raises where what was counted is not what `plan_exchange` says."""
    results, world, rows = turns[0], len(turns[0]), []
    for case in results[0]["seconds"]:
        labels, exchange = case.split(", ")
        of_rank = [labels_at(labels, n, clusters)[rank * n // world : (rank + 1) * n // world] for rank in range(world)]
        histogram = torch.stack([x.bincount(minlength=clusters) for x in of_rank])
        plan = plan_exchange(histogram, world, features=D, exchange=exchange)
        counts = np.array([of_rank["bytes"][case] for of_rank in results])  # [W, passes, directions]
        planned = (
            torch.stack((plan.sent, plan.received, plan.grad_sent, plan.grad_received), 1).view(world, 2, 2).numpy()
        )
        if world > 1 and abs(counts - planned).max() > ROUNDING:
            raise AssertionError(f"{case}, {world} ranks: {counts.tolist()} bytes, planned {planned.tolist()}")
        sent, received, grad_sent, grad_received = counts.reshape(world, 4).max(0).tolist()
        both = counts.sum(1).max(1)
        seconds = np.concatenate([np.max([of_rank["seconds"][case] for of_rank in turn], axis=0) for turn in turns])
        rows.append(
            {
                "kind": "measured", "contender": f"ours, {exchange}" if world > 1 else "ours, one process",
                "labels": labels, "clusters": clusters, "world": world, "batch": n, "features": D, "dtype": "float32",
                "sent": sent, "received": received, "grad_sent": grad_sent, "grad_received": grad_received,
                "bytes": int(both.max()), "bytes_imbalance": _imbalance(both), "memory": "",
                "operations": float(plan.operations.max()), "operations_imbalance": plan.operations_imbalance,
                "seconds": statistics.median(seconds.tolist()), "threads": 1,
            }
        )  # fmt: skip
    return rows


def draw(results: Path, figure_path: Path) -> None:
    """Time, bytes and memory of the busiest rank against the number of ranks, from the CSV alone."""
    from matplotlib.figure import Figure

    with results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "model"]
    rows = [row for row in rows if int(row["batch"]) == OF_RANK * int(row["world"])]
    styles = {
        "ours, cluster": ("mcl_kernels, exchange='cluster'", "#1b6ca8", "o", "-"),
        "ours, gather": ("mcl_kernels, exchange='gather'", "#5dade2", "D", "-"),
        "dense, gather": ("all-gather, dense mask (open_clip's local_loss)", "#c0392b", "s", "--"),
        "ring": ("ring (Inf-CL)", "#7d3c98", "^", "--"),
    }  # fmt: skip
    panels = {
        "seconds": ("time of a step, ms", 1e3),
        "bytes": ("sent or received, whichever is more, MB", 1e-6),
        "memory": ("rows, their gradients, logits, GB", 1e-9),
    }
    own_rows = VIEWS * OF_RANK * int(rows[0]["features"]) * getattr(torch, rows[0]["dtype"]).itemsize
    limits = {
        "bytes": (2 * own_rows, "a rank's own rows and their gradients", ":"), "memory": (80e9, "a GPU of 80 GB", "-."),
    }  # fmt: skip
    worlds = sorted({int(row["world"]) for row in rows})
    figure = Figure(figsize=(10.5, 6.6), dpi=140, layout="constrained")
    grid = figure.subplots(len(LABELS), len(panels), sharex=True, sharey="col")
    for line_of_axes, labels in zip(grid, LABELS, strict=True):
        for axes, (column, (title, unit)) in zip(line_of_axes, panels.items(), strict=True):
            for contender, (label, color, marker, dashes) in styles.items():
                chosen = [row for row in rows if row["contender"] == contender and row["labels"] == labels]
                points = sorted((int(row["world"]), unit * float(row[column])) for row in chosen)
                points = [(world, y) for world, y in points if y > 0]  # one rank sends nothing
                axes.loglog(
                    *zip(*points, strict=True), color=color, marker=marker, linestyle=dashes, markersize=4, label=label
                )
            if column in limits:
                height, label, dashes = limits[column]
                axes.axhline(unit * height, color="black", linewidth=1, linestyle=dashes, label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(worlds, [f"{world:,}" for world in worlds])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if labels == "balanced":
                axes.set_title(title, fontsize=10)
            else:
                axes.set_xlabel("ranks")
        clusters = int(rows[0]["clusters"])
        shape = {"balanced": "equal", "zipf": "Zipf"}[labels]
        line_of_axes[0].set_ylabel(f"{clusters:,} {shape} clusters")
    figure.suptitle(
        f"A model, not a measurement: NT-Xent and its gradients on the busiest rank, {OF_RANK:,} samples a rank, "
        f"D = {rows[0]['features']}, {rows[0]['dtype']}",
        fontsize=11,
    )
    lines = {line.get_label(): line for axes in grid[0] for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(figure_path)


def _line(row: Row) -> str:
    return (
        f"{row['labels']:<8} {row['world']:>5,} ranks {row['batch']:>10,} samples  {row['contender']:<17}"
        f" {1e3 * row['seconds']:>9.2f} ms {row['bytes'] / 1e6:>9.2f} MB"
        f"  {row['operations']:.3g} operations, {row['operations_imbalance']:.2f} of the mean"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-only", action="store_true", help="keep what the CSV says was measured")
    parser.add_argument("--draw", action="store_true", help="only draw the figure from the CSV")
    parser.add_argument("--csv", type=Path, default=HERE / "scale.csv", help="another CSV; the figure goes beside it")
    options = parser.parse_args()
    if not options.draw:
        recorded = conditions(torch.device("cpu"))
        rows = [{**row, **recorded, "processor": ""} for row in model_rows()]
        print(f"A model, not a measurement: the busiest rank, {OF_RANK:,} samples a rank, D = {D}")
        for row in rows:
            if row["batch"] == OF_RANK * row["world"]:
                print(_line(row))
        measured: list[Row] = []
        if options.model_only and options.csv.exists():
            with options.csv.open(newline="") as file:
                measured = [row for row in csv.DictReader(file) if row["kind"] == "measured"]
        if not options.model_only:
            print(f"Measured: processes of one thread on {os.cpu_count()} cores", flush=True)
            for row in measured_rows(MEASURED_WORLDS, MEASURED_N, MEASURED_CLUSTERS, STEPS, TURNS):
                print(_line(row))
                measured.append({**row, **recorded})
        write_rows(options.csv, COLUMNS, rows + measured)
    draw(options.csv, options.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
