"""Every error names the argument, what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mcl_kernels import (
    ClipLoss,
    ClusterBatchSampler,
    ConcatEncoder,
    KMeans,
    MaskedInfoNCE,
    NTXentLoss,
    SupConLoss,
    assign_clusters,
    cached_backward,
    clip_loss,
    compose_labels,
    count_negatives,
    masked_info_nce,
    masked_logsumexp,
    model_soup,
    nt_xent,
    objectives,
    positive_ranks,
    supcon_loss,
)

X, Y = torch.randn(256, 8), torch.randn(256, 8)
LABELS = torch.zeros(256, dtype=torch.long)
META = torch.empty(256, 8, device="meta")


class DataFrame:
    """Like pandas: iterated over its columns."""

    def __init__(self, values: list) -> None:
        self.values = values

    def to_numpy(self) -> np.ndarray:
        return np.array(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter("ab")


class SparseMatrix:
    """Like scipy: iterated over sparse rows."""

    def toarray(self) -> np.ndarray:
        return X.numpy()

    def __iter__(self) -> Iterator[SparseMatrix]:
        return iter([self])


class ForeignArray:
    """Like an array of JAX."""

    def __array__(self) -> np.ndarray:
        return X.numpy()


# Functions of rows, by the name of the argument that takes them.
ON_ROWS: dict[str, Callable[[torch.Tensor], object]] = {
    "query": masked_logsumexp,
    "key": lambda x: masked_info_nce(X, x),
    "view_a": lambda x: nt_xent(x, Y),
    "text_features": lambda x: clip_loss(X, x, logit_scale=1.0),
    "positive": lambda x: positive_ranks(X, Y, positive=x),
    "x": KMeans(2).fit,
    "centers": lambda x: assign_clusters(X, x),
}

CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    # lengths
    (lambda: nt_xent(X, Y, LABELS[:255]), ValueError, "labels must have one entry per row of view_a: got 255 labels for 256 rows"),
    (lambda: masked_info_nce(X, Y, LABELS, LABELS[:255]), ValueError, "got 255 key_labels for 256 rows"),
    (lambda: clip_loss(X, Y, LABELS, text_labels=LABELS[:9], logit_scale=1.0), ValueError, "text_labels must have one entry per row of text_features: got 9 text_labels for 256"),
    (lambda: nt_xent(X, Y, ids=LABELS[:7]), ValueError, "got 7 ids for 256 rows"),
    (lambda: masked_logsumexp(X, labels=LABELS[:, None]), ValueError, "labels must be a vector: got shape [256, 1]"),
    # dtypes and types
    (lambda: nt_xent(X, Y, LABELS.float()), TypeError, "labels must be an integer tensor: got torch.float32"),
    (lambda: nt_xent(X, Y, LABELS.bool()), TypeError, "labels must be an integer tensor: got torch.bool"),
    (lambda: nt_xent(X, Y, LABELS.tolist()), TypeError, "labels must be an integer tensor: got list"),
    (lambda: count_negatives([0, 1]), TypeError, "labels must be an integer tensor: got list"),
    (lambda: nt_xent(X.long(), Y), TypeError, "view_a must be float16, bfloat16, float32 or float64: got torch.int64"),
    (lambda: nt_xent(X.tolist(), Y), TypeError, "view_a must be a tensor: got list"),
    (lambda: masked_info_nce(X, Y, temperature=LABELS[0]), TypeError, "temperature must be a float or a floating point"),
    # shapes
    (lambda: nt_xent(X, Y[:5]), ValueError, "view_b must have the shape of view_a: got [5, 8] for [256, 8]"),
    (lambda: clip_loss(X, Y[:5], logit_scale=1.0), ValueError, "text_features must have the shape of image_features"),
    (lambda: masked_info_nce(X, Y[:, :7]), ValueError, "key must have as many features as query: got 7 for 8"),
    (lambda: masked_info_nce(X, Y, positive=Y[:5]), ValueError, "positive must have the shape of query: got [5, 8]"),
    (lambda: masked_info_nce(X, Y[:255]), ValueError, "positive=None: got 255 keys for 256 queries"),
    (lambda: positive_ranks(X, Y[:255]), ValueError, "positive=None: got 255 keys for 256 queries"),
    (lambda: masked_logsumexp(X[0]), ValueError, "query must have shape [rows, features]: got [8]"),
    (lambda: nt_xent(X[:, :0], Y[:, :0]), ValueError, "view_a must have at least one feature: got shape ["),
    (lambda: masked_logsumexp(X, scale=torch.ones(3)), ValueError, "scale must be a float, a tensor [] or [1], or a vector [256]"),
    (lambda: nt_xent(X, Y, temperature=torch.ones(256)), ValueError, "temperature must be a float, a tensor [] or [1], or a vector [512]"),
    (lambda: clip_loss(X, Y, logit_scale=torch.ones(256)), ValueError, "logit_scale must be one number: got shape [256]"),
    # devices
    (lambda: nt_xent(X, META), ValueError, "view_b must be on the device of view_a: got meta for cpu"),
    (lambda: masked_logsumexp(META, labels=LABELS), ValueError, "labels must be on the device of query: got cpu for meta"),
    # one side without the other
    (lambda: masked_logsumexp(X, Y, LABELS), ValueError, "labels needs key_labels too"),
    (lambda: masked_logsumexp(X, Y, key_ids=LABELS), ValueError, "key_ids needs ids too"),
    (lambda: masked_info_nce(X, Y, LABELS, positive=Y), ValueError, "labels needs key_labels too"),
    (lambda: masked_info_nce(X, torch.cat((Y, Y)), LABELS), ValueError, "labels needs key_labels too"),
    (lambda: masked_info_nce(X, torch.cat((Y, Y)), ids=LABELS), ValueError, "ids needs key_ids too"),
    (lambda: masked_logsumexp(X, key_labels=LABELS), ValueError, "key_labels and key_ids need a key: got key=None"),
    (lambda: count_negatives(LABELS, key_ids=LABELS), ValueError, "key_ids needs key_labels: got key_labels=None"),
    # options
    (lambda: nt_xent(X, Y, negatives="different"), ValueError, "negatives='different' needs labels: got labels=None"),
    (lambda: nt_xent(X, Y, negatives="none"), ValueError, "negatives must be one of 'same', 'different', 'all': got 'none'"),
    (lambda: nt_xent(X, Y, reduction="avg"), ValueError, "reduction must be one of 'mean', 'sum', 'none': got 'avg'"),
    (lambda: nt_xent(X, Y, impl="cuda12"), ValueError, "impl must be one of 'auto'"),
    (lambda: nt_xent(X, Y, temperature=0.0), ValueError, "temperature must be positive: got 0.0"),
    (lambda: nt_xent(X, Y, temperature=-1), ValueError, "temperature must be positive: got -1"),
    (lambda: nt_xent(X, Y, temperature=float("nan")), ValueError, "temperature must be positive: got nan"),
    (lambda: masked_logsumexp(X, bidirectional=True), ValueError, "bidirectional=True needs a key"),
    (lambda: masked_logsumexp(X, Y, scale=torch.ones(256), bidirectional=True), ValueError, "scale must be one number"),
    (lambda: nt_xent(X, Y, temperature=None), TypeError, "temperature must be a number or a tensor: got NoneType"),
    (lambda: clip_loss(X, Y, logit_scale="3"), TypeError, "logit_scale must be a number or a tensor: got str"),
    (lambda: clip_loss(X, Y, logit_scale=-5.0), ValueError, "logit_scale must be positive: got -5.0"),
    (lambda: masked_logsumexp(X, scale=None), TypeError, "scale must be a number or a tensor: got NoneType"),
    (lambda: nt_xent(X, Y, objective="info_nce"), TypeError, "objective must be a function of mcl_kernels.objectives"),
    (lambda: nt_xent(X, Y, objective=objectives.debiased), TypeError, "settings given: hard_negative(), not hard_negative"),
    (lambda: objectives.hard_negative(-2.0), ValueError, "beta must be at least 0: got -2.0"),
    (lambda: objectives.ifm(alpha=-1.0), ValueError, "alpha must be at least 0: got -1.0"),
    (lambda: objectives.decoupled_weighted(0.0), ValueError, "sigma must be positive: got 0.0"),
    (lambda: objectives.decoupled_weighted(X[0, 0]), TypeError, "sigma must be a number: got Tensor"),
    (lambda: nt_xent(X, Y, negatives=LABELS), TypeError, "negatives must be one of 'same', 'different', 'all': got Tensor"),
    (lambda: nt_xent(X, Y, reduction=None), TypeError, "reduction must be one of 'mean', 'sum', 'none': got NoneType"),
    # modules, when they are made
    (lambda: NTXentLoss(0.1, reduction="avg"), ValueError, "reduction must be one of 'mean', 'sum', 'none': got 'avg'"),
    (lambda: NTXentLoss(0.0), ValueError, "temperature must be positive: got 0.0"),
    (lambda: MaskedInfoNCE("0.1"), TypeError, "temperature must be a number or a tensor: got str"),
    (lambda: MaskedInfoNCE(LABELS[0]), TypeError, "temperature must be a float or a floating point tensor: got torch.int64"),
    (lambda: MaskedInfoNCE(X), ValueError, "temperature must be a float, a tensor [] or [1], or a vector: got shape [256, 8]"),
    (lambda: MaskedInfoNCE(negatives="other"), ValueError, "negatives must be one of 'same', 'different', 'all': got 'other'"),
    (lambda: ClipLoss(impl="gpu"), ValueError, "impl must be one of 'auto'"),
    (lambda: ClipLoss(exchange="ring"), ValueError, "exchange must be one of 'auto', 'cluster', 'gather': got 'ring'"),
    (lambda: ClipLoss(objective=objectives.ifm), TypeError, "settings given: hard_negative(), not hard_negative"),
    (lambda: ClipLoss(group=[0, 1]), RuntimeError, "group needs torch.distributed"),
    # k-means and labels
    (lambda: KMeans(2.5), TypeError, "n_clusters must be an integer: got float"),
    (lambda: KMeans(2, seed=-1), ValueError, "seed must be at least 0: got -1"),
    (lambda: KMeans(2, init=X[:2] * torch.nan), ValueError, "init must be finite: got NaN or infinity in row 0"),
    (lambda: KMeans(2).predict(X), RuntimeError, "this KMeans has no clusters yet: call fit(x) first"),
    (lambda: count_negatives(torch.tensor(3)), ValueError, "labels must be a vector: got shape []"),
    (lambda: compose_labels(torch.tensor(3), LABELS), ValueError, "previous must be a vector: got shape []"),
    (lambda: KMeans(257).fit(X), ValueError, "n_clusters must be at most the number of rows: got 257 for 256 rows"),
    (lambda: KMeans(0), ValueError, "n_clusters must be at least 1: got 0"),
    (lambda: KMeans(2, init="kmeans"), ValueError, "init must be one of 'k-means++', 'random': got 'kmeans'"),
    (lambda: KMeans(2, init=X), ValueError, "init must have a row per cluster, and n_init be 1: got 256 rows for 2"),
    (lambda: KMeans(2, empty="drop"), ValueError, "empty must be one of 'split': got 'drop'"),
    (lambda: KMeans(2).fit(X[0]), ValueError, "x must have shape [rows, features]: got [8]"),
    (lambda: KMeans(2).fit(X.long()), TypeError, "x must be float16, bfloat16, float32 or float64: got torch.int64"),
    (lambda: KMeans(2).fit(torch.where(torch.arange(256)[:, None] == 9, torch.inf, X)), ValueError, "infinity in row 9"),
    (lambda: KMeans(2, init=Y[:2, :3]).fit(X), ValueError, "init must have as many features as x: got 3 for 8"),
    (lambda: assign_clusters(X, Y[:0]), ValueError, "centers must have at least one row: got 0"),
    (lambda: assign_clusters(X, Y[:, :3]), ValueError, "centers must have as many features as x: got 3 for 8"),
    (lambda: compose_labels(LABELS, LABELS[:3]), ValueError, "got 3 new for 256 rows"),
    (lambda: compose_labels(LABELS, LABELS.float()), TypeError, "new must be an integer tensor: got torch.float32"),
    (lambda: KMeans(2).fit(X, sample_weight=torch.ones(255)), ValueError, "sample_weight must have a weight per row of x: got 255 for 256 rows"),
    (lambda: KMeans(2).fit(X.split(9), sample_weight=torch.ones(257)), ValueError, "sample_weight must have a weight per row of x: got 257 for 256 rows"),
    (lambda: KMeans(2).fit(X, sample_weight=torch.ones(256, 1)), ValueError, "sample_weight must have shape [rows]: got [256, 1]"),
    (lambda: KMeans(2).fit(X, sample_weight=1.0), ValueError, "sample_weight must have shape [rows]: got []"),
    (lambda: KMeans(2).fit(X, sample_weight=-X[:, 0].abs()), ValueError, "sample_weight must be finite and at least 0: got -"),
    (lambda: KMeans(2).fit(X, sample_weight=[1.0] * 9 + [float("nan")] * 247), ValueError, "sample_weight must be finite and at least 0: got nan in row 9"),
    (lambda: KMeans(2).fit(X, sample_weight=np.full(256, np.inf)), ValueError, "sample_weight must be finite and at least 0: got inf in row 0"),
    (lambda: KMeans(2).fit(X, sample_weight=torch.zeros(256)), ValueError, "sample_weight must be positive for a row: got zero for all 256 rows"),
    (lambda: KMeans(2).fit(X, sample_weight=torch.arange(256) > 9), TypeError, "sample_weight must be numbers: got torch.bool"),
    (lambda: KMeans(2).fit(X, sample_weight=[True] * 256), TypeError, "sample_weight must be numbers: got bool"),
    (lambda: KMeans(2).fit(X, sample_weight=["a"] * 256), TypeError, "sample_weight must be numbers: got <U1"),
    (lambda: KMeans(2).fit(X, sample_weight=[[1.0], [2.0, 3.0]]), TypeError, "sample_weight must be numbers: got list"),
    (lambda: KMeans(2).fit(X, sample_weight=torch.ones(256).to_sparse()), TypeError, "sample_weight must be a dense tensor: got layout torch.sparse_coo"),
    (lambda: KMeans(2).fit(X, sample_weight=torch.ones(256, device="meta")), ValueError, "sample_weight must hold values: got a tensor on the device meta"),
    (lambda: KMeans(5).fit(X, sample_weight=torch.arange(256) // 252), ValueError, "n_clusters must be at most the number of rows of positive weight: got 5 for 4 of 256 rows"),
    (lambda: KMeans(2).fit(X).score(X, sample_weight=torch.ones(3)), ValueError, "sample_weight must have a weight per row of x: got 3 for 256 rows"),
    # other kinds of rows
    (lambda: KMeans(2).fit(DataFrame([["a"]])), TypeError, "x must have numeric columns without missing entries: got dtype <U1"),
    (lambda: KMeans(2, init=DataFrame([[None]])), TypeError, "init must have numeric columns without missing entries: got dtype object"),
    (lambda: KMeans(2).fit(DataFrame([1.0])), ValueError, "x must have shape [rows, features]: got [1]"),
    (lambda: KMeans(2, n_init="5"), ValueError, "n_init must be an integer or 'auto': got '5'"),
    (lambda: KMeans(2).set_params(k=3), ValueError, "set_params takes n_clusters, metric, init, n_init, max_iter, tol, batch_size, empty, seed, bounds, impl, group: got k"),
    (lambda: KMeans(2).transform(X), RuntimeError, "this KMeans has no clusters yet: call fit(x) first"),
    (lambda: KMeans(2).score(X), RuntimeError, "this KMeans has no clusters yet: call fit(x) first"),
    (lambda: KMeans(2).fit(X).transform(Y[:, :3]), ValueError, "centers must have as many features as x: got 8 for 3"),
    (lambda: KMeans(2).fit(SparseMatrix()), TypeError, "got SparseMatrix; use x.toarray()"),
    (lambda: assign_clusters(ForeignArray(), Y), TypeError, "got ForeignArray; use numpy.asarray(x)"),
    (lambda: KMeans(2).fit({"a": X}), TypeError, "x must be a tensor, an array or an iterable of chunks of rows: got dict"),
    (lambda: KMeans(2).fit("x.npy"), TypeError, "x must be a tensor, an array or an iterable of chunks of rows: got str"),
    (lambda: KMeans(2).fit(X.tolist()), TypeError, "chunk 0 of x must be a tensor or an array of rows: got list; for rows of numbers use torch.tensor(x)"),
    (lambda: KMeans(2).fit([1.0, 2.0]), TypeError, "got float; for rows of numbers use torch.tensor(x)"),
    (lambda: KMeans(2).fit(DataLoader(TensorDataset(X, LABELS), 64)), TypeError, "chunk 0 of x must be a tensor or an array of rows: got a list of 2; give x alone"),
    (lambda: KMeans(2).fit([{"image": X}]), TypeError, "got dict with the keys ['image']; give the rows alone"),
    (lambda: KMeans(2).fit(["a", "b"]), TypeError, "chunk 0 of x must be a tensor or an array of rows: got str"),
    (lambda: KMeans(2).fit(np.array([["a"]])), TypeError, "x must hold integers or floating point numbers: got dtype <U1"),
    (lambda: KMeans(2).fit([np.array([[None]])]), TypeError, "chunk 0 of x must hold integers or floating point numbers: got dtype object"),
    (lambda: KMeans(2).fit(META), ValueError, "x must hold values: got a tensor on the device meta"),
    (lambda: KMeans(2, tol="1"), TypeError, "tol must be a number: got str"),
    # tensors that are not dense
    *[(lambda f=f, x=x: f(x), TypeError, f"{name} must be a dense tensor: got layout {x.layout}; use {name}.to_dense()")
      for name, f in ON_ROWS.items() for x in (X.to_sparse(), X.to_sparse_csr())],
    *[(lambda f=f: f(torch.nested.nested_tensor([X, Y])), TypeError, f"{name} must be a dense tensor: got a nested one")
      for name, f in ON_ROWS.items()],
    (lambda: nt_xent(X, Y, LABELS.to_sparse()), TypeError, "labels must be a dense tensor: got layout torch.sparse_coo"),
    (lambda: compose_labels(LABELS.to_sparse(), LABELS), TypeError, "previous must be a dense tensor"),
    (lambda: ClusterBatchSampler(LABELS.to_sparse(), 4), TypeError, "labels must be a dense tensor"),
    # the argument that was given, where it serves both sides
    (lambda: clip_loss(X, Y, text_labels=LABELS.float(), logit_scale=1.0), TypeError, "text_labels must be an integer tensor: got torch.float32"),
    (lambda: masked_info_nce(X, Y, key_labels=[0]), TypeError, "key_labels must be an integer tensor: got list"),
    (lambda: masked_info_nce(X, Y, key_ids=LABELS[:9]), ValueError, "key_ids must have one entry per row of query: got 9 key_ids for 256 rows"),
    # flags, numbers, functions and containers
    (lambda: nt_xent(X, Y, normalize="False"), TypeError, "normalize must be True or False: got str"),
    (lambda: NTXentLoss(normalize=None), TypeError, "normalize must be True or False: got NoneType"),
    (lambda: positive_ranks(X, Y, normalize=X), TypeError, "normalize must be True or False: got Tensor"),
    (lambda: masked_logsumexp(X, Y, bidirectional=LABELS.numpy()), TypeError, "bidirectional must be True or False: got ndarray"),
    (lambda: masked_logsumexp(X, scale=1e300), ValueError, "scale must be in the range of torch.float32: got 1e+300"),
    (lambda: nt_xent(X, Y, temperature=1e-300), ValueError, "temperature is too small for logits of torch.float32: got 1e-300"),
    (lambda: objectives.hard_negative(None), TypeError, "beta must be a number: got NoneType"),
    (lambda: objectives.ifm("0.1"), TypeError, "eps must be a number: got str"),
    (lambda: objectives.debiased(X), TypeError, "tau_plus must be a number: got Tensor"),
    (lambda: model_soup({"w": X}), TypeError, "state_dicts must be a list of state dicts: got dict"),
    (lambda: model_soup([{"w": X}, X]), TypeError, "state_dicts must hold mappings such as model.state_dict(): got Tensor at 1"),
    (lambda: model_soup([{"w": X}, {"w": 1.0}]), TypeError, "state_dicts must hold tensors: got float for 'w' in 1"),
    (lambda: ConcatEncoder("resnet"), TypeError, "encoders must hold modules: got str"),
    (lambda: ConcatEncoder(torch.nn.Linear(2, 2)), TypeError, "encoders must be a list of modules: got Linear"),
    (lambda: cached_backward(None, [X], nt_xent), TypeError, "encode must be a function or a module: got NoneType"),
    (lambda: cached_backward(abs, [X], X), TypeError, "loss must be a function or a module: got Tensor"),
    (lambda: cached_backward(abs, 3, nt_xent), TypeError, "batches must be an iterable: got int"),
    # private rows and blocks
    (lambda: masked_info_nce(X, Y, hard_negatives=Y), ValueError, "hard_negatives must have shape [queries, negatives, features]: got [256, 8]"),
    (lambda: masked_info_nce(X, Y, hard_negatives=[Y]), TypeError, "hard_negatives must be a tensor: got list"),
    (lambda: masked_info_nce(X, Y, hard_negatives=Y[:9, None]), ValueError, "hard_negatives must have one list per query: got 9 lists for 256 queries"),
    (lambda: masked_info_nce(X, Y, hard_negatives=Y[:, None, :3]), ValueError, "hard_negatives must have as many features as query: got 3 for 8"),
    (lambda: masked_info_nce(X, Y, hard_negatives=META[:, None]), ValueError, "hard_negatives must be on the device of query: got meta for cpu"),
    (lambda: masked_info_nce(X, Y, hard_mask=LABELS.bool()), ValueError, "hard_mask needs hard_negatives: got hard_negatives=None"),
    (lambda: masked_info_nce(X, Y, hard_negatives=Y[:, None], hard_mask=LABELS[:, None]), TypeError, "hard_mask must be a tensor of bool: got torch.int64"),
    (lambda: masked_info_nce(X, Y, hard_negatives=Y[:, None], hard_mask=True), TypeError, "hard_mask must be a tensor of bool: got bool"),
    (lambda: masked_info_nce(X, Y, hard_negatives=Y[:, None], hard_mask=LABELS.bool()), ValueError, "hard_mask must have shape [256, 1], as hard_negatives: got [256]"),
    (lambda: masked_info_nce(X, Y, include="qk"), TypeError, "include must be a tuple of 'qk', 'qq', 'kq', 'kk': got str"),
    (lambda: masked_info_nce(X, Y, include=("qk", "qd")), ValueError, "include must be a tuple of 'qk', 'qq', 'kq', 'kk', each once: got ('qk', 'qd')"),
    (lambda: MaskedInfoNCE(include=("qk", "qk")), ValueError, "each once: got ('qk', 'qk')"),
    (lambda: masked_info_nce(X, Y, include=("qq",)), ValueError, "include must hold 'qk', queries against keys: got ('qq',)"),
    (lambda: masked_info_nce(X, Y, positive=Y, include=("qk", "kk")), ValueError, "include must not hold 'kq' or 'kk' with positive, which is not among the keys: got ('qk', 'kk')"),
    # several positives
    (lambda: supcon_loss(X), ValueError, "features [samples, features] need targets, or give views [samples, views, features]"),
    (lambda: supcon_loss(X[0], LABELS), ValueError, "features must have shape [samples, features] or [samples, views, features]: got [8]"),
    (lambda: supcon_loss(X.tolist(), LABELS), TypeError, "features must be a tensor: got list"),
    (lambda: supcon_loss(X[:, None, :0]), ValueError, "features must have at least one feature: got shape [256, 1, 0]"),
    (lambda: supcon_loss(X[:, :0], LABELS), ValueError, "features must have at least one feature: got shape [256, 0]"),
    (lambda: supcon_loss(X.long(), LABELS), TypeError, "features must be float16, bfloat16, float32 or float64: got torch.int64"),
    (lambda: supcon_loss(X, LABELS.float()), TypeError, "targets must be an integer tensor: got torch.float32"),
    (lambda: supcon_loss(X, LABELS[:9]), ValueError, "targets must have one entry per row of features: got 9 targets for 256 rows"),
    (lambda: supcon_loss(X, LABELS, LABELS[:9]), ValueError, "labels must have one entry per row of features: got 9 labels for 256 rows"),
    (lambda: supcon_loss(X, LABELS, ids=LABELS.bool()), TypeError, "ids must be an integer tensor: got torch.bool"),
    (lambda: supcon_loss(X, LABELS, negatives="different"), ValueError, "negatives='different' needs labels: got labels=None"),
    (lambda: supcon_loss(X, LABELS, positives="max"), ValueError, "positives must be one of 'mean', 'sum': got 'max'"),
    (lambda: SupConLoss(positives=None), TypeError, "positives must be one of 'mean', 'sum': got NoneType"),
    (lambda: supcon_loss(X, LABELS, temperature=torch.ones(256)), ValueError, "temperature must be one number: got shape [256]"),
    (lambda: supcon_loss(X, LABELS, temperature=0), ValueError, "temperature must be positive: got 0"),
    (lambda: SupConLoss(temperature=torch.ones(256)), ValueError, "temperature must be one number: got shape [256]"),
    (lambda: ClusterBatchSampler(LABELS, 4).load_state_dict(None), TypeError, "state must be what state_dict() returned: got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message for _, _, message in CASES])
def test_error(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_bad_tensor_temperature_gives_nan_not_an_error() -> None:
    """Checking its value would break the graph and synchronise."""
    assert nt_xent(X, Y, temperature=torch.tensor(float("nan"))).isnan()
