"""NT-Xent over many ranks, modelled, and over a few ranks, measured: `python -m benchmarks.scale` writes scale.csv.

The model is that of `scale_model`. The measurements use processes of one thread that communicate over gloo on this
machine. The bytes that each sends and receives are counted and must equal those of `plan_exchange`. Seconds are those
of the slowest process: their median over steps, p20 and p80. One, two and four processes take turns. With more
processes than cores, seconds are the cost of a step, not the gain of another rank.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.conditions import IMAGES, conditions
from benchmarks.measure import Row, quantiles, read_rows, write_rows
from benchmarks.scale_model import LABELS, SAMPLES_PER_RANK, VIEWS, D, imbalance, model_rows
from benchmarks.traffic import count_traffic
from mcl_kernels import nt_xent, plan_exchange

HERE = Path(__file__).parent
MEASURED_WORLDS = (1, 2, 4)
MEASURED_N, MEASURED_CLUSTERS = 8192, 100
WARM_UP, STEPS, TURNS = 2, 7, 3  # steps of a turn
ROUNDING = 8  # bytes: the plan rounds the shares of an all-reduce

COLUMNS = (
    "kind", "contender", "labels", "clusters", "world", "batch", "features", "dtype", "sent", "received", "grad_sent",
    "grad_received", "bytes", "bytes_imbalance", "operations", "operations_imbalance", "memory", "seconds", "p20",
    "p80", "threads", "versions", "processor", "commit",
)  # fmt: skip


def _run_rank(rank: int, world: int, n: int, clusters: int, steps: int, directory: Path) -> None:
    """Writes the seconds of each step, and the bytes of one: [[sent, received], [sent, received by backward]]."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    shard = slice(rank * n // world, (rank + 1) * n // world)
    views = [torch.randn(2, n, D, generator=torch.Generator().manual_seed(0))[i, shard].clone() for i in range(2)]
    views = [view.requires_grad_() for view in views]
    results: dict[str, Any] = {"seconds": {}, "bytes": {}}
    problems = [
        (labels, contender) for labels in LABELS for contender in ("cluster", "gather")[: 1 if world == 1 else 2]
    ]
    shard_labels = {labels: make_labels(labels, n, clusters)[shard] for labels in LABELS}

    def loss(labels: str, exchange: str) -> torch.Tensor:
        options = {} if world == 1 else {"group": dist.group.WORLD, "exchange": exchange}
        return nt_xent(*views, shard_labels[labels], **options)

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


def make_labels(labels: str, n: int, clusters: int) -> torch.Tensor:
    """Labels of the samples of all ranks, in random order."""
    sorted_labels = torch.arange(clusters).repeat_interleave(torch.tensor(LABELS[labels](n, clusters)))
    return sorted_labels[torch.randperm(n, generator=torch.Generator().manual_seed(1))]


