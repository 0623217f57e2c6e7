"""Tables of the losses over ranks, for `benchmarks.tables`."""

from __future__ import annotations

from benchmarks.conditions import ROOT
from benchmarks.markdown import conditions_line, markdown, median, number, seconds, significant
from benchmarks.measure import read_rows

BENCHMARKS = ROOT / "benchmarks"


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
