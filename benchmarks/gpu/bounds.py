"""Lower bounds of a loss's time beside those of plain PyTorch: `python -m benchmarks.gpu.bounds` writes bounds.csv.

Ours are those of model.py on an H200. With its launches ours is the sum of both: a few large kernels do not hide the
time of the others. Those of PyTorch are its bytes at 4.3 TB/s and its products at 700 Tflop/s (bf16) or 52 (fp32,
without tensor cores), one after the other, or 2.5 us for each of its launches where that is more. Logits below 60 MB
stay in the L2 cache, where PyTorch is faster than that.

Bytes are those that a pair of rows costs, forward and backward, in passes over N x M matrices: product 1, temperature
2, log-softmax 3, its backward 3 and a dense gradient 1, temperature 2, two products 2. The self form has 2 more for its
diagonal, and CLIP a log-softmax for each direction. With clusters PyTorch is a loop over them.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.model import H200, own_seconds
from benchmarks.gpu.schedule import WORKLOADS, Workload
from benchmarks.measure import Row, read_rows, write_rows

HERE = Path(__file__).parent
COLUMNS = (
    "workload", "d", "dtype", "ours_ms", "ours_launches_ms", "eager_ms", "compiled_ms", "ratio", "ratio_with_launches",
)  # fmt: skip
LAUNCH = 2.5e-6
RATES = {"bf16": 700e12, "fp32": 52e12}
# Losses of launches.csv that have the operators and kernels of these.
COUNTED = {"self": "nt_xent", "queue": "masked_info_nce, queue", "rows": "masked_info_nce, queue", "clip": "clip_loss"}


class Dense(NamedTuple):
    """A loss in plain PyTorch."""

    products: int
    launches: int
    compiled_launches: int
    eager: dict[str, int]  # bytes of a pair, by dtype
    compiled: dict[str, int]


DENSE = {
    "self": Dense(3, 36, 20, {"bf16": 44, "fp32": 62}, {"bf16": 20, "fp32": 28}),
    "queue": Dense(2, 32, 20, {"bf16": 36, "fp32": 54}, {"bf16": 14, "fp32": 20}),
    "rows": Dense(3, 32, 20, {"bf16": 36, "fp32": 54}, {"bf16": 14, "fp32": 20}),
    "clip": Dense(3, 21, 20, {"bf16": 74, "fp32": 96}, {"bf16": 36, "fp32": 50}),
}
CLUSTER_LAUNCHES = 45  # of a loop over clusters, for each of them


def dense_seconds(workload: Workload, dtype: str, *, compiled: bool) -> float:
    """Seconds of plain PyTorch, in the dtype of the rows; with clusters, of a loop over them."""
    dense = DENSE[workload.loss]
    sizes = [(workload.rows, workload.columns)]
    if workload.sizes is not None:
        sizes = [(int(n), int(n)) for n in workload.sizes]
    per_pair = (dense.compiled if compiled else dense.eager)[dtype] / H200.bandwidth
    per_pair += 2 * dense.products * workload.d / RATES[dtype]
    work = sum(n * m for n, m in sizes) * per_pair
    one = dense.compiled_launches if compiled else dense.launches
    return max(work, LAUNCH * (one if workload.sizes is None else CLUSTER_LAUNCHES * len(sizes)))


@cache
def _counted() -> dict[tuple[str, str], int]:
    rows = read_rows(HERE / "launches.csv")
    return {(row["loss"], row["labels"]): int(row["operators"]) + int(row["launches"]) for row in rows}


def own_launches(workload: Workload) -> int:
    """Operators and kernels of a loss of ours, forward and backward."""
    return _counted()[COUNTED[workload.loss], "no" if workload.sizes is None else "yes"]


def rows_of_table() -> list[Row]:
    rows = []
    for workload in WORKLOADS:
        for dtype in ("bf16", "fp32"):
            ours = own_seconds(workload, H200, dtype)
            with_launches = ours + LAUNCH * own_launches(workload)
            eager = dense_seconds(workload, dtype, compiled=False)
            row = {
                "workload": workload.name, "d": workload.d, "dtype": dtype, "ours_ms": 1e3 * ours,
                "ours_launches_ms": 1e3 * with_launches, "eager_ms": 1e3 * eager, "ratio": ours / eager,
                "ratio_with_launches": with_launches / eager,
            }  # fmt: skip
            if workload.sizes is None:
                row["compiled_ms"] = 1e3 * dense_seconds(workload, dtype, compiled=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=HERE / "bounds.csv")
    options = parser.parse_args()
    rows = rows_of_table()
    for row in rows:
        print(
            f"{row['workload']:<42} {row['d']:>4} {row['dtype']}", *(f"{c} {row.get(c, 0):<8.2g}" for c in COLUMNS[3:])
        )
    write_rows(options.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
