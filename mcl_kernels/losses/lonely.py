"""Warns where losses are near 0 because hardly any anchor has a negative, which looks like success.

The warning comes with the 55th loss in a row at the earliest, since a queue is empty at first. Every eleventh loss is
checked, without waiting for a GPU: its result is read eleven losses later, or once it has arrived. Compiled losses are
not checked.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mcl_kernels.logsumexp.pairs import Pairs

LOOK_EVERY, LOOKS = 11, 4  # 11 is prime: in a loop of several losses each is checked
MIN_ANCHORS = 32
SHARE = 0.9


@dataclass
class _Watch:
    calls: int = 0
    looks: int = 0  # checks in a row that found more than SHARE
    share: Tensor | None = None  # result of the last check, in CPU memory; NaN until a GPU has written it
    warned: bool = False


_watch = _Watch()


def watch(lse: Tensor, pairs: Pairs, *, is_queue: bool = False) -> None:
    """Records the log-sum-exp of each anchor's negatives, [N]; `is_queue`: the keys come from other batches."""
    labels = pairs.labels
    if labels is None or torch.compiler.is_compiling() or _watch.warned or lse.shape[0] < MIN_ANCHORS:
        return
    _watch.calls += 1
    if _watch.calls % LOOK_EVERY or not _holds_numbers(lse):
        return
    if _watch.share is not None:
        share = float(_watch.share)
        if share != share:
            return
        _watch.looks = _watch.looks + 1 if share > SHARE else 0
        if _watch.looks == LOOKS:
            _watch.warned = True
            warnings.warn(
                f"more than {SHARE:.0%} of the anchors had no negative, and so a loss of 0, in each of {LOOKS} losses "
                f"checked, every {LOOK_EVERY}th with labels: {_advice(pairs.negatives, is_queue)}",
                stacklevel=4,
            )
    labelled = labels >= 0  # a negative label has no negatives on purpose
    lonely = (lse.detach() == -torch.inf) & labelled
    _watch.share = _sent_to_cpu(lonely.sum() / labelled.sum().clamp(min=1))


def _advice(negatives: str, is_queue: bool) -> str:
    """Text of the likely cause and what to do about it."""
    if negatives == "different":
        return "the labels of a batch are all alike, or nearly; negatives='different' compares other labels only"
    if is_queue:
        return (
            "hardly any key has a label of the batch: relabel() needs the ids given to enqueue(), and labels must be "
            "of one stage on both sides; or use fewer clusters or stages"
        )
    return (
        "fill a batch with fewer clusters of more samples each (ClusterBatchSampler), make it larger, or use fewer "
        "clusters or stages"
    )


def _sent_to_cpu(share: Tensor) -> Tensor:
    """Copy in CPU memory that a GPU writes asynchronously; NaN until then."""
    return torch.full((), torch.nan, device="cpu", pin_memory=share.is_cuda).copy_(share, non_blocking=True)


def _holds_numbers(x: Tensor) -> bool:
    """Returns whether x can be read: it is not traced, transformed or fake, and no CUDA graph is captured."""
    return (
        type(x) is Tensor
        and x.device.type in ("cpu", "cuda")
        and _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
