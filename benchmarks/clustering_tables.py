"""Tables of whole k-means fits, from clustering.csv."""

from __future__ import annotations

from benchmarks.clustering import CASES, PLUS_PLUS
from benchmarks.clustering_figure import FIGURE_CASE
from benchmarks.markdown import Rows, conditions_line, factor, markdown, median, seconds, significant

DATA = {"mnist": "MNIST", "wordnet": "WordNet's definitions by MiniLM", "rank-16": "Gaussian of rank 16, with noise"}
DATA |= {"gaussian": "Gaussian"}
TITLES = {case.name: DATA[case.data] for case in CASES}
PEERS = ("scikit-learn", "scikit-learn-intelex", "faiss", "superkmeans")
PACKAGES = ("scikit-learn", "scikit-learn-intelex", "faiss-cpu", "superkmeans")
FEW, MANY = "5", "25"  # modes whose difference is the time of an iteration
Found = dict[str, dict[str, str]]  # rows of one case and mode, by contender


def fits(rows: Rows) -> str:
    """Time of whole fits, with the factor of each peer."""
    found_fits = _whole_fits(rows)
    body = [[*_shape(found["ours"]), _fit_name(found["ours"]), *_cells(found)] for found in found_fits]
    header = ["data", "rows", "K", "fit", "mcl_kernels", *PEERS]
    used = [row for found in found_fits for row in found.values()]
    note = f"{median(used)} of turns: time of the peer / time of mcl_kernels"
    return markdown(header, body) + conditions_line(used, note, *PACKAGES)


def iterations(rows: Rows) -> str:
    """Time of a fit of one iteration, and of one of the 6th to the 25th iterations, by the difference of two fits."""
    used, body, by_fit = [], [], _by_fit(rows)
    for (case, mode), found in by_fit.items():
        if mode == "1":
            used += list(found.values())
            body.append([*_shape(found["ours"]), "whole fit of 1", *_cells(found)])
        elif mode == MANY and (case, FEW) in by_fit:
            used += list(found.values())
            body.append([*_shape(found["ours"]), "one of the 6th to 25th", *_later(by_fit[case, FEW], found)])
    header = ["data", "rows", "K", "iteration", "mcl_kernels", *PEERS]
    note = f"{median(used)} of turns, a later iteration: difference of two medians / {int(MANY) - int(FEW)}"
    return markdown(header, body) + conditions_line(used, f"{note}; time of the peer / time of mcl_kernels", *PACKAGES)


def quality(rows: Rows) -> str:
    """Inertia of the same fits over the best, with the share of equal labels, and what an iteration of ours reads."""
    used, body = [], []
    for found in _whole_fits(rows):
        used += list(found.values())
        ours = found["ours"]
        read = f"{float(ours['read']):.2f}" if ours["read"] else ""
        cells = [_inertia(row) if (row := _peer(found, name)) else "" for name in PEERS]
        body.append([*_shape(ours), _fit_name(ours), read, f"{float(ours['inertia_ratio']):.4f}", *cells])
    header = ["data", "rows", "K", "fit", "share of rows read", "mcl_kernels", *PEERS]
    note = "Inertia / the best one (share of labels equal to those of mcl_kernels)"
    return markdown(header, body) + conditions_line(used, note, *PACKAGES)


def headline(rows: Rows) -> tuple[str, dict[str, str], dict[str, str]] | None:
    """Title, our row and scikit-learn's of README's fit; None if it is not measured."""
    found = _by_fit(rows).get((FIGURE_CASE, "converged"), {})
    theirs = _peer(found, "scikit-learn")
    if theirs is None:
        return None
    data, size, k = _shape(found["ours"])
    return f"k-means until convergence, {data}, {size}, K = {k}", found["ours"], theirs


def _by_fit(rows: Rows) -> dict[tuple[str, str], Found]:
    grouped: dict[tuple[str, str], Found] = {}
    for row in rows:
        grouped.setdefault((row["case"], row["mode"]), {})[row["contender"]] = row
    return grouped


def _whole_fits(rows: Rows) -> list[Found]:
    """Fits without those of one iteration, and without those that only serve to derive the time of an iteration."""
    by_fit = _by_fit(rows)
    left_out = {
        (case, mode) for case, mode in by_fit if mode == "1" or (mode in (FEW, MANY) and (case, MANY) in by_fit)
    }
    return [found for fit, found in by_fit.items() if fit not in left_out]


def _peer(found: Found, peer: str) -> dict[str, str] | None:
    """Row of a peer, the fastest one if it has several algorithms."""
    rows = [row for name, row in found.items() if name.split(",")[0] == peer]
    return min(rows, key=lambda row: float(row["p50"]), default=None)


def _shape(row: dict[str, str]) -> list[str]:
    return [TITLES[row["case"]], f"{int(row['n']):,} x {row['d']}", f"{int(row['k']):,}"]


def _fit_name(row: dict[str, str]) -> str:
    names = {"converged": f"until convergence, {row['iterations']} iterations", PLUS_PLUS: "from each one's k-means++"}
    return names.get(row["mode"], f"{row['mode']} iterations")


def _cells(found: Found) -> list[str]:
    peers = [_peer(found, name) for name in PEERS]
    theirs = [f"{seconds(row)}: {factor(float(row['ratio']))} times" if row else "" for row in peers]
    return [seconds(found["ours"]), *theirs]


def _later(few: Found, many: Found) -> list[str]:
    """Milliseconds of an iteration of ours, and those of each peer with the factor."""
    times = []
    for name in ("ours", *PEERS):
        pair = [_peer(found, name) for found in (few, many)]
        short, long = (float(row["p50"]) if row else float("nan") for row in pair)
        times.append((long - short) / (int(MANY) - int(FEW)))
    cells = [f"{significant(1e3 * t)} ms: {factor(t / times[0])} times" if t > 0 < times[0] else "" for t in times]
    return [f"{significant(1e3 * times[0])} ms" if times[0] > 0 else "", *cells[1:]]


def _inertia(row: dict[str, str]) -> str:
    equal = f" ({float(row['equal_labels']):.4f})" if row["equal_labels"] else ""
    return f"{float(row['inertia_ratio']):.4f}{equal}"
