"""Writes the tables of README and docs from the committed CSV files: `python -m benchmarks.tables`.

A page has a table between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES. Each table ends with a
line of the conditions in which its numbers were measured. With `--check` nothing is written: the pages whose tables
differ from the CSV files are named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks import clustering_tables
from benchmarks.conditions import ROOT
from benchmarks.gpu import tables as gpu
from benchmarks.markdown import Rows, conditions_line, factor, markdown, mebibytes, median, number, seconds
from benchmarks.measure import read_rows
from benchmarks.model_tables import ranks, scale
from experiments.suppression.groups import group_results
from experiments.suppression.results import read_results
from experiments.suppression.tables import probe_table

BENCHMARKS, EXPERIMENTS = ROOT / "benchmarks", ROOT / "experiments"
TABLE = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
DENSE, LOOP = "eager, dense mask", "eager, loop over clusters"
PLAIN = {DENSE: "PyTorch, dense mask", LOOP: "PyTorch, loop over clusters", "eager, dense": "PyTorch, dense"}
PLAIN |= {"own, fp32": "mcl_kernels, float32", "own, 1 thread": "mcl_kernels, 1 thread"}
LOGSUMEXP = "`masked_logsumexp`, {n:,} rows, D = {d}, {labels}, {dtype}"
NT_XENT = "`nt_xent`, N = {n:,}, D = {d}, {labels}, {dtype}"
LOSSES = {
    "clusters-10": NT_XENT,
    "plain-nt-xent": NT_XENT,
    "clip": "`clip_loss`, N = {n:,} pairs, D = {d}, {dtype}",
    "queue": "`masked_info_nce`, MoCo: {n:,} queries, 65,536 keys, D = {d}, {dtype}",
    "zipf": "`masked_logsumexp`, {n:,} rows, D = {d}, 1,000 clusters of Zipf sizes, {dtype}",
    **dict.fromkeys(("bf16-d128-k10", "bf16-d512-k1", "threads"), LOGSUMEXP),
    **dict.fromkeys(("limit-d128-k1", "limit-d128-k10", "limit-d512-k1", "limit-d512-k10", "growth"), LOGSUMEXP),
    "memory-1m": LOGSUMEXP,
    "memory-nt-xent": NT_XENT,
}  # fmt: skip


def six_results() -> str:
    """README's results, each with a link to its section. A result that is not measured is left out."""
    losses, body, used = read_rows(BENCHMARKS / "results.csv"), [], []

    def add(what: str, section: str, peer: str, ours: str, theirs: str, gain: str) -> None:
        body.append([f"[{what}](docs/results.md#{section})", peer, ours, theirs, gain])

    for case, n, peer, labels, quantity, section in (
        ("batch-size", 4096, DENSE, "10 clusters", "time", "batch-size"),
        ("batch-size", 4096, LOOP, "10 clusters", "time", "batch-size"),
        ("plain-nt-xent", 2048, "lightly", "no labels", "time", "losses"),
        ("batch-size", 8192, DENSE, "10 clusters", "memory", "batch-size"),
    ):
        found = {row["peer"]: row for row in losses if (row["case"], row["n"]) == (case, str(n))}
        if {"ours", peer} <= set(found):
            pair = ours, theirs = found["ours"], found[peer]
            used += pair
            if quantity == "memory":
                cell, gain = mebibytes, f"{factor(float(theirs['peak_bytes']) / float(ours['peak_bytes']))} times less"
            else:
                cell, gain = seconds, f"{factor(float(theirs['ratio']))} times faster"
            what = f"`nt_xent`, {labels}, N = {n:,}: {quantity}"
            add(what, section, PLAIN.get(peer, peer), *map(cell, pair), gain)
    if found := clustering_tables.headline(read_rows(BENCHMARKS / "clustering.csv")):
        what, *pair = found
        used += pair
        gain = f"{factor(float(pair[1]['ratio']))} times faster"
        add(f"{what}: time", "k-means", "scikit-learn", *map(seconds, pair), gain)
    probes = _by_stage(read_rows(EXPERIMENTS / "demo.csv"), "digit_probe")
    simclr, mcl = (_over_seeds(probes.get(name, [])) for name in ("stage 0: SimCLR", "all stages, concatenated"))
    if simclr and mcl:
        add("demo, digits next to a code: accuracy of the digit, MCL", "the-demo", "SimCLR", mcl, simclr, "")
    note = f"{median(used)} of forward and backward; memory: one measurement; accuracy: mean (range) of seeds"
    header = ["result", "against", "mcl_kernels", "theirs", "factor"]
    return markdown(header, body) + conditions_line(used, note, "lightly", "scikit-learn")


