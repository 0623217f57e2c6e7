"""The report of the study: one HTML page with its tables and figures inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.suppression import plots, tables
from experiments.suppression.details import Details, read_details
from experiments.suppression.groups import OBJECTIVE_TITLES, Group, Groups
from experiments.suppression.results import RECALL_AT, RunResult
from experiments.suppression.settings import kind_of
from experiments.suppression.suite import SWEEP_DATA
from mcl_kernels._durable import replace_file
from mcl_kernels.cli.report import data_uri


def write_page(groups: Groups, path: Path, directory: Path) -> Path:
    """Writes the report in one step; returns its path.

    Args:
        directory: directory with the details of the runs that were trained here.
    """
    from jinja2 import Environment

    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    sweep = tables.sweep(groups)
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            thresholds=list(tables.threshold_claims(groups)),
            orderings=list(tables.ordering_claims(groups)),
            columns=tables.overview_columns(groups),
            overview=tables.overview(groups),
            sections=[_section(data, by_name, directory) for data, by_name in groups.items()],
            against_bits={kind: data_uri(figure) for kind, figure in plots.against_bits(groups).items()},
            sweep=sweep,
            sweep_figure=data_uri(plots.sweep(sweep)) if sweep else None,
            paper=tables.PAPER,
            objective_titles=OBJECTIVE_TITLES,
            recall_at=RECALL_AT,
            trifeature=groups.get("trifeature-64", {}),
            conditions=sorted(
                {_conditions(run) for by_name in groups.values() for group in by_name.values() for run in group.runs}
            ),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, html.encode())
    return path


def _section(data: str, by_name: dict[str, Group], directory: Path) -> dict[str, Any]:
    """Content of the section of one data set; None for a figure that its runs do not have."""
    default = [group for group in by_name.values() if group.is_default]
    several = [group for group in default if len(group.runs[0].encoders) > 1]
    retrieved = [group for group in default if group.runs[0].retrieval]
    first = next(iter(by_name.values())).runs[0]
    return {
        "data": data,
        "folded": kind_of(data).endswith("randbits") and data != SWEEP_DATA,
        "groups": default,
        # The runs of the sweep have a table of their own.
        "rows": [g for g in by_name.values() if data != SWEEP_DATA or not g.name.startswith("mcl+simclr ")],
        "features": list(first.concatenation),
        "chance": {name: 1 / classes for name, classes in first.classes.items()},
        "by_stage": data_uri(plots.by_stage(default)) if several else None,
        "ami": data_uri(plots.agreement(several)) if several else None,
        "retrieval": data_uri(plots.retrieval(retrieved)) if retrieved else None,
        "mcl": _mcl_section(next((group for group in several if group.settings.regime == "mcl"), None), directory),
    }


def _mcl_section(group: Group | None, directory: Path) -> dict[str, Any] | None:
    """Details of the first run of MCL that has details, or the command that makes them."""
    if group is None:
        return None
    section: dict[str, Any] = {"title": group.title, "continues": group.settings.start == "previous"}
    run, details = _first_details(group, directory)
    if details is None:
        seed = group.settings.seed
        runs = f"{group.data} {group.settings.method} --seeds {seed} --details"
        return {**section, "seed": seed, "command": f'make suppression RUNS="{runs}"'}
    return {
        **section,
        "seed": run.settings.seed,
        "curves": data_uri(plots.loss_curves(details)),
        "label_sizes": data_uri(plots.label_sizes(details)),
        "neighbours": data_uri(plots.neighbour_gallery(details, group.features)),
    }


def _first_details(group: Group, directory: Path) -> tuple[RunResult, Details | None]:
    for run in group.runs:
        if details := read_details(run.settings, directory):
            return run, details
    return group.runs[0], None


def _conditions(run: RunResult) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return f"{run.processor}, {run.threads} thread; {versions}; commit {run.commit}"
