"""Cells and lines of the tables that `benchmarks.tables` writes."""

from __future__ import annotations

from collections.abc import Sequence

Rows = list[dict[str, str]]


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def significant(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def factor(value: float) -> str:
    """Two significant digits."""
    return number(value, 0 if value >= 10 else 1 if value >= 1 else 2)


def median(rows: Rows) -> str:
    """Name of what `seconds` shows of these rows."""
    return "Median (p20 to p80)" if any(row.get("p20") for row in rows) else "Median"


def seconds(row: dict[str, str]) -> str:
    """Median of a row with its spread, if it has one: `34.5 ms (31.6 to 37.8)`."""
    scale, unit = (1.0, "s") if float(row["p50"]) >= 1 else (1e3, "ms")
    spread = [significant(scale * float(row[name])) for name in ("p20", "p80") if row.get(name)]
    between = f" ({' to '.join(spread)})" if spread else ""
    return f"{significant(scale * float(row['p50']))} {unit}{between}"


def mebibytes(row: dict[str, str]) -> str:
    return f"{significant(int(row['peak_bytes']) / 2**20)} MiB"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Table in Markdown; a line in its place if it has no rows."""
    if not body:
        return "Not measured yet.\n"
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *body))


def conditions_line(rows: Rows, note: str, *packages: str) -> str:
    """Paragraph with a note and the conditions of the rows: processor, threads, versions, commits; "" without rows."""
    if not rows:
        return ""

    def values(column: str) -> list[str]:
        return list(dict.fromkeys(row[column] for row in rows if row.get(column)))

    versions = [version for text in values("versions") for version in text.split("; ")]
    shown = [version for version in dict.fromkeys(versions) if version.split(" ")[0] in ("python", "torch", *packages)]
    threads, commits = values("threads"), values("commit")
    parts = [
        *values("processor"),
        *([f"{' or '.join(threads)} thread{'s' * (threads != ['1'])}"] if threads else []),
        *shown,
        f"commit {', '.join(commits)}" if len(commits) <= 3 else f"{len(commits)} commits",
    ]
    return f"\n{note}. {', '.join(parts)}.\n"