def losses() -> str:
    used, body = [], []
    for ours, name, peers in _loss_cases():
        used += [ours, *peers] if peers else []
        first = [name, f"{seconds(ours)}, {mebibytes(ours)}"]
        for row in peers:
            theirs = f"{seconds(row)}, {mebibytes(row)}"
            body.append([*first, PLAIN.get(row["peer"], row["peer"]), theirs, factor(float(row["ratio"]))])
            first = [""] * 2
    header = ["forward and backward", "mcl_kernels", "against", "theirs", "times faster"]
    return markdown(header, body) + conditions_line(used, f"{median(used)}, peak memory above the inputs", "lightly")


def limits() -> str:
    used, body = [], []
    for ours, name, peers in _loss_cases():
        if not peers or ours["dtype"] == "bfloat16":
            used.append(ours)
            body.append([name, seconds(ours), mebibytes(ours), f"{float(ours['fraction_of_limit']):.2f}"])
    header = ["forward and backward", "time", "memory", "share of the limit"]
    return markdown(header, body) + conditions_line(used, f"{median(used)}, peak memory above the inputs")


def _loss_cases() -> Iterator[tuple[dict[str, str], str, Rows]]:
    """Yields our row of each case and size, its title, and the rows of its peers."""
    rows = [row for row in read_rows(BENCHMARKS / "results.csv") if row["case"] in LOSSES]
    rows = [row for row in rows if row["case"] != "clusters-10" or row["peer"] not in (DENSE, LOOP)]  # see batch_size
    for case, title in LOSSES.items():
        for ours in (row for row in rows if (row["case"], row["peer"]) == (case, "ours")):
            clusters = int(ours["clusters"])
            labels = f"{clusters:,} clusters" if clusters > 1 else "no labels"
            name = title.format(n=int(ours["n"]), d=ours["d"], labels=labels, dtype=ours["dtype"])
            same = [row for row in rows if (row["case"], row["n"]) == (case, ours["n"])]
            yield ours, name, [row for row in same if row["peer"] != "ours"]


def batch_size() -> str:
    rows = [row for row in read_rows(BENCHMARKS / "results.csv") if row["case"] in ("batch-size", "cubic-memory")]
    names = (DENSE, LOOP, "pytorch-metric-learning")
    return _sweep(rows, lambda row: [f"{int(row['n']):,}"], ["N"], names)


def small_batches() -> str:
    rows = [row for row in read_rows(BENCHMARKS / "results.csv") if row["case"].startswith("small-batches")]

    def first(row: dict[str, str]) -> list[str]:
        return [f"{int(row['d']):,}", "10 clusters" if row["case"].endswith("k10") else "none", f"{int(row['n']):,}"]

    return _sweep(rows, first, ["D", "labels", "N"], (DENSE, LOOP))


def _sweep(rows: Rows, first: Callable[[dict[str, str]], list[str]], header: list[str], peers: Iterable[str]) -> str:
    """A line for each case and size: time and memory of ours, and those of each peer with the factor."""
    lines: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        # "cubic-memory" has a row of ours too, of the same case as that of the sweep.
        lines.setdefault(tuple(first(row)), {}).setdefault(row["peer"], row)
    body = []
    for key, found in lines.items():
        cells = [f"{seconds(found['ours'])}, {mebibytes(found['ours'])}"]
        for peer in peers:
            row = found.get(peer)
            cells.append(f"{seconds(row)}, {mebibytes(row)}: {factor(float(row['ratio']))} times" if row else "")
        body.append([*key, *cells])
    titles = [*header, "mcl_kernels", *(PLAIN.get(peer, peer) for peer in peers)]
    note = f"{median(rows)}, peak memory above the inputs: time of the peer / time of mcl_kernels"
    return markdown(titles, body) + conditions_line(rows, note)


def whole_step() -> str:
    rows = read_rows(BENCHMARKS / "whole_step.csv")
    titles = {
        "eager": "plain loss", "ours": "`nt_xent`", "ours, cached": "`nt_xent` and `cached_backward`, chunks of 512"
    }  # fmt: skip
    peaks = {(row["contender"], row["n"]): mebibytes(row) for row in rows}
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    body = [[title, *(peaks.get((name, n), "") for n in sizes)] for name, title in titles.items()]
    header = ["peak memory above the images", *(f"N = {int(n):,}" for n in sizes)]
    return markdown(header, body if rows else []) + conditions_line(rows, "One measurement each")


def kmeans() -> str:
    return clustering_tables.fits(read_rows(BENCHMARKS / "clustering.csv"))


