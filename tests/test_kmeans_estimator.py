"""scikit-learn's habits: its own checks, parameters, pipelines and searches, distances, scores and DataFrames."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mcl_kernels import KMeans

# Checks of scikit-learn that fail, and why.
ARRAYS = "results are tensors, whose dtype is PyTorch's"
MESSAGES = "the error has another text: it names the argument, what came and what was expected"
LISTS = "a list is an iterable of chunks; a dtype, and so the precision, is the caller's choice"
UNFITTED = "the error is a RuntimeError: scikit-learn, and with it NotFittedError, is optional"
DRAWS = "k-means++ draws other centres from repeated rows; below with given ones"
LEFT_OUT = {
    "check_complex_data": MESSAGES,
    "check_do_not_raise_errors_in_init_or_set_params": "arguments are checked where they are given",
    "check_dtype_object": LISTS,
    "check_estimator_sparse_array": MESSAGES,
    "check_estimator_sparse_matrix": MESSAGES,
    "check_estimator_sparse_tag": MESSAGES,
    "check_estimators_dtypes": LISTS,
    "check_estimators_empty_data_messages": MESSAGES,
    "check_estimators_unfitted": UNFITTED,
    "check_fit2d_predict1d": MESSAGES,
    "check_fit_idempotent": ARRAYS,
    "check_n_features_in_after_fitting": MESSAGES,
    "check_sample_weight_equivalence_on_dense_data": DRAWS,
    "check_sample_weights_not_an_array": LISTS,
    "check_sample_weights_shape": LISTS,
    "check_set_params": "without torch.distributed any group raises a RuntimeError",
    "check_transformer_data_not_an_array": LISTS,
    "check_transformer_preserve_dtypes": ARRAYS,
    "check_transformers_unfitted": UNFITTED,
}


def blobs(n: int = 300, width: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(6, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return (centers.repeat(-(-n // 6), 1)[:n] + noise).to(dtype)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.filterwarnings("ignore")
def test_checks_of_scikit_learn(metric: str) -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks", exc_type=ImportError)
    if not hasattr(checks, "estimator_checks_generator"):
        pytest.skip("scikit-learn before 1.6 has no list of expected failures")
    kmeans = KMeans(3, metric=metric)
    results = checks.check_estimator(kmeans, expected_failed_checks=LEFT_OUT, on_skip=None, on_fail=None)
    outcomes = {result["check_name"]: result["status"] for result in results}
    expected = {name: "xfail" if name in LEFT_OUT else "passed" for name in outcomes}
    skipped = {name for name, status in outcomes.items() if status == "skipped"}
    assert skipped <= {"check_array_api_input"}
    assert outcomes == {**expected, **dict.fromkeys(skipped, "skipped")}
    assert len(outcomes) > 40
    # Only for subclasses of scikit-learn's mixins.
    checks.check_clusterer_compute_labels_predict("KMeans", kmeans)
    if "check_sample_weight_equivalence_on_dense_data" in outcomes:
        given = KMeans(3, metric=metric, init=np.random.default_rng(0).random((3, 30)), tol=0)
        checks.check_sample_weight_equivalence_on_dense_data("KMeans", given)


def test_left_out_for_its_tensors_a_second_fit_gives_the_same() -> None:
    x = blobs()
    kmeans = KMeans(6).fit(x)
    results = kmeans.labels_, kmeans.predict(x), kmeans.transform(x)
    again = kmeans.fit(x)
    for before, after in zip(results, (again.labels_, again.predict(x), again.transform(x)), strict=True):
        assert torch.equal(before, after)


def test_clone_has_the_arguments_as_they_were_given() -> None:
    base = pytest.importorskip("sklearn.base")
    given = {"n_clusters": np.int64(6), "init": blobs()[:6].numpy(), "n_init": "auto", "tol": np.float32(0), "seed": 3}
    kmeans = KMeans(**given)
    params = kmeans.get_params()
    assert all(params[name] is value for name, value in given.items())
    assert params == {**KMeans(2).get_params(), **given}
    kmeans.fit(blobs())
    clone = base.clone(kmeans)
    assert not hasattr(clone, "cluster_centers_")
    assert not hasattr(clone, "n_features_in_")
    assert torch.equal(clone.fit(blobs()).cluster_centers_, kmeans.cluster_centers_)


def test_set_params_sets_all_or_nothing() -> None:
    kmeans = KMeans(2, init=blobs()[:2])
    before = kmeans.get_params()
    for params in ({"seed": 4, "tol": -1.0}, {"seed": 4, "k": 3}, {"n_clusters": 3}):
        with pytest.raises(ValueError, match=r"tol must be at least 0|got k|init must have a row per cluster"):
            kmeans.set_params(**params)
        assert kmeans.get_params() == before
    assert kmeans.set_params(n_clusters=3, init=blobs()[:3]) is kmeans
    assert kmeans.fit(blobs()).cluster_centers_.shape == (3, 5)


def test_an_argument_set_later_is_checked_by_fit() -> None:
    kmeans = KMeans(2)
    kmeans.n_clusters = 0
    with pytest.raises(ValueError, match="n_clusters must be at least 1: got 0"):
        kmeans.fit(blobs())


@pytest.mark.parametrize(("init", "n_init"), [("random", 10), ("k-means++", 1), ("centres", 1)])
def test_auto_is_the_number_of_restarts_of_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, init: str, n_init: int
) -> None:
    from mcl_kernels.kmeans import api

    restarts: list[int] = []
    lloyd = api.lloyd
    monkeypatch.setattr(api, "lloyd", lambda *arguments: restarts.append(1) or lloyd(*arguments))
    KMeans(6, init=blobs()[:6] if init == "centres" else init, n_init="auto").fit(blobs())
    assert len(restarts) == n_init


def expected_distances(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    """Distances of all rows and centres, from differences in fp64."""
    x, centers = x.double(), centers.double()
    if metric == "cosine":
        x, centers = torch.nn.functional.normalize(x, eps=0.0), torch.nn.functional.normalize(centers, eps=0.0)
    squared = (x.unsqueeze(1) - centers).square().sum(2)
    return squared / 2 if metric == "cosine" else squared.sqrt()


# 700 rows of 1,600 features are several tiles. The offset makes products cancel, as do rows that are centres.
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("dtype", "scale", "offset", "shape"),
    [
        (torch.float32, 1.0, 0.0, (300, 5)),
        (torch.float32, 1.0, 1e4, (300, 5)),
        (torch.float32, 1e-25, 0.0, (300, 5)),
        (torch.float32, 1e25, 0.0, (300, 5)),
        (torch.float32, 1.0, 0.0, (700, 1600)),
        (torch.float16, 1.0, 0.0, (300, 5)),
        (torch.float64, 1.0, 1e6, (300, 5)),
    ],
    ids=str,
)
def test_transform_returns_the_distances_to_all_centres(
    metric: str, dtype: torch.dtype, scale: float, offset: float, shape: tuple[int, int]
) -> None:
    x = (blobs(*shape, dtype=torch.float64) * scale + offset).to(dtype)
    kmeans = KMeans(6, metric=metric, init=x[:6], max_iter=1).fit(x)
    kmeans.cluster_centers_[0] = x[0]
    kmeans.cluster_centers_[1] = torch.nextafter(x[1].to(kmeans.cluster_centers_.dtype), torch.tensor(torch.inf))
    distances = kmeans.transform(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert distances.dtype == wide
    expected = expected_distances(x, kmeans.cluster_centers_, metric)
    # The rows of unit length, from which the cosine is computed, are rounded to fp64.
    rounding = 1e-15 if metric == "cosine" else 0.0
    torch.testing.assert_close(distances.double(), expected, rtol=4 * torch.finfo(wide).eps, atol=rounding)
    assert distances[0, 0] == 0
    for rows in (x.split(64), x.numpy()):
        assert torch.equal(kmeans.transform(rows), distances)
    assert torch.equal(kmeans.fit_transform(x), kmeans.transform(x))


def test_transform_of_rows_or_centres_without_a_direction_is_1() -> None:
    x = blobs()
    kmeans = KMeans(3, metric="cosine").fit(x)
    assert kmeans.transform(torch.zeros(1, 5)).tolist() == [[1.0, 1.0, 1.0]]
    kmeans.cluster_centers_[1] = 0
    assert bool((kmeans.transform(x)[:, 1] == 1).all())


def test_transform_has_the_same_bits_for_any_number_of_threads() -> None:
    x = blobs(2000, 300)
    kmeans = KMeans(6, max_iter=1).fit(x)
    distances, threads = kmeans.transform(x), torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(kmeans.transform(x), distances)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("method", ["transform", "score"])
def test_other_rows_are_refused_and_no_rows_have_no_distances(metric: str, method: str) -> None:
    x = blobs()
    kmeans = KMeans(3, metric=metric).fit(x)
    for value in (torch.nan, torch.inf):
        x[217, 2] = value
        for rows in (x, x.split(64)):
            with pytest.raises(ValueError, match="x must be finite: got NaN or infinity in row 217"):
                getattr(kmeans, method)(rows)
    x = x.double()
    x[217, 2] = 1e200
    with pytest.raises(ValueError, match="x must be at most"):
        KMeans(3, metric="euclidean").fit(x[:200]).transform(x)
    assert kmeans.transform(x[:0]).shape == (0, 3)
    assert kmeans.score(x[:0]) == 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_score_is_minus_the_inertia(metric: str, scale: float) -> None:
    x = blobs() * scale
    kmeans = KMeans(6, metric=metric).fit(x)
    assert kmeans.score(x) == pytest.approx(-kmeans.inertia_, rel=1e-6, abs=0)
    assert kmeans.score(x.split(64)) == pytest.approx(-kmeans.inertia_, rel=1e-6, abs=0)
    nearest = kmeans.transform(x[:9]).double().amin(1)
    expected = nearest.sum() if metric == "cosine" else nearest.square().sum()
    assert kmeans.score(x[:9], y=range(9)) == pytest.approx(-float(expected), rel=1e-5, abs=0)


@pytest.mark.parametrize("form", ["tensor", "array", "DataFrame"])
def test_in_a_pipeline_and_a_search(form: str) -> None:
    pipeline, search = pytest.importorskip("sklearn.pipeline"), pytest.importorskip("sklearn.model_selection")
    preprocessing, linear = pytest.importorskip("sklearn.preprocessing"), pytest.importorskip("sklearn.linear_model")
    x = blobs().numpy()
    y = np.arange(len(x)) % 6
    rows = {"tensor": torch.from_numpy, "array": np.asarray, "DataFrame": frame}[form](x)

    steps = preprocessing.StandardScaler(), KMeans(6, seed=1)
    labels = pipeline.make_pipeline(*steps).fit(rows, y).predict(rows)
    scaled = preprocessing.StandardScaler().fit_transform(x)
    assert torch.equal(labels, KMeans(6, seed=1).fit_predict(scaled))
    classifier = pipeline.make_pipeline(*steps, linear.LogisticRegression()).fit(rows, y)
    assert classifier.score(rows, y) > 0.9  # of its distances to the centres

    grid = {"n_clusters": [2, 6], "n_init": [2]}
    found = search.GridSearchCV(KMeans(3), grid, cv=3).fit(rows)
    assert found.best_params_ == {"n_clusters": 6, "n_init": 2}
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    assert torch.equal(found.predict(rows), KMeans(6, n_init=2).fit_predict(x))


def frame(x: Any, columns: str = "abcde") -> Any:
    return pytest.importorskip("pandas").DataFrame(x, columns=list(columns))


def test_data_frames_are_taken() -> None:
    pandas = pytest.importorskip("pandas")
    x = blobs().numpy()
    for columns in ("abcde", "edcba"):
        assert torch.equal(KMeans(6).fit(frame(x, columns)).labels_, KMeans(6).fit(x).labels_)
    assert KMeans(6).fit(frame(x)).cluster_centers_.dtype == torch.float32
    assert torch.equal(KMeans(2, init=frame(x[:2])).fit(x).labels_, KMeans(2, init=x[:2]).fit(x).labels_)
    integers = (10 * x).astype(int)
    expected = KMeans(6).fit(integers.astype(float))
    mixed = frame(integers).astype({"a": "float32", "b": "Int64", "c": "int8"})
    for rows in (frame(integers), frame(integers).astype("Int64"), mixed, mixed.astype(object)):
        kmeans = KMeans(6).fit(rows)
        assert torch.equal(kmeans.cluster_centers_, expected.cluster_centers_)
        assert torch.equal(kmeans.predict(rows), expected.labels_)
    booleans = pandas.DataFrame({"a": [True, False], "b": [0.5, 1.5]})
    assert KMeans(1).fit(booleans).cluster_centers_.tolist() == [[0.5, 1.0]]


def test_entries_of_data_frames_that_are_no_numbers_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    for column in (["1", "2"], [None, "a"], [pandas.NA, 1], [1 + 2j, 0], pandas.to_datetime(["2020", "2021"])):
        rows = pandas.DataFrame({"a": column, "b": [1.0, 2.0]})
        with pytest.raises(TypeError, match=r"^x must have numeric columns without missing entries: got dtype "):
            KMeans(1).fit(rows)
    with pytest.raises(ValueError, match="x must be finite: got NaN or infinity in row 1"):
        KMeans(1).fit(pandas.DataFrame({"a": [1.0, None]}))


def test_names_of_columns_are_compared(tmp_path: Path) -> None:
    x = blobs().numpy()
    kmeans = KMeans(3).fit(frame(x))
    assert kmeans.feature_names_in_.dtype == object
    kmeans.save(tmp_path / "kmeans.safetensors")
    for one in (kmeans, KMeans.load(tmp_path / "kmeans.safetensors")):
        assert one.feature_names_in_.tolist() == list("abcde")
        assert one.n_features_in_ == 5
        for method in (one.predict, one.transform, one.score):
            method(frame(x))
            method(x)
            for rows in (frame(x, "abced"), frame(x)[list("abcd")]):
                with pytest.raises(ValueError, match=r"x must have the columns of fit in their order, \['a', 'b', 'c'"):
                    method(rows)
    assert not hasattr(kmeans.fit(x), "feature_names_in_")
    assert not hasattr(KMeans(3).fit(frame(x).rename(columns={"a": 1})), "feature_names_in_")
    kmeans.predict(frame(x, "edcba"))


def test_scikit_learn_is_needed_for_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    kmeans = KMeans(3).set_params(n_init="auto").fit(blobs())
    assert kmeans.score(blobs()) < 0
    assert kmeans.transform(blobs()).shape == (300, 3)
    assert kmeans.get_params()["n_init"] == "auto"
