"""Tables of the GPU kernels: counts, schedules and lower bounds, for `benchmarks.tables`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.schedule import ASSIGN, MULTIPROCESSORS
from benchmarks.markdown import Rows, factor, markdown, significant
from benchmarks.measure import read_rows

HERE = Path(__file__).parent
KERNELS = {
    "cuda: masked_lse": "mcl_kernels in CUDA C++, losses",
    "cuda: count_above": "mcl_kernels in CUDA C++, losses",
    "cuda: assign": "mcl_kernels in CUDA C++, k-means",
    "k-means: assign": "mcl_kernels in Triton, k-means",
}
LOOPS = (
    *((name, "bf16", d) for name in ("forward", "backward") for d in ("64", "128", "200", "256", "512", "1024")),
    ("forward, unaligned", "bf16", "128"), ("backward, unaligned", "bf16", "128"), ("forward", "fp32", "128"),
    ("backward", "fp32", "128"), ("backward", "fp32", "512"), ("memeff: forward", "bf16", "512"),
    ("memeff: backward", "bf16", "128"), ("memeff: backward", "bf16", "512"),
    ("inf-cl: backward, queries", "tf32", "128"), ("inf-cl: backward, queries", "tf32", "512"),
)  # fmt: skip


def _newest() -> Rows:
    """Rows of the newest compilers: those of the older one stand last, and are of kernels that have a row before."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for row in read_rows(HERE / "static.csv"):
        rows.setdefault(tuple(row[name] for name in ("kernel", "architecture", "precision", "d")), row)
    return list(rows.values())


def loops() -> str:
    rows: dict[tuple[str, str, str], Rows] = {}
    for row in read_rows(HERE / "static.csv"):
        if row["architecture"] == "sm_90":
            rows.setdefault((row["kernel"], row["precision"], row["d"]), []).append(row)
    body = []
    for key in LOOPS:
        newest, *older = rows[key]
        slots = [significant(float(row["slots"])) for row in (newest, *older)]
        masked = [significant(float(row["slots_masked"])) for row in (newest, *older)]
        others = [newest[name] for name in ("tensor", "mufu", "l2_bytes", "synchronous_loads", "stack", "ctas")]
        body.append([*key, " / ".join(slots), " / ".join(masked), *others])
    header = [
        "kernel", "precision", "D", "issue slots", "with masks", "tensor cores, 1/16 clock", "special functions",
        "L2, bytes", "loads that wait", "stack, bytes", "CTAs",
    ]  # fmt: skip
    compilers = " / ".join(dict.fromkeys(row["compiler"] for row in rows["forward", "bf16", "128"]))
    return (
        markdown(header, body)
        + f"\nFor each pair, on sm_90; loads for each tile, CTAs of a multiprocessor. {compilers}.\n"
    )


def schedule() -> str:
    rows = [row for row in read_rows(HERE / "schedule.csv") if row["multiprocessors"] == str(MULTIPROCESSORS[90])]
    rows = [row for row in rows if row["pass"] != ASSIGN]
    body = []
    for forward, backward in zip(rows[::2], rows[1::2], strict=True):
        cells = [forward["workload"], forward["d"]]
        for row in (forward, backward):
            work = f"{int(row['row_tiles']):,}, {int(row['units']):,}"
            working = f"{100 * float(row['work_list_working']):.0f} %"
            shares = [factor(float(row[f"{each}_ratio"])) for each in ("work_list", "row_tiles")]
            cells += [work, f"{working}, {shares[0]} x ({shares[1]} x)"]
        body.append(cells)
    header = ["", "D", "forward: row tiles, units", "busy, busiest", "backward: row tiles, units", "busy, busiest"]
    note = (
        "Simulated, bf16, 132 multiprocessors: those with work, and the work of the busiest in even shares "
        "(if each tile of rows were a program)"
    )
    return markdown(header, body) + f"\n{note}.\n"


def bounds() -> str:
    body = []
    for row in read_rows(HERE / "bounds.csv"):
        times = [row[name] for name in ("ours_ms", "eager_ms", "compiled_ms")]
        times = [significant(float(time)) if time else "" for time in times]
        ratios = [factor(float(row[name])) for name in ("ratio", "ratio_with_launches")]
        body.append([row["workload"], row["d"], row["dtype"], *times, *ratios])
    header = ["", "D", "", "ours, ms", "PyTorch", "torch.compile", "ours / PyTorch", "with launches"]
    note = "Lower bounds by counting, not measurements: forward and backward on an H200, ms"
    return markdown(header, body) + f"\n{note}.\n"


def counts() -> str:
    rows = _newest()
    families: dict[tuple[str, str], Rows] = {}
    for row in rows:
        if name := _family(row):
            families.setdefault((name, row["precision"]), []).append(row)
    body = []
    for (name, precision), found in families.items():
        fast = sum(row["tensor_core"] != "0" for row in found)
        large = sum(int(row["shared"]) > int(row["shared_limit"]) for row in found)
        units = [_range(row[column] for row in found) for column in ("units_self", "units_both_directions")]
        units = [f"{each} of {found[0]['pairs']} pairs" if each else "" for each in units]
        stack = max(int(row["stack"]) for row in found)
        body.append([name, precision, str(len(found)), f"{stack:,}", f"{fast} of {len(found)}", str(large), *units])
    header = [
        "kernels", "precision", "compiled", "largest stack, bytes", "with tensor-core instructions",
        "over the shared memory", "units, NT-Xent", "units, CLIP",
    ]  # fmt: skip
    compilers = " and ".join(dict.fromkeys(row["compiler"] for row in rows))
    return (
        markdown(header, body) + f"\nCompiled, not run: {compilers}; sm_80, sm_90 and sm_100, CUDA C++ for sm_75 too.\n"
    )


def _family(row: dict[str, str]) -> str:
    """Line of a kernel that multiplies; "" for the others."""
    kernel = row["kernel"]
    if kernel.startswith(("cuda: ", "k-means: ")):
        return next((name for prefix, name in KERNELS.items() if kernel.startswith(prefix)), "")
    return "mcl_kernels in Triton, losses" if row["library"].startswith("mcl_kernels") else row["library"]


def _range(values: Iterable[str]) -> str:
    known = sorted({int(value) for value in values if value})
    return " to ".join(str(value) for value in dict.fromkeys((known[0], known[-1]))) if known else ""
