"""The keys of a data set: one distinct string per sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor


class SampleKeys:
    """Looks up samples by their key.

    Raises:
        TypeError: keys that are not strings.
        ValueError: another number of keys than samples, or the same key twice.
    """

    def __init__(self, keys: Sequence[str], n_samples: int) -> None:
        if len(keys) != n_samples:
            raise ValueError(f"keys must have one entry per sample: got {len(keys)} keys for {n_samples} samples")
        self._index_of_key: dict[str, int] = {}
        for index, key in enumerate(keys):
            if not isinstance(key, str):
                raise TypeError(f"keys must be strings: got {type(key).__name__} at {index}; use str(key)")
            first = self._index_of_key.setdefault(key, index)
            if first != index:
                raise ValueError(f"keys must be distinct: {key!r} is at {first} and {index}")

    def indices_of(self, keys: Sequence[str]) -> Tensor:
        """Returns the positions of the samples with these keys, int64 [B]."""
        unknown = [key for key in keys if key not in self._index_of_key]
        if unknown:
            raise ValueError(f"keys must be among those given to the runner: got {unknown[0]!r}")
        return torch.tensor([self._index_of_key[key] for key in keys], dtype=torch.int64, device="cpu")

    def sha256(self) -> str:
        """SHA-256 of all keys in their order, by which a run is recognised."""
        return hashlib.sha256(json.dumps(list(self._index_of_key)).encode()).hexdigest()