def run_ranks(world: int, n: int, clusters: int, steps: int) -> list[dict[str, Any]]:
    """Results of each of `world` new processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch.multiprocessing.spawn(_run_rank, (world, n, clusters, steps, directory), nprocs=world)
        return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(world)]


def measured_rows(worlds: tuple[int, ...], n: int, clusters: int, steps: int, turns: int) -> list[Row]:
    """Rows for each number of processes, distribution of labels and exchange."""
    by_turn = [[run_ranks(world, n, clusters, steps) for world in worlds] for _ in range(turns)]
    return [row for turns_of_world in zip(*by_turn, strict=True) for row in _rows_of_world(turns_of_world, n, clusters)]


def _rows_of_world(turns: tuple[list[dict[str, Any]], ...], n: int, clusters: int) -> list[Row]:
    """Rows of one number of processes, from the results of its ranks in each turn.

    Raises:
        AssertionError: the counted bytes are not those of `plan_exchange`.
    """
    results, world, rows = turns[0], len(turns[0]), []
    for case in results[0]["seconds"]:
        labels, exchange = case.split(", ")
        all_labels = make_labels(labels, n, clusters)
        shards = [all_labels[rank * n // world : (rank + 1) * n // world] for rank in range(world)]
        histogram = torch.stack([shard.bincount(minlength=clusters) for shard in shards])
        plan = plan_exchange(histogram, world, features=D, exchange=exchange)
        counts = np.array([result["bytes"][case] for result in results])  # [W, passes, directions]
        planned = (
            torch.stack((plan.sent, plan.received, plan.grad_sent, plan.grad_received), 1).view(world, 2, 2).numpy()
        )
        if world > 1 and abs(counts - planned).max() > ROUNDING:
            raise AssertionError(f"{case}, {world} ranks: {counts.tolist()} bytes, planned {planned.tolist()}")
        sent, received, grad_sent, grad_received = counts.reshape(world, 4).max(0).tolist()
        larger_direction = counts.sum(1).max(1)
        seconds = np.concatenate([np.max([result["seconds"][case] for result in turn], axis=0) for turn in turns])
        spread = quantiles(seconds.tolist())
        rows.append(
            {
                "kind": "measured", "contender": f"ours, {exchange}" if world > 1 else "ours, one process",
                "labels": labels, "clusters": clusters, "world": world, "batch": n, "features": D, "dtype": "float32",
                "sent": sent, "received": received, "grad_sent": grad_sent, "grad_received": grad_received,
                "bytes": int(larger_direction.max()), "bytes_imbalance": imbalance(larger_direction), "memory": "",
                "operations": float(plan.operations.max()), "operations_imbalance": plan.operations_imbalance,
                "seconds": spread["p50"], "p20": spread["p20"], "p80": spread["p80"], "threads": 1,
            }
        )  # fmt: skip
    return rows


def draw(results: Path, figure_path: Path) -> None:
    """Draws time, bytes and memory of the busiest rank against the number of ranks, from the CSV."""
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(results) if row["kind"] == "model"]
    rows = [row for row in rows if int(row["batch"]) == SAMPLES_PER_RANK * int(row["world"])]
    styles = {
        "ours, cluster": ("mcl_kernels, exchange='cluster'", "#1b6ca8", "o", "-"),
        "ours, gather": ("mcl_kernels, exchange='gather'", "#5dade2", "D", "-"),
        "dense, gather": ("all-gather and a dense mask (open_clip, local_loss)", "#c0392b", "s", "--"),
        "ring": ("ring (Inf-CL)", "#7d3c98", "^", "--"),
    }  # fmt: skip
    panels = {
        "seconds": ("time of forward and backward, ms", 1e3),
        "bytes": ("bytes sent or received (the larger), MB", 1e-6),
        "memory": ("memory of rows, gradients and logits, GB", 1e-9),
    }
    own_bytes = VIEWS * SAMPLES_PER_RANK * int(rows[0]["features"]) * getattr(torch, rows[0]["dtype"]).itemsize
    limits = {
        "bytes": (2 * own_bytes, "size of the rows of one rank and their gradients", ":"),
        "memory": (80e9, "memory of a GPU with 80 GB", "-."),
    }
    worlds = sorted({int(row["world"]) for row in rows})
    figure = Figure(figsize=(10.5, 6.6), dpi=140, layout="constrained")
    grid = figure.subplots(len(LABELS), len(panels), sharex=True, sharey="col")
    for grid_row, labels in zip(grid, LABELS, strict=True):
        for axes, (column, (title, factor)) in zip(grid_row, panels.items(), strict=True):
            for contender, (label, color, marker, dashes) in styles.items():
                chosen = [row for row in rows if row["contender"] == contender and row["labels"] == labels]
                points = sorted((int(row["world"]), factor * float(row[column])) for row in chosen)
                points = [(world, y) for world, y in points if y > 0]  # a single rank sends nothing
                axes.loglog(
                    *zip(*points, strict=True), color=color, marker=marker, linestyle=dashes, markersize=4, label=label
                )
            if column in limits:
                height, label, dashes = limits[column]
                axes.axhline(factor * height, color="black", linewidth=1, linestyle=dashes, label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(worlds, [f"{world:,}" for world in worlds])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if labels == "balanced":
                axes.set_title(title, fontsize=10)
            else:
                axes.set_xlabel("number of ranks")
        clusters = int(rows[0]["clusters"])
        shape = {"balanced": "equal clusters", "zipf": "clusters of Zipf sizes"}[labels]
        grid_row[0].set_ylabel(f"{clusters:,} {shape}")
    figure.suptitle(
        "A model, not a measurement: NT-Xent with gradients on the busiest rank, "
        f"{SAMPLES_PER_RANK:,} samples per rank, D = {rows[0]['features']}, {rows[0]['dtype']}",
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
    parser.add_argument("--model-only", action="store_true", help="keep the measured rows of the CSV")
    parser.add_argument("--draw", action="store_true", help="only draw the figure from the CSV")
    parser.add_argument("--csv", type=Path, help="another CSV, with its figure next to it")
    options = parser.parse_args()
    results = options.csv or HERE / "scale.csv"
    if not options.draw:
        recorded = conditions(torch.device("cpu"))
        rows = [{**row, **recorded, "processor": ""} for row in model_rows()]
        print(f"A model, not a measurement: the busiest rank, {SAMPLES_PER_RANK:,} samples a rank, D = {D}")
        for row in rows:
            if row["batch"] == SAMPLES_PER_RANK * row["world"]:
                print(_line(row))
        measured: list[Row] = []
        if options.model_only:
            measured = [row for row in read_rows(results) if row["kind"] == "measured"]
        else:
            print(f"Measured: processes of one thread on {os.cpu_count()} cores", flush=True)
            for row in measured_rows(MEASURED_WORLDS, MEASURED_N, MEASURED_CLUSTERS, STEPS, TURNS):
                print(_line(row))
                measured.append({**row, **recorded})
        write_rows(results, COLUMNS, rows + measured)
    draw(results, results.with_suffix(".png") if options.csv else IMAGES / "scale.png")


if __name__ == "__main__":
    main()
