"""`mcl-kernels cluster`: reads the features of a stage from a file, and writes the pseudo labels of the next one.

Features are read in chunks or mapped, never loaded as one array. Labels and their summary are each replaced in one
step, after both are on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcl_kernels.cli.input_files import open_features, open_labels, summary_of
from mcl_kernels.cli.output_files import check_outputs, dtype_name, jsonable, size_range, write_labels
from mcl_kernels.kmeans import KMeans
from mcl_kernels.kmeans.files import dump
from mcl_kernels.stages.pseudo_labels import compose_pairs, label_dtype, shares_of_small_labels, starvation
from mcl_kernels.stages.stored_labels import StoredLabels

MAX_AMI_ROWS = 1 << 20  # of more rows a sample is compared


@dataclass(frozen=True)
class Options:
    """Settings of the command: its input, the clustering and its output."""

    features: Path
    out: Path
    clusters: int
    previous: Sequence[Path] = ()
    tensor: str | None = None
    metric: str = "cosine"
    seed: int = 0
    n_init: int = 1
    max_iter: int = 100
    tol: float = 1e-4
    batch_size: int | None = None
    impl: str = "auto"
    centers: Path | None = None


def run(options: Options, report: Callable[[str], None]) -> None:
    """Clusters the rows, composes clusters and labels of earlier stages, and writes labels, summary and centres."""
    kmeans = KMeans(
        options.clusters,
        metric=options.metric,
        n_init=options.n_init,
        max_iter=options.max_iter,
        tol=options.tol,
        batch_size=options.batch_size,
        seed=options.seed,
        impl=options.impl,
    )
    rows = open_features(options.features, options.tensor)
    n = rows.count()
    if n < options.clusters:
        raise ValueError(f"--clusters must be at most the number of rows: got {options.clusters} for {n} rows")
    previous = [open_labels(path, n) for path in options.previous]
    inputs = [options.features, *options.previous, *map(summary_of, options.previous)]
    check_outputs(options.out, options.centers, inputs)
    report(f"{options.features}: {n:,} rows of {rows.width} features, {dtype_name(rows.dtype)}")

    started = time.perf_counter()
    kmeans.fit(rows)
    clusters, seconds = kmeans.labels_, time.perf_counter() - started
    cluster_sizes = clusters.bincount()
    report(
        f"{len(cluster_sizes)} clusters of {size_range(cluster_sizes)} rows: "
        f"inertia {kmeans.inertia_:.6g}, {kmeans.n_iter_} iterations, {seconds:.1f} s"
    )
    ami = _compare(options, previous, clusters, report)

    labels = _compose(options, previous, clusters)
    label_sizes = (labels if int(labels.min()) >= 0 else labels[labels >= 0]).bincount()
    summary = {
        "options": {key: jsonable(value) for key, value in asdict(options).items()},
        "rows": n,
        "features": rows.width,
        "dtype": dtype_name(rows.dtype),
        "clusters": len(cluster_sizes),
        "inertia": kmeans.inertia_,
        "iterations": kmeans.n_iter_,
        "init_rows": kmeans.init_rows_,
        "seconds": seconds,
        "labels": len(label_sizes),
        "unlabelled": n - int(label_sizes.sum()),
        "ami": ami,
        "ami_rows": min(n, MAX_AMI_ROWS),
        "cluster_sizes": cluster_sizes.tolist(),
        "label_sizes": label_sizes.tolist(),
        **shares_of_small_labels(label_sizes),
    }
    centers = None if options.centers is None else (options.centers, dump(kmeans))
    write_labels(options.out, labels, summary, centers)
    _report_labels(options, summary, label_sizes, report)


def _compare(
    options: Options, previous: Sequence[StoredLabels], clusters: Tensor, report: Callable[[str], None]
) -> dict[str, float | None]:
    """Reports and returns the AMI of the clusters with each file of earlier labels; None if it cannot be computed."""
    ami: list[float | None] = [None] * len(previous)
    try:
        ami = [_ami(labels, clusters, options.seed) for labels in previous]
    except ModuleNotFoundError:
        report("AMI is not computed: it needs scikit-learn, pip install 'mcl-kernels[demo]'")
    except Exception as error:  # for example a broken installation: the labels do not depend on it
        report(f"AMI is not computed: {type(error).__name__}: {error}")
    sampled = f" (of {MAX_AMI_ROWS:,} rows drawn at random)" if len(clusters) > MAX_AMI_ROWS else ""
    for path, value in zip(options.previous, ami, strict=True):
        if value is not None:
            report(f"AMI with {path}: {value:.3f}{sampled}")
    return dict(zip(map(str, options.previous), ami, strict=True))


def _compose(options: Options, previous: Sequence[StoredLabels], clusters: Tensor) -> Tensor:
    """Composes the labels of earlier stages and the new clusters into dense pseudo labels."""
    n = len(clusters)
    dtype = torch.int64 if options.out.suffix == ".pt" else label_dtype(n)  # the paper's code reads .pt files as int64
    labels: Tensor = previous[0] if previous else torch.zeros(1, dtype=dtype, device="cpu").expand(n)
    for ids in (*previous[1:], clusters):
        labels, _ = compose_pairs(labels, ids, dtype)
    return labels


def _report_labels(
    options: Options, summary: Mapping[str, Any], label_sizes: Tensor, report: Callable[[str], None]
) -> None:
    unlabelled = f", {summary['unlabelled']:,} rows without one" if summary["unlabelled"] else ""
    centers_file = "" if options.centers is None else f", {options.centers}"
    report(
        f"{options.out}: {len(label_sizes):,} pseudo labels of {size_range(label_sizes)} rows{unlabelled}; "
        f"{summary_of(options.out)}{centers_file}"
    )
    if starved := starvation(label_sizes):
        report(f"few negatives: {starved}")


def _ami(labels: Tensor, clusters: Tensor, seed: int) -> float | None:
    """Adjusted mutual information of earlier labels with the clusters, over the rows that have a label, if any."""
    from sklearn.metrics import adjusted_mutual_info_score

    if len(clusters) > MAX_AMI_ROWS:
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randint(len(clusters), (MAX_AMI_ROWS,), generator=generator, device="cpu")
        labels, clusters = labels[sample], clusters[sample]
    labelled = labels >= 0
    return float(adjusted_mutual_info_score(labels[labelled], clusters[labelled])) if bool(labelled.any()) else None
