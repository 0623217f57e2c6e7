"""Tables of the losses over ranks and of the GPU kernels, for `benchmarks.tables`."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.conditions import ROOT
from benchmarks.markdown import Rows, conditions_line, markdown, median, number, seconds, significant
from benchmarks.measure import read_rows

BENCHMARKS = ROOT / "benchmarks"
KERNELS = {
    "cuda: masked_lse": "mcl_kernels in CUDA C++, losses",
    "cuda: count_above": "mcl_kernels in CUDA C++, losses",
    "cuda: assign": "mcl_kernels in CUDA C++, k-means",
    "k-means: assign": "mcl_kernels in Triton, k-means",
}


def ranks() -> str:
    rows = [row for row in read_rows(BENCHMARKS / "scale.csv") if row["kind"] == "measured"]
    body = []
    for contender, world in dict.fromkeys((row["contender"], row["world"]) for row in rows):
        found = {row["labels"]: row for row in rows if (row["contender"], row["world"]) == (contender, world)}
        cells = [
            f"{seconds({**row, 'p50': row['seconds']})}, {number(float(row['bytes']) / 1e6, 1)} MB"
            for row in found.values()
        ]
        exchange = contender.removeprefix("ours, ")
        body.append([world, "" if world == "1" else f'`exchange="{exchange}"`', *cells])
    header = ["processes", "", "100 equal clusters", "100 clusters of Zipf sizes"]
    note = f"8,192 samples, D = 128, float32. {median(rows)} of the time of a step; bytes of the busiest rank"
    return markdown(header, body) + conditions_line(rows, note)


def scale() -> str:
    rows = [row for row in read_rows(BENCHMARKS / "scale.csv") if row["kind"] == "model" and row["world"] == "4096"]
    rows = [row for row in rows if row["batch"] == str(64 << 20)]
    titles = {
        "ours, cluster": '`exchange="cluster"`', "ours, gather": '`exchange="gather"`',
        "dense, gather": "all-gather and a dense mask (open_clip, `local_loss`)", "ring": "ring (Inf-CL)",
    }  # fmt: skip
    body = []
    for row in rows:
        shape = {"balanced": "equal", "zipf": "Zipf"}[row["labels"]]
        moved, memory = (significant(float(row[name]) / unit) for name, unit in (("bytes", 1e6), ("memory", 1e9)))
        time = seconds({"p50": row["seconds"]})
        body.append([titles[row["contender"]], shape, time, f"{moved} MB", f"{memory} GB"])
    header = ["a model, not a measurement", "sizes of the 1,000 clusters", "time", "sent or received", "memory"]
    note = "4,096 ranks, 67,108,864 samples, D = 128, bfloat16. The busiest rank"
    return markdown(header, body) + conditions_line(rows, note)


def gpu_static() -> str:
    rows = read_rows(BENCHMARKS / "gpu_static.csv")
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
