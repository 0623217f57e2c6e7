"""MoCo's memory of keys, with their pseudo labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mcl_kernels._validate import (
    FLOAT_DTYPES,
    as_integer,
    as_integers,
    check_embeddings,
    check_integer_vector,
    check_same_device,
)

EMPTY = {"embeddings": 0, "labels": -1, "ids": -1, "position": 0}  # state of an empty queue


class LabelledQueue(nn.Module):
    """The last `size` keys of a momentum encoder, with their pseudo labels and the ids of their samples.

    A slot that was never filled has label -1, which matches nothing: the first loss is 0, and losses are low until the
    queue is full, where MoCo's queue begins with random keys. The queue form of a loss takes all three:

        masked_info_nce(query, queue.embeddings, labels, queue.labels, positive=key, ids=ids, key_ids=queue.ids)
        queue.enqueue(key, labels, ids)

    with `ids` so that an older key of the same sample is no negative. Batches may have any size, also one that does not
    divide `size`. Tensors that a loss has used are never written to: `enqueue` may come before `backward`. Under
    `torch.inference_mode` keys may be computed, but not enqueued.

    Keys, labels and ids are in the `state_dict`, moved by `to` and pickled, but are not among the buffers of a model
    that holds the queue: `DistributedDataParallel` replaces those by the buffers of rank 0 in each forward, and a rank
    may hold keys of its own (`group=` of a loss). So every rank loads its checkpoint itself; one that a single rank has
    written holds the keys of that rank alone. In an exported program the queue is a constant.
    `torch.optim.swa_utils.AveragedModel` leaves the queue of its copy as it was when the copy was made.

    Args:
        size: number of slots.
        dim: D, features of a key.
        dtype, device: of the keys in the queue.

    Attributes:
        embeddings: the keys, [size, D], 0 where never filled.
        labels: their pseudo labels, int64 [size], -1 where never filled.
        ids: the ids of their samples, int64 [size], -1 where never filled or not given.

    Raises:
        TypeError, ValueError: a size or dim that is no integer of at least 1; a dtype that is not floating point.

    Source: He et al. 2020 (arXiv 1911.05722), section 3.2; the labels are those of arXiv 2402.11816.

    Example:
        >>> queue = LabelledQueue(4, 2)
        >>> queue.enqueue(torch.eye(2), labels=torch.tensor([7, 8]), ids=torch.tensor([0, 1]))
        >>> queue.labels, queue.ids
        (tensor([ 7,  8, -1, -1]), tensor([ 0,  1, -1, -1]))
        >>> queue.relabel(torch.tensor([5, 6, 6]))
        >>> queue.labels
        tensor([ 5,  6, -1, -1])
    """

    embeddings: Tensor
    labels: Tensor
    ids: Tensor
    position: Tensor  # slot of the next key, int64 []

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.size, dim = as_integer("size", size, least=1), as_integer("dim", dim, least=1)
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64: got {dtype}")
        self.embeddings = torch.zeros(self.size, dim, dtype=dtype, device=device)
        self.labels = torch.full((self.size,), -1, device=device)
        self.ids = torch.full((self.size,), -1, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Replaces the oldest keys.

        Args:
            embeddings: [N, D] in any floating point dtype, cast to that of the queue; of more than `size` rows the
                last are kept. In a distributed run: this rank's own for a loss with `group=`; without it those of all
                ranks, gathered. Gathered keys and `group=` together count each key once for every rank.
            labels: pseudo labels, integers [N]; None: one cluster, the label 0 that a first stage gives every sample.
            ids: ids of the samples, integers [N], which `relabel` needs; None: unknown, -1.

        Raises:
            TypeError, ValueError: tensors whose type, shape or device does not fit; each message names the argument.
        """
        check_embeddings("embeddings", embeddings)
        if embeddings.shape[1] != self.embeddings.shape[1]:
            width = self.embeddings.shape[1]
            raise ValueError(f"embeddings must have {width} features, those of the queue: got {embeddings.shape[1]}")
        check_same_device("embeddings", embeddings, "the queue", self.embeddings)
        n = len(embeddings)
        new = (
            embeddings.to(self.embeddings.dtype),
            embeddings.new_zeros(n, dtype=torch.int64)
            if labels is None
            else as_integers("labels", labels, "embeddings", embeddings),
            embeddings.new_full((n,), -1, dtype=torch.int64)
            if ids is None
            else as_integers("ids", ids, "embeddings", embeddings),
        )
        first = max(n - self.size, 0)
        slots = (self.position + torch.arange(first, n, device=embeddings.device)) % self.size
        # New tensors: a backward may have saved the earlier ones.
        self.embeddings, self.labels, self.ids = (
            held.index_copy(0, slots, x[first:])
            for held, x in zip((self.embeddings, self.labels, self.ids), new, strict=True)
        )
        self.position = (self.position + n) % self.size

    @torch.no_grad()
    def relabel(self, labels: Tensor) -> None:
        """Replaces the labels by those of a new stage, by stored id: `relabel(stage.labels)`.

        Args:
            labels: pseudo labels of all samples, integers [number of samples], on any device. Keys of unknown id get
                -1.

        Raises:
            TypeError: labels that are not integers.
            ValueError: an id in the queue has no entry in `labels`.
        """
        # Labels of a stage may be a memory map: only entries of the queue's ids are read.
        labels = check_integer_vector("labels", labels)
        ids = self.ids.to(labels.device)
        if int(ids.max()) >= len(labels):
            raise ValueError(
                f"labels must have an entry for every id of the queue: got {len(labels)} labels for id {int(ids.max())}"
            )
        new = torch.full_like(ids, -1)
        new[ids >= 0] = labels[ids[ids >= 0]].long()
        self.labels = new.to(self.labels.device)

    # The methods below list, move, save and load the state, as `nn.Module` does its buffers.

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the state of the queue, which the buffers of a model that holds the queue do not include.

        Code that moves or loads state module by module (FSDP, `torch.distributed.checkpoint`) finds it here; code that
        lists all buffers of the model (DistributedDataParallel, which replaces them by those of rank 0) does not.
        """
        for name in EMPTY:
            yield f"{prefix}.{name}" if prefix else name, getattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LabelledQueue:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in EMPTY.items():
            held = getattr(self, name)
            moved = fn(held)
            # `to_empty` does not initialise memory, and uninitialised labels would match anything.
            setattr(self, name, moved.fill_(value) if held.is_meta and not moved.is_meta else moved)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in EMPTY:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs)
        # After the call: its hooks may rename keys, or add and remove them.
        own = {prefix + name for name in EMPTY}
        unexpected_keys.extend(key for key in found if key not in own)
        for name in EMPTY:
            held, new = getattr(self, name), state_dict.get(prefix + name)
            if new is None:
                missing_keys.extend([prefix + name] if strict else [])
            elif new.shape != held.shape:
                error_msgs.append(
                    f"{prefix}{name} must have shape {list(held.shape)}, that of the queue: got {list(new.shape)}"
                )
            elif local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, new)
            else:
                setattr(self, name, torch.empty_like(held).copy_(new))

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.embeddings.shape[1]}"
