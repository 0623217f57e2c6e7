"""Work of each multiprocessor, simulated: `python -m benchmarks.gpu.schedule` writes schedule.csv.

A unit is a tile of rows against a tile of columns, of the sizes that launchers choose (static.csv). A tile of rows
needs as many units as tiles of columns cover its clusters. Two schedules share the units out, and a third one k-means':

- "row tiles": a program for each tile of rows and part of the features, which the next free slot of a multiprocessor
  takes, in the order of the rows;
- "work list": as many programs as fit the chip at a time, and no more than units; program g of G takes the units from
  g W / G to (g + 1) W / G of the list of all W, wherever a tile of rows ends;
- parts of the centres, in the columns of the work list: a program for each tile of rows and part.

A multiprocessor has as many slots as CTAs of the kernel fit it. All units take the same time.
"""

from __future__ import annotations

import argparse
import heapq
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.measure import Row, read_rows, write_rows
from mcl_kernels.kmeans.gpu_common import choose_parts

HERE = Path(__file__).parent
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H200, B200
COLUMNS = (
    "workload", "d", "pass", "multiprocessors", "row_tiles", "units", "even_share",
    *(f"{schedule}_{column}" for schedule in ("row_tiles", "work_list") for column in ("working", "busiest", "ratio")),
)  # fmt: skip


class Workload(NamedTuple):
    """A loss of rows against columns; with sizes, each row against those of its cluster, which both sides have."""

    name: str
    loss: str  # "self": rows are the columns; "queue", "rows": of the rows alone; "clip": of both sides; "": k-means
    d: int
    rows: int
    columns: int
    sizes: np.ndarray | None = None

    def swapped(self) -> Workload:
        """The other side against this one; clusters have one size on both sides."""
        return self._replace(rows=self.columns, columns=self.rows)


class Share(NamedTuple):
    """What a schedule gives to the multiprocessors, in units."""

    units: np.ndarray  # of each multiprocessor

    @property
    def working(self) -> float:
        """Share of the multiprocessors that have work."""
        return float((self.units > 0).mean())

    @property
    def busiest(self) -> int:
        return int(self.units.max())

    @property
    def ratio(self) -> float:
        """Units of the busiest multiprocessor by those of an even share, or by the one that cannot be shared."""
        return self.busiest / max(float(self.units.mean()), 1.0)


def equal_clusters(n: int, k: int) -> np.ndarray:
    return np.diff(np.linspace(0, n, k + 1).round().astype(np.int64))


