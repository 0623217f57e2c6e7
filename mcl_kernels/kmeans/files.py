"""A fitted k-means in a safetensors file: centres, settings and results. Loading unpickles nothing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcl_kernels._durable import open_regular, replace_file
from mcl_kernels.kmeans.estimator import as_names
from mcl_kernels.kmeans.settings import Settings, check_settings

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "mcl_kernels.KMeans 1"
SETTINGS = tuple(name for name in Settings._fields if name != "ranks")
RESULTS = ("inertia_", "n_iter_", "init_rows_", "history_")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Saveable:
    """Base class of `KMeans` with `save` and `load`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the centres, the settings and the results of `fit`, in the safetensors format.

        `labels_`, one for each row, and a `group` are not saved. The file is replaced in one step.

        Args:
            path: the file to write, in a directory that exists.

        Raises:
            RuntimeError: `fit` was not called.
            OSError: the file cannot be written; an earlier one is unchanged.

        Example:
            >>> import tempfile
            >>> from mcl_kernels import KMeans
            >>> x = torch.randn(100, 4)
            >>> kmeans = KMeans(3).fit(x)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     kmeans.save(f"{directory}/kmeans.safetensors")
            ...     loaded = KMeans.load(f"{directory}/kmeans.safetensors")
            >>> torch.equal(loaded.predict(x), kmeans.labels_)
            True
        """
        replace_file(Path(path), dump(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """Loads a file that `save` wrote. `predict` returns the same labels as before; `labels_` is not set.

        Nothing is unpickled. The content is compared with the checksum in the file.

        Args:
            path: the file that `save` wrote.
            device: device of the centres, and so of the rows that `predict` takes.

        Returns:
            A fitted `KMeans` without a `group`.

        Raises:
            OSError: the file cannot be opened, or is not a regular file.
            ValueError: the file was not written by `save`: another format or version, damaged, or inconsistent.

        Example:
            See `save`.
        """
        tensors, fields = _read(Path(path))
        try:
            fields.setdefault("bounds", True)  # files of earlier versions hold none
            settings = {name: fields[name] for name in SETTINGS}
            if settings["init"] is None:
                settings["init"] = tensors["init"]
            n_clusters, centers = settings.pop("n_clusters"), tensors["cluster_centers"]
            kmeans = cls(n_clusters, **settings)  # type: ignore[call-arg]
            results = {name: fields[name] for name in RESULTS}
            types = {"inertia_": float, "n_iter_": int, "init_rows_": int, "history_": list}
            for name, expected in types.items():
                if type(results[name]) is not expected or (expected is int and results[name] < 0):
                    raise ValueError(f"{name} = {results[name]!r}")
            if centers.ndim != 2 or not 1 <= len(centers) <= n_clusters or not centers.shape[1]:
                raise ValueError(f"centres of shape {list(centers.shape)} for {n_clusters} clusters")
            if centers.dtype not in DTYPES.values() or not bool(centers.isfinite().all()):
                raise ValueError(f"centres that are not finite, or of {centers.dtype}")
            names = as_names(fields.get("feature_names_in_") or [])
            product_dtype = DTYPES[fields["product_dtype"]]
        except KeyError as error:
            raise ValueError(f"{path} is not a k-means that save wrote: no {error}") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a k-means that save wrote: {error}") from None
        if names is not None:
            results["feature_names_in_"] = names
        vars(kmeans).update(results, cluster_centers_=centers.to(device), _dtype=product_dtype)
        return kmeans

    def __getstate__(self) -> dict[str, Any]:
        if vars(self).get("group") is not None:
            raise TypeError("a KMeans with a group cannot be copied or pickled, as its group cannot: use save and load")
        return vars(self)


def dump(kmeans: Any) -> bytes:
    """Returns the content of the file of a fitted k-means."""
    from safetensors.torch import save

    if not hasattr(kmeans, "cluster_centers_"):
        raise RuntimeError("this KMeans has no clusters yet: call fit(x) before save(path)")
    settings = check_settings(kmeans)
    fields = {name: getattr(settings, name) for name in SETTINGS}
    fields.update({name: getattr(kmeans, name) for name in RESULTS})
    fields["feature_names_in_"] = list(getattr(kmeans, "feature_names_in_", [])) or None
    fields["product_dtype"] = str(kmeans._dtype).removeprefix("torch.")
    tensors = {"cluster_centers": kmeans.cluster_centers_.cpu().contiguous()}
    if isinstance(settings.init, Tensor):
        fields["init"], tensors["init"] = None, settings.init.cpu().contiguous()
    text = json.dumps(fields)
    return save(tensors, {"format": FORMAT, "kmeans": text, "sha256": _digest(text, tensors)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file and checks it by its checksum; returns its tensors, and its settings and results."""
    from safetensors import SafetensorError, safe_open

    open_regular(path).close()
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a k-means that save wrote: its format is {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["kmeans"]
        if metadata["sha256"] != _digest(text, tensors):
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it holds; fit again, and save")
        fields = json.loads(text)
    except KeyError as error:
        raise ValueError(f"{path} is not a k-means that save wrote: no {error}") from None
    except (SafetensorError, RecursionError) as error:
        raise ValueError(f"{path} is not a k-means that save wrote: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a k-means that save wrote: its settings are not a dictionary")
    return tensors, fields


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the settings, and of the tensors with their names, shapes and dtypes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {list(x.shape)} {x.dtype}".encode())
        digest.update(x.view(torch.uint8).numpy().data)
    return digest.hexdigest()