def kmeans_iterations() -> str:
    return clustering_tables.iterations(read_rows(BENCHMARKS / "clustering.csv"))


def kmeans_quality() -> str:
    return clustering_tables.quality(read_rows(BENCHMARKS / "clustering.csv"))


def kmeans_files() -> str:
    rows = read_rows(BENCHMARKS / "large_file.csv")
    body = []
    for row in rows:
        if row["p50"]:
            state = {"cached": "in the page cache", "dropped": "from disk"}[row["state"]]
            low, middle, high = (int(row["bytes"]) / float(row[name]) / 1e9 for name in ("p80", "p50", "p20"))
            body.append([f"{row['contender']}, {state}", f"{middle:.2f} GB/s ({low:.2f} to {high:.2f})", seconds(row)])
        else:
            body.append([f"k-means, {row['metric']}: peak memory above the start", mebibytes(row), ""])
    note = f"{median(rows)} of turns"
    if rows:
        n, d, k, iterations = (int(rows[0][name]) for name in ("n", "d", "k", "iterations"))
        note += f"; {4e-9 * n * d:.1f} GB, {n:,} rows, D = {d}, K = {k}, {iterations} iterations"
    return markdown(["a file of features", "rate or memory", "time"], body) + conditions_line(rows, note)


def build_time() -> str:
    rows = read_rows(BENCHMARKS / "build_time.csv")
    body = [[row["compiler"], row["cores"], seconds(row)] for row in rows]
    turns = " or ".join(dict.fromkeys(row["turns"] for row in rows))
    note = f"Median (lowest to highest) of {turns} new processes with an empty cache"
    return markdown(["compiler", "cores", "first loss"], body) + conditions_line(rows, note)


def _by_stage(rows: Rows, column: str) -> dict[str, list[float]]:
    """Values of a column of the demo over seeds, by name of the stage."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["name"], []).extend([float(row[column])] if row[column] else [])
    return values


def _over_seeds(values: list[float], digits: int = 3) -> str:
    """Mean (lowest to highest)."""
    if not values:
        return ""
    return (
        number(statistics.fmean(values), digits) + f" ({number(min(values), digits)} to {number(max(values), digits)})"
    )


def demo() -> str:
    rows = read_rows(EXPERIMENTS / "demo.csv")
    columns = {"digit_probe": 3, "bit_probe": 3, "pseudo_labels": 0, "seconds": 0}
    probes = {column: _by_stage(rows, column) for column in columns}
    names = list(dict.fromkeys(row["name"] for row in rows))
    body = [
        [name, *(_over_seeds(probes[column][name], digits) for column, digits in columns.items())] for name in names
    ]
    header = ["trained", "digit", "bits", "pseudo labels", "seconds"]
    seeds = len({row["seed"] for row in rows})
    note = f"Held-out accuracy of linear probes; mean (lowest to highest) of {seeds} seeds"
    return markdown(header, body) + conditions_line(rows, note)


def suppression() -> str:
    results = read_results(EXPERIMENTS / "suppression" / "results.csv")
    hours = sum(encoder.seconds for run in results for encoder in run.encoders) / 3600
    rows = [
        {"processor": run.processor, "threads": str(run.threads), "commit": run.commit}
        | {"versions": "; ".join(f"{name} {version}" for name, version in run.versions.items())}
        for run in results
    ]  # fmt: skip
    note = (
        "Held-out accuracy of linear probes, mean ± standard deviation of 3 seeds. "
        f"All {len(results)} runs of the study: {hours:.1f} hours of training, on one thread each"
    )
    return probe_table(group_results(results)) + conditions_line(rows, note)


TABLES: dict[str, Callable[[], str]] = {
    "six-results": six_results, "losses": losses, "limits": limits, "batch-size": batch_size,
    "small-batches": small_batches, "whole-step": whole_step, "kmeans": kmeans,
    "kmeans-iterations": kmeans_iterations, "kmeans-quality": kmeans_quality, "kmeans-files": kmeans_files,
    "build-time": build_time, "demo": demo, "suppression": suppression, "ranks": ranks, "scale": scale,
    "gpu-static": gpu.counts, "gpu-loops": gpu.loops, "gpu-schedule": gpu.schedule, "gpu-bounds": gpu.bounds,
}  # fmt: skip


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """Returns a page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{found[2]}{TABLES[found[1]]()}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    changed = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            changed.append(page.name)
            if not options.check:
                page.write_text(after, encoding="utf-8")
    print(f"{'differ' if options.check else 'written'}: {', '.join(changed) or 'none'}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
