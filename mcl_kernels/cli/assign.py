"""`mcl-kernels assign`: reads new features and saved centres from files, and writes the nearest centre of each row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mcl_kernels._durable import sha256_of
from mcl_kernels.cli.input_files import open_features
from mcl_kernels.cli.output_files import check_outputs, dtype_name, jsonable, size_range, write_labels
from mcl_kernels.kmeans import KMeans


@dataclass(frozen=True)
class Options:
    """Settings of the command: its inputs and its output."""

    features: Path
    centers: Path
    out: Path
    tensor: str | None = None
    impl: str = "auto"


def run(options: Options, report: Callable[[str], None]) -> None:
    """Finds the nearest saved centre of each row, and writes the cluster ids and their summary."""
    kmeans = KMeans.load(options.centers)
    kmeans.impl = options.impl
    rows = open_features(options.features, options.tensor)
    n, width = rows.count(), kmeans.cluster_centers_.shape[1]
    if rows.width != width:
        raise ValueError(
            f"{options.features} must have the {width} features of the centres in {options.centers}: got {rows.width}"
        )
    check_outputs(options.out, None, [options.features, options.centers])
    report(f"{options.features}: {n:,} rows of {rows.width} features, {dtype_name(rows.dtype)}")

    started = time.perf_counter()
    clusters = kmeans.predict(rows)
    seconds = time.perf_counter() - started
    sizes = clusters.bincount(minlength=len(kmeans.cluster_centers_))
    summary = {
        "options": {key: jsonable(value) for key, value in asdict(options).items()},
        "rows": n,
        "features": rows.width,
        "dtype": dtype_name(rows.dtype),
        "clusters": len(sizes),
        "metric": kmeans.metric,
        "seconds": seconds,
        "centers_sha256": sha256_of(options.centers),
        "cluster_sizes": sizes.tolist(),
    }
    labels = clusters if options.out.suffix == ".pt" else clusters.to(torch.int32)
    write_labels(options.out, labels, summary, None)
    report(f"{options.out}: {len(sizes):,} clusters of {size_range(sizes)} rows, {seconds:.1f} s")
