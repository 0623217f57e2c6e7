"""`mcl-kernels cluster`: from the features of a stage, in a file, to the pseudo labels of the next one, in a file.

Files of features are read in chunks or mapped, never held as a whole. The labels are there whole or not at all, and a
summary lies beside them.
"""

from __future__ import annotations

import json
import pickle
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mcl_kernels
from mcl_kernels._durable import check_writable, replaced_file, sha256_of, write_array
from mcl_kernels._validate import as_integer_vector
from mcl_kernels.kmeans import KMeans
from mcl_kernels.kmeans.sources import FileRows, Rows, as_tensor, open_rows
from mcl_kernels.pseudo_labels import compose_pairs, label_dtype, shares_of_small_labels, starvation
from mcl_kernels.stored_labels import StoredLabels

AMI_ROWS = 1 << 20
SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


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


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Clusters, composes with the labels of earlier stages, writes labels and summary; returns the summary."""
    kmeans = KMeans(
        options.clusters, metric=options.metric, n_init=options.n_init, max_iter=options.max_iter, tol=options.tol,
        batch_size=options.batch_size, seed=options.seed, impl=options.impl,
    )  # fmt: skip
    rows = open_features(options.features, options.tensor)
    n = rows.count()
    previous = [open_labels(path, n) for path in options.previous]
    summary_path = _check_output(options)
    say(f"{options.features}: {n:,} rows of {rows.width} features, {_name(rows.dtype)}")

    started = time.perf_counter()
    kmeans.fit(rows)
    clusters, seconds = kmeans.labels_, time.perf_counter() - started
    cluster_sizes = clusters.bincount()
    say(
        f"{len(cluster_sizes)} clusters of {_sizes(cluster_sizes)} rows: "
        f"inertia {kmeans.inertia_:.6g}, {kmeans.n_iter_} iterations, {seconds:.1f} s"
    )
    ami: list[float | None] = [None] * len(previous)
    try:
        ami = [_ami(labels, clusters, options.seed) for labels in previous]
    except ModuleNotFoundError:
        say("AMI is not computed: it needs scikit-learn, pip install 'mcl-kernels[demo]'")
    for path, value in zip(options.previous, ami, strict=True):
        drawn = f" (of {AMI_ROWS:,} rows drawn at random)" if n > AMI_ROWS else ""
        if value is not None:
            say(f"AMI with {path}: {value:.3f}{drawn}")

    dtype = torch.int64 if options.out.suffix == ".pt" else label_dtype(n)  # a .pt file is that of the paper's code
    labels: Tensor = previous[0] if previous else torch.zeros(1, dtype=dtype, device="cpu").expand(n)
    for ids in (*previous[1:], clusters):
        labels, _ = compose_pairs(labels, ids, dtype)
    label_sizes = (labels if int(labels.min()) >= 0 else labels[labels >= 0]).bincount()
    summary = {
        "options": {key: _jsonable(value) for key, value in asdict(options).items()},
        "rows": n,
        "features": rows.width,
        "dtype": _name(rows.dtype),
        "clusters": len(cluster_sizes),
        "inertia": kmeans.inertia_,
        "iterations": kmeans.n_iter_,
        "init_rows": kmeans.init_rows_,
        "seconds": seconds,
        "labels": len(label_sizes),
        "unlabelled": n - int(label_sizes.sum()),
        "ami": dict(zip(map(str, options.previous), ami, strict=True)),
        "ami_rows": min(n, AMI_ROWS),
        "versions": {
            "mcl_kernels": mcl_kernels.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "cluster_sizes": cluster_sizes.tolist(),
        "label_sizes": label_sizes.tolist(),
        **shares_of_small_labels(label_sizes),
    }
    # The summary is renamed before the labels are, which nothing follows that could fail.
    with replaced_file(options.out) as file, replaced_file(summary_path) as beside:
        if options.out.suffix == ".pt":
            torch.save(labels, file)
        else:
            write_array(file, labels.numpy())
        file.flush()
        summary["sha256"] = sha256_of(Path(file.name))
        beside.write(json.dumps(summary, indent=2).encode())
    without = f", {summary['unlabelled']:,} rows without one" if summary["unlabelled"] else ""
    say(f"{options.out}: {len(label_sizes):,} pseudo labels of {_sizes(label_sizes)} rows{without}; {summary_path}")
    if starved := starvation(label_sizes):
        say(f"few negatives: {starved}")
    return summary


def open_features(path: Path, tensor: str | None) -> Rows:
    """The rows of a .npy, .pt or .safetensors file; `tensor` is the name of one among several."""
    if path.suffix not in (".npy", ".pt", ".safetensors"):
        raise ValueError(f"FEATURES must be a .npy, .pt or .safetensors file: got {path}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, tensor)
    loaded = _load(path)
    if isinstance(loaded, dict):
        loaded = loaded[_choose(path, list(loaded), tensor)]
    elif tensor is not None:
        raise ValueError(f"--tensor is for files of several tensors: {path} holds one")
    if not isinstance(loaded, (Tensor, np.ndarray)):
        raise TypeError(f"{path} must hold a tensor or an array: got {type(loaded).__name__}")
    return open_rows(str(path), loaded)


def open_labels(path: Path, n: int) -> StoredLabels:
    """The labels of n rows, of an earlier stage or of all of them, mapped."""
    if path.suffix not in (".npy", ".pt"):
        raise ValueError(f"--previous must be .npy or .pt files: got {path}")
    loaded = as_tensor(str(path), _load(path))
    alike = torch.empty_like(loaded, device="meta") if isinstance(loaded, Tensor) else loaded
    as_integer_vector(str(path), alike)
    if len(loaded) != n:
        raise ValueError(f"{path} must have one label per row of FEATURES: got {len(loaded)} labels for {n} rows")
    return StoredLabels(loaded)


def _open_safetensors(path: Path, tensor: str | None) -> FileRows:
    """The rows where they lie in the file, bfloat16 ones too."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        try:
            with safe_open(path, "np") as opened:
                name = _choose(path, list(opened.keys()), tensor)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))[name]
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise TypeError(f"{name} of {path} must be one of {', '.join(SAFETENSORS_DTYPES)}: got {entry['dtype']}")
    if len(entry["shape"]) != 2:
        raise ValueError(f"{name} of {path} must have shape [rows, features]: got {entry['shape']}")
    position = 8 + header_bytes + entry["data_offsets"][0]
    return FileRows(str(path), path, position, tuple(entry["shape"]), dtype)


