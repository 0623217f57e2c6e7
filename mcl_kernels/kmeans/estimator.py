"""scikit-learn's habits: parameters, and what a fitted k-means computes. scikit-learn is not imported."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mcl_kernels.kmeans.assign import find_nearest, nearest_by_chunk
from mcl_kernels.kmeans.centers import serial_sum
from mcl_kernels.kmeans.distances import distances_to_all
from mcl_kernels.kmeans.rows import Array, RowsLike, open_rows
from mcl_kernels.kmeans.weights import as_weights

if TYPE_CHECKING:
    from typing_extensions import Self


class Estimator:
    """Base class of `KMeans` with scikit-learn's methods, for its `clone`, `Pipeline` and `GridSearchCV`.

    Results are tensors on the device of the data. A next step of a `Pipeline` reads those on the CPU as arrays.
    """

    metric: str
    impl: str
    cluster_centers_: Tensor
    labels_: Tensor
    feature_names_in_: Array
    _dtype: torch.dtype  # of products; `predict` uses the same, so that even labels of ties are the same

    def fit(self, x: RowsLike, y: object = None, sample_weight: object = None) -> Self:
        raise NotImplementedError

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the arguments of the constructor by name, as they were given. `deep` is ignored."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> Self:
        """Sets arguments of the constructor by name, and returns this object.

        Raises:
            TypeError, ValueError: as the constructor, or another name; nothing is set.

        Example:
            >>> from mcl_kernels import KMeans
            >>> KMeans(3).set_params(n_clusters=4, n_init="auto").get_params()["n_clusters"]
            4
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise ValueError(f"set_params takes {', '.join(known)}: got {name}")
        type(self)(**{**known, **params})  # checks the values together
        vars(self).update(params)
        return self

    @property
    def n_features_in_(self) -> int:
        """D, the width of the rows of `fit`."""
        return self.cluster_centers_.shape[1]

    def predict(self, x: RowsLike) -> Tensor:
        """Returns the nearest centre of each row of x (anything that `fit` takes), int64 [N].

        Ranks of a group call it independently.

        Raises:
            RuntimeError: `fit` was not called.
            TypeError, ValueError: rows that the class lists, of another width than those of `fit`, or of other columns.
        """
        self._check_fitted(x)
        return find_nearest(x, self.cluster_centers_, self.metric, self.impl, self._dtype)[0]

    def transform(self, x: RowsLike) -> Tensor:
        """Returns the distances of each row of x (anything that `fit` takes) to all centres, [N, K].

            euclidean   |x_i - c_k|, not squared, as in scikit-learn
            cosine      1 - <x_i, c_k> / (|x_i| |c_k|)

        They are fp32 (fp64 if rows or centres are fp64), computed in fp64 by PyTorch whatever `impl` is. Ranks of a
        group call it independently.

        Raises:
            RuntimeError, TypeError, ValueError: as `predict`.

        Example:
            >>> from mcl_kernels import KMeans
            >>> kmeans = KMeans(2, init=torch.tensor([[0.0, 0.0], [9.0, 0.0]])).fit(torch.tensor([[0.0, 0], [9.0, 0]]))
            >>> kmeans.transform(torch.tensor([[3.0, 4.0]]))
            tensor([[5.0000, 7.2111]])
        """
        self._check_fitted(x)
        return distances_to_all(x, self.cluster_centers_, self.metric)

    def score(self, x: RowsLike, y: object = None, sample_weight: object = None) -> float:
        """Returns minus the inertia of x (anything that `fit` takes), so that a higher score is better. y is ignored.

        Ranks of a group call it independently. `sample_weight` is as in `fit`; all weights may be 0.

        Raises:
            RuntimeError, TypeError, ValueError: as `predict`.

        Example:
            >>> from mcl_kernels import KMeans
            >>> KMeans(1).fit(torch.tensor([[0.0], [2.0]])).score(torch.tensor([[4.0], [1.0]]))
            -9.0
        """
        self._check_fitted(x)
        rows, weights, inertia, begin = open_rows("x", x), None, 0.0, 0
        if sample_weight is not None:
            weights = as_weights(sample_weight, rows.count(), rows.name).to(rows.device)
        for _, distances in nearest_by_chunk(rows, self.cluster_centers_, self.metric, self.impl, self._dtype):
            here = slice(begin, begin + len(distances))
            inertia += serial_sum(distances, None if weights is None else weights[here])
            begin = here.stop
        return -inertia

    def fit_predict(self, x: RowsLike, y: object = None, sample_weight: object = None) -> Tensor:
        """Returns `fit(x, y, sample_weight).labels_`."""
        return self.fit(x, y, sample_weight).labels_

    def fit_transform(self, x: RowsLike, y: object = None, sample_weight: object = None) -> Tensor:
        """Returns `fit(x, y, sample_weight).transform(x)`."""
        return self.fit(x, y, sample_weight).transform(x)

    def _check_fitted(self, x: object) -> None:
        """Raises if `fit` was not called, or had columns of other names than x has."""
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans has no clusters yet: call fit(x) first")
        names, expected = column_names(x), getattr(self, "feature_names_in_", None)
        if names is not None and expected is not None and names.tolist() != expected.tolist():
            raise ValueError(f"x must have the columns of fit in their order, {list(expected)}: got {list(names)}")

    def __sklearn_tags__(self) -> Any:
        """Returns what scikit-learn 1.6 and later ask of an estimator."""
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
        )


def column_names(x: object) -> Array | None:
    """Returns the names of the columns of a DataFrame; None for other rows, or if a name is not a string."""
    return as_names(list(getattr(x, "columns", ())) if hasattr(x, "to_numpy") else [])


def as_names(names: list[Any]) -> Array | None:
    """Returns names in scikit-learn's form, None if there are none or one is not a string."""
    return np.array(names, dtype=object) if names and all(isinstance(name, str) for name in names) else None
