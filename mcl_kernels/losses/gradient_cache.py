"""Batches larger than the encoder's memory, after GradCache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels._forked import use_one_thread_if_forked


def cached_backward(
    encode: Callable[..., Any],
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """Computes `loss` of all batches together, and its gradients, with the activations of one batch at a time.

        1. embeddings = [encode(batch) for batch in batches]      without a graph
        2. loss(embeddings).backward()                            down to the embeddings: d loss / d embeddings
        3. each batch is encoded again, with a graph, and its part of d loss / d embeddings goes through it

    Gradients are added to `.grad` as `loss(encode(everything)).backward()` adds them, for one more forward pass. The
    second encoding of a batch uses the random numbers of the first, so dropout drops the same. A fused loss has no
    N x N matrix, so only the embeddings and their gradients grow with N.

    Args:
        encode: a model, or a function that calls it. Given a tensor, a tuple (as arguments) or a dict (as keywords) it
            returns a tensor [rows, ...], or a tuple or a mapping of them. Scalars [], such as CLIP's learned logit
            scale, hold for all batches; tensors of integers, such as labels, are passed on. Autocast belongs inside.
            A layer that computes across rows (BatchNorm in training) sees one batch at a time, twice. It must not
            write into its batch.
        batches: arguments of `encode`, one after the other, of any sizes. All are held in memory: on the CPU if need
            be, since `encode` may move them.
        loss: given the concatenated outputs, as `encode` returned them (a tuple as arguments, a mapping as keywords),
            returns a scalar. With a GradScaler: `lambda z: scaler.scale(loss(z))`. A loss with `group=` is computed
            once on every rank, whatever the number of batches; an error in `encode` is not shared with the others.
        no_sync: under DDP the context manager that holds back the exchange of gradients, until the last batch. Default:
            `encode.no_sync` if it exists; a function around a model passes `no_sync=model.no_sync`.

    Returns:
        The loss, without a graph.

    Raises:
        ValueError: no batches; outputs of batches that do not fit together; a loss that is no scalar or has no graph; a
            batch that was written into.
        TypeError: an output that is neither a tensor nor a tuple or mapping of them; a loss that is no tensor.

    Source: Gao et al. 2021 (arXiv 2101.06983).

    Example:
        >>> from mcl_kernels import nt_xent
        >>> model, views = torch.nn.Linear(8, 4), torch.randn(2, 1000, 8)
        >>> def encode(a, b):
        ...     return model(a), model(b)
        >>> chunks = list(zip(views[0].split(100), views[1].split(100)))
        >>> loss = cached_backward(encode, chunks, nt_xent)
        >>> torch.testing.assert_close(loss, nt_xent(model(views[0]), model(views[1])).detach())
    """
    use_one_thread_if_forked()  # before encode computes
    for name, function in (("encode", encode), ("loss", loss), ("no_sync", no_sync)):
        if not callable(function) and (name != "no_sync" or function is not None):
            raise TypeError(f"{name} must be a function or a module: got {type(function).__name__}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable: got {type(batches).__name__}")
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch: got none")
    held_back: Any = no_sync or getattr(encode, "no_sync", contextlib.nullcontext)
    states, encoded = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(_RandomState())
            before = _versions(batch)
            first = _Outputs.of(_call(encode, batch))
            if _versions(batch) != before:
                raise ValueError("encode must leave its batch as it was, since it is given it again: it wrote into it")
            # A parameter that encode returns as it is requires a gradient even here.
            encoded.append(_Outputs(first.names, [x.detach() for x in first.tensors]))
    # Autocast caches the weights that it has cast; those cast above have no graph.
    torch.clear_autocast_cache()
    names = encoded[0].names
    if other := [outputs.names for outputs in encoded if outputs.names != names]:
        raise ValueError(f"encode must return the same outputs for every batch: got {names} and {other[0]}")
    leaves = _Outputs(names, [_leaf(parts) for parts in zip(*(outputs.tensors for outputs in encoded), strict=True)])
    sizes = [[len(x) if x.ndim else 0 for x in outputs.tensors] for outputs in encoded]
    del encoded
    with torch.enable_grad():
        value: Tensor = _call(loss, leaves.as_arguments())
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor: got {type(value).__name__}")
    if value.ndim:
        raise ValueError(f"loss must return a scalar: got shape {list(value.shape)}")
    if not value.requires_grad:
        raise ValueError("loss must depend on what encode returned: got a loss without a graph")
    value.backward()  # type: ignore[no-untyped-call]
    leaf_sizes = zip(*sizes, strict=True)
    shares = [_shares(leaf, rows) for leaf, rows in zip(leaves.tensors, leaf_sizes, strict=True)]
    for at, (batch, state, *grads) in enumerate(zip(batches, states, *shares, strict=True)):
        last = at == len(batches) - 1
        with contextlib.nullcontext() if last else held_back():
            with state.again(), torch.enable_grad():
                outputs = _Outputs.of(_call(encode, batch)).tensors
            pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad and g is not None]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    return value.detach()


class _Outputs(NamedTuple):
    """Outputs of `encode`: one tensor (names is None), a tuple (names are 0, 1, ...) or a mapping of tensors."""

    names: tuple[Any, ...] | None
    tensors: list[Tensor]

    @classmethod
    def of(cls, outputs: object) -> _Outputs:
        if isinstance(outputs, Tensor):
            return cls(None, [outputs])
        if isinstance(outputs, Mapping):
            named = dict(outputs)
        elif isinstance(outputs, (tuple, list)):
            named = dict(enumerate(outputs))
        else:
            kind = type(outputs).__name__
            raise TypeError(f"encode must return a tensor, or a tuple or a mapping of tensors: got {kind}")
        for name, x in named.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"encode must return tensors: got {type(x).__name__} for {name!r}")
        return cls(tuple(named), list(named.values()))

    def as_arguments(self) -> Any:
        if self.names is None:
            return self.tensors[0]
        if self.names == tuple(range(len(self.names))):
            return tuple(self.tensors)
        return dict(zip(self.names, self.tensors, strict=True))


class _RandomState:
    """State of the random number generators of the CPU and, once CUDA is used, of all its devices."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.devices = list(range(torch.cuda.device_count())) if used else []
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _call(function: Callable[..., Any], arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return function(**arguments)
    return function(*arguments) if isinstance(arguments, (tuple, list)) else function(arguments)


def _versions(batch: Any) -> list[int]:
    """Number of times that each tensor of a batch was written to."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    return [x._version for x in values if isinstance(x, Tensor) and not x.is_inference()]


def _leaf(parts: tuple[Tensor, ...]) -> Tensor:
    if len(shapes := {tuple(x.shape[1:]) for x in parts}) > 1:
        raise ValueError(f"encode must return rows of one shape for all batches: got {sorted(shapes)}")
    joined = torch.cat(parts) if parts[0].ndim else parts[0].clone()
    return joined.requires_grad_(joined.is_floating_point())


def _shares(leaf: Tensor, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    """Gradient of each batch's rows. That of a scalar, which all batches share, is left to the last batch."""
    if leaf.grad is None:
        return [None] * len(sizes)
    if leaf.ndim:
        return torch.split(leaf.grad, list(sizes))
    return [torch.zeros_like(leaf.grad)] * (len(sizes) - 1) + [leaf.grad]