def _load(path: Path) -> Any:
    """Contents of a .npy or .pt file, memory mapped; nothing is unpickled."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read: {why}") from None


def _choose(path: Path, names: Sequence[str], tensor: str | None) -> str:
    if tensor is None and len(names) == 1:
        return names[0]
    if tensor is None or tensor not in names:
        raise ValueError(f"--tensor must be one of {', '.join(map(str, names))} in {path}: got {tensor}")
    return tensor


def _check_output(options: Options) -> Path:
    """Raises before the clustering what would be raised after it; returns where the summary goes."""
    if options.out.suffix not in (".npy", ".pt"):
        raise ValueError(f"--out must be a .npy or .pt file: got {options.out}")
    if options.out.is_dir():
        raise IsADirectoryError(f"--out must be a file: {options.out} is a directory")
    for path in (options.features, *options.previous):
        if options.out.exists() and options.out.samefile(path):
            raise ValueError(f"--out must not be one of the files that are read: got {options.out}")
    check_writable(options.out.parent)
    summary = options.out.with_name(f"{options.out.name}.json")
    if summary.is_dir():
        raise IsADirectoryError(f"the summary must be a file: {summary} is a directory")
    return summary


def _ami(labels: Tensor, clusters: Tensor, seed: int) -> float | None:
    """Adjusted mutual information of earlier labels with the clusters, where there are labels."""
    from sklearn.metrics import adjusted_mutual_info_score

    if len(clusters) > AMI_ROWS:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(clusters), (AMI_ROWS,), generator=generator, device="cpu")
        labels, clusters = labels[drawn], clusters[drawn]
    known = labels >= 0
    return float(adjusted_mutual_info_score(labels[known], clusters[known])) if bool(known.any()) else None


def _sizes(sizes: Tensor) -> str:
    return f"{int(sizes.min()):,} to {int(sizes.max()):,}" if len(sizes) else "0"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [str(path) for path in value] if isinstance(value, (list, tuple)) else value
