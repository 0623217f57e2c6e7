"""Serializes the state of a finished stage, and loads it: in safetensors if that can hold it, else in PyTorch's format.

No objects are unpickled: PyTorch's format is read with `weights_only=True`, once before a file is written.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from mcl_kernels._validate import FLOAT_DTYPES, INTEGER_DTYPES

SAFETENSORS, PYTORCH = "state.safetensors", "state.pt"
_CONTAINERS = (dict, list, tuple)
_PLAIN_DTYPES = (*FLOAT_DTYPES, *INTEGER_DTYPES, torch.bool)


class State(NamedTuple):
    """A serialized state and the name of its file, which determines the format."""

    name: str
    content: bytes


def dump_state(state: Mapping[str, Any]) -> State:
    """Serializes a state, and checks that it can be loaded again.

    Raises:
        TypeError: the state is not a mapping, or holds something that cannot be loaded without unpickling objects.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping such as model.state_dict(): got {type(state).__name__}")
    compact = _without_unused_memory(dict(state))
    return _as_safetensors(compact) or _as_pytorch(compact)


def load_state(state: State) -> dict[str, Any]:
    """Returns the state on the CPU; builds only tensors, numbers, strings and containers."""
    if state.name == SAFETENSORS:
        from safetensors.torch import load

        return load(state.content)
    loaded: dict[str, Any] = torch.load(io.BytesIO(state.content), map_location="cpu", weights_only=True)
    return loaded


def _as_safetensors(state: dict[str, Any]) -> State | None:
    """Serializes the state in safetensors; returns None if it cannot be written or read in that format."""
    from safetensors.torch import save

    if not _fits_safetensors(state):
        return None
    try:
        content = save({name: x.detach().cpu().contiguous() for name, x in state.items()})
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        readable = json.loads(header).keys() - {"__metadata__"} == state.keys()
    except Exception:  # a name that the header cannot encode
        return None
    return State(SAFETENSORS, content) if readable else None


def _as_pytorch(state: dict[str, Any]) -> State:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        serialized = State(PYTORCH, buffer.getvalue())
        load_state(serialized)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise TypeError(
            "state must hold tensors, numbers, strings and containers of them, which load without unpickling objects: "
            f"got {sorted({type(value).__name__ for value in state.values()})}"
        ) from error
    return serialized


def _fits_safetensors(state: dict[str, Any]) -> bool:
    """Returns whether all values are tensors of plain dtypes under string keys, and no elements share memory."""
    tensors = [x for name, x in state.items() if isinstance(name, str) and isinstance(x, Tensor)]
    if len(tensors) < len(state) or any(x.layout != torch.strided or x.is_nested or x.is_meta for x in tensors):
        return False
    if any(x.dtype not in _PLAIN_DTYPES or _n_bytes(x) > x.untyped_storage().nbytes() for x in tensors):
        return False
    filled = [x for x in tensors if x.numel()]
    return len({_memory(x) for x in filled}) == len(filled)


def _without_unused_memory(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state with a copy of each tensor that uses only a part of its storage.

    Otherwise the complete storage would be saved. If another tensor of the state uses all of that storage, it is saved
    once for both, which stay shared.
    """
    tensors = list(_plain_tensors(state, set()))
    fully_used = {_memory(x) for x in tensors if _n_bytes(x) >= x.untyped_storage().nbytes()}
    if fully_used.issuperset(map(_memory, tensors)):
        return state
    copies: dict[object, Any] = {}

    def compacted(x: Any) -> Any:
        if _is_plain(x) and _memory(x) not in fully_used:
            view = (_memory(x), x.dtype, x.storage_offset(), x.shape, x.stride())
            if view not in copies:  # else a tied weight, which stays tied
                part = x.detach().to("cpu", copy=True)
                copies[view] = Parameter(part, x.requires_grad) if isinstance(x, Parameter) else part
            return copies[view]
        if not isinstance(x, _CONTAINERS) or type(x) is torch.Size:
            return x
        if id(x) not in copies:
            copied: Any = copy.copy(x)  # with its attributes, such as the _metadata of a state_dict
            copies[id(x)] = copied  # before its values, which may contain it
            if isinstance(x, dict):
                copied.update({key: compacted(value) for key, value in x.items()})
            elif isinstance(x, list):
                copied[:] = map(compacted, x)
            elif type(x) is tuple:
                copies[id(x)] = tuple(map(compacted, x))
        return copies[id(x)]

    compact: dict[str, Any] = compacted(state)
    return compact


def _plain_tensors(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yields the plain tensors in nested containers, visiting each container once."""
    if _is_plain(x):
        yield x
    elif isinstance(x, _CONTAINERS) and id(x) not in seen:
        seen.add(id(x))
        for value in x.values() if isinstance(x, dict) else x:
            yield from _plain_tensors(value, seen)


def _is_plain(x: Any) -> bool:
    """Returns whether x is a dense tensor or parameter that holds data."""
    if type(x) not in (Tensor, Parameter) or x.layout != torch.strided:
        return False
    return not (x.is_meta or x.is_quantized or x.is_nested)


def _memory(x: Tensor) -> tuple[torch.device, int]:
    """Returns the device and address of the storage of a tensor."""
    return x.device, x.untyped_storage().data_ptr()


def _n_bytes(x: Tensor) -> int:
    return x.numel() * x.itemsize