def zipf_clusters(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Sizes proportional to 1, 1/2, 1/3, ..., in random order."""
    ends = np.cumsum(1 / np.arange(1, k + 1))
    sizes = np.diff((n * ends / ends[-1]).round().astype(np.int64), prepend=0)
    return np.random.default_rng(seed).permutation(sizes)


SIMCLR = tuple(Workload(f"SimCLR, 2N = {n:,}", "self", 128, n, n) for n in (512, 1024, 2048, 4096, 8192, 16_384))
QUEUES = (
    Workload("MoCo, 256 x 65,536", "queue", 128, 256, 65_536),
    Workload("65,536 prototypes, 256 rows", "queue", 256, 256, 65_536),
)
LOCAL_CLIP = tuple(
    Workload(f"CLIP, local rows {n:,} x {m:,}", "rows", d, n, m)
    for n, m, d in ((256, 8192, 512), (512, 32_768, 512), (1024, 65_536, 512), (1024, 65_536, 1024))
)
CLIP = tuple(Workload(f"CLIP, {n:,} pairs", "clip", 512, n, n) for n in (1024, 4096, 16_384))
MCL = tuple(
    Workload(f"MCL, {n:,} rows, {k:,} {kind} clusters", "self", 128, n, n, sizes(n, k))
    for n, kind, k, sizes in (
        (4096, "equal", 10, equal_clusters), (4096, "Zipf", 10, zipf_clusters), (4096, "Zipf", 100, zipf_clusters),
        (16_384, "equal", 10, equal_clusters), (32_768, "equal", 10, equal_clusters),
        (32_768, "Zipf", 100, zipf_clusters), (32_768, "Zipf", 1000, zipf_clusters),
        (131_072, "equal", 10, equal_clusters), (131_072, "equal", 100, equal_clusters),
        (131_072, "Zipf", 1000, zipf_clusters), (1_048_576, "Zipf", 1000, zipf_clusters),
    )
)  # fmt: skip
WORKLOADS = (*SIMCLR, *QUEUES, *LOCAL_CLIP, *CLIP, *MCL)
PREDICT = Workload("k-means predict, 4,096 rows, K = 10,000", "", 512, 4096, 10_000)
ASSIGN = "k-means: assign, 1000 centres"  # the kernel for many


def units_of_rows(workload: Workload, rows: int, columns: int) -> np.ndarray:
    """Units of each tile of rows.

    It is compared with the columns from the first cluster of its rows to the last one, in tiles from there on.
    """
    if workload.sizes is None:
        return np.full(-(-workload.rows // rows), -(-workload.columns // columns))
    ends = np.cumsum(workload.sizes)
    first = np.arange(0, workload.rows, rows)
    last = np.minimum(first + rows, workload.rows) - 1
    first_cluster, last_cluster = (np.searchsorted(ends, row, side="right") for row in (first, last))
    return -(-(ends[last_cluster] - (ends - workload.sizes)[first_cluster]) // columns)


def share_row_tiles(units: np.ndarray, multiprocessors: int, ctas: int) -> Share:
    """A program for each tile of rows, in order to the next free slot."""
    done = np.zeros(multiprocessors, dtype=np.int64)
    slots = [(0, cta, multiprocessor) for cta in range(ctas) for multiprocessor in range(multiprocessors)]
    for work in units.tolist():
        time, cta, multiprocessor = slots[0]
        heapq.heapreplace(slots, (time + work, cta, multiprocessor))
        done[multiprocessor] += work
    return Share(done)


def share_work_list(units: np.ndarray, multiprocessors: int, ctas: int) -> Share:
    """An equal stretch of the list of units for each program, which go round the multiprocessors."""
    total = int(units.sum())
    programs = max(min(multiprocessors * ctas, total), 1)
    each = np.diff(np.arange(programs + 1, dtype=np.int64) * total // programs)
    return Share(np.bincount(np.arange(programs) % multiprocessors, weights=each, minlength=multiprocessors))


def share_parts(units: np.ndarray, multiprocessors: int, ctas: int) -> Share:
    """A program for each tile of rows and part of the centres, to the next free slot; as many units for all tiles."""
    center_tiles = int(units[0])
    parts = choose_parts(len(units), center_tiles, multiprocessors * ctas)
    each = np.diff(np.arange(parts + 1) * center_tiles // parts)
    return share_row_tiles(np.repeat(each, len(units)), multiprocessors, ctas)


present_share = share_work_list  # the schedule of the Triton kernels


class Kernel(NamedTuple):
    """Tiles of a kernel, and how many CTAs of it fit a multiprocessor."""

    rows: int
    columns: int
    parts: int  # of the features, each a program of its own
    ctas: int


@cache
def kernel_of(name: str, architecture: int, precision: str, d: int) -> Kernel:
    row = static_row(name, architecture, precision, d)
    parts = -(-d // int(row["gradients"])) if name == "backward" else 1
    return Kernel(int(row["rows"]), int(row["columns"]), parts, int(row["ctas"]))


@cache
def _static_rows() -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of static.csv; of several compilers those of the newest, which stand first."""
    rows = reversed(read_rows(HERE / "static.csv"))
    return {(row["kernel"], row["architecture"], row["precision"], row["d"]): row for row in rows}


def static_row(name: str, architecture: int, precision: str, d: int) -> dict[str, str]:
    """Row of static.csv."""
    return _static_rows()[name, f"sm_{architecture}", precision, str(d)]


def units_of_programs(workload: Workload, kernel: Kernel) -> np.ndarray:
    return np.repeat(units_of_rows(workload, kernel.rows, kernel.columns), kernel.parts)


def rows_of_table() -> list[Row]:
    cases = [(workload, name, share_work_list) for workload in WORKLOADS for name in ("forward", "backward")]
    rows = []
    for workload, name, share_now in (*cases, (PREDICT, ASSIGN, share_parts)):
        for architecture, multiprocessors in MULTIPROCESSORS.items():
            kernel = kernel_of(name, architecture, "bf16", workload.d)
            units = units_of_programs(workload, kernel)
            row = {
                "workload": workload.name, "d": workload.d, "pass": name, "multiprocessors": multiprocessors,
                "row_tiles": len(units), "units": int(units.sum()),
                "even_share": float(units.sum() / multiprocessors),
            }  # fmt: skip
            for schedule, share in (("row_tiles", share_row_tiles), ("work_list", share_now)):
                shared = share(units, multiprocessors, kernel.ctas)
                figures = {"working": shared.working, "busiest": shared.busiest, "ratio": shared.ratio}
                row |= {f"{schedule}_{column}": value for column, value in figures.items()}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=HERE / "schedule.csv")
    options = parser.parse_args()
    rows = rows_of_table()
    for row in rows:
        if row["multiprocessors"] == MULTIPROCESSORS[90]:
            print(
                f"{row['workload']:<42} {row['pass']:<8} {row['row_tiles']:>6} row tiles {row['units']:>10,} units"
                f"  busiest of row tiles {row['row_tiles_busiest']:>6,}, {row['row_tiles_ratio']:>4.1f} x an even share"
                f"  of a work list {row['work_list_busiest']:>6,}, {row['work_list_ratio']:>4.1f} x"
            )
    write_rows(options.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
