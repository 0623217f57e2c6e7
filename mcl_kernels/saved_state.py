"""The state of a finished stage as bytes, and back: safetensors where it can hold it, else PyTorch's format.

Nothing is unpickled: PyTorch's format is read with `weights_only=True`. What is written was read once.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from mcl_kernels._validate import FLOAT_DTYPES, INTEGER_DTYPES

SAFETENSORS, PYTORCH = "state.safetensors", "state.pt"
_PLAIN_DTYPES = (*FLOAT_DTYPES, *INTEGER_DTYPES, torch.bool)


class State(NamedTuple):
    """A serialised state and the name of its file, which tells the format."""

    name: str
    content: bytes


def dump_state(state: Mapping[str, Any]) -> State:
    """Serialises a state, and reads it once, so that what is accepted can be read.

    Raises:
        TypeError: the state is no mapping, or holds what cannot be loaded without unpickling objects.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping such as model.state_dict(): got {type(state).__name__}")
    compact = _without_unused_memory(dict(state))
    return _as_safetensors(compact) or _as_pytorch(compact)


def load_state(state: State) -> dict[str, Any]:
    """The state on the CPU; nothing but tensors, numbers, strings and containers is built."""
    if state.name == SAFETENSORS:
        from safetensors.torch import load

        return load(state.content)
    loaded: dict[str, Any] = torch.load(io.BytesIO(state.content), map_location="cpu", weights_only=True)
    return loaded


def _as_safetensors(state: dict[str, Any]) -> State | None:
    """The state in safetensors, unless it holds something that cannot be written or read in that format."""
    from safetensors.torch import save

    if not _fits_safetensors(state):
        return None
    try:
        content = save({name: x.detach().cpu().contiguous() for name, x in state.items()})
        serialised = State(SAFETENSORS, content)
        return serialised if load_state(serialised).keys() == state.keys() else None
    except Exception:  # a name that its header reserves or cannot encode
        return None


def _as_pytorch(state: dict[str, Any]) -> State:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        serialised = State(PYTORCH, buffer.getvalue())
        load_state(serialised)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise TypeError(
            "state must hold tensors, numbers, strings and containers of them, which load without unpickling objects: "
            f"got {sorted({type(value).__name__ for value in state.values()})}"
        ) from error
    return serialised


def _fits_safetensors(state: dict[str, Any]) -> bool:
    """Returns whether all are tensors of plain dtypes under string keys, no two elements of which share memory."""
    tensors = [x for name, x in state.items() if isinstance(name, str) and isinstance(x, Tensor)]
    if len(tensors) < len(state) or any(x.layout != torch.strided or x.is_nested or x.is_meta for x in tensors):
        return False
    if any(x.dtype not in _PLAIN_DTYPES or _size(x) > x.untyped_storage().nbytes() for x in tensors):
        return False
    filled = [x for x in tensors if x.numel()]
    return len({_memory(x) for x in filled}) == len(filled)


def _without_unused_memory(state: dict[str, Any]) -> dict[str, Any]:
    """The state with copies of those tensors that use a part of their memory: all of that memory would be saved.

    Memory that another tensor of the state uses from end to end is saved once for both, and stays shared.
    """
    covered = {_memory(x) for x in tree_leaves(state) if _is_plain(x) and _size(x) >= x.untyped_storage().nbytes()}
    copies: dict[object, Tensor] = {}

    def compacted(x: Any) -> Any:
        if not _is_plain(x) or _memory(x) in covered:
            return x
        view = (_memory(x), x.dtype, x.storage_offset(), x.shape, x.stride())
        if view not in copies:  # else a tied weight, which stays tied
            copies[view] = x.detach().clone()
        return copies[view]

    return {name: tree_map(compacted, value) for name, value in state.items()}


def _is_plain(x: Any) -> bool:
    if type(x) not in (Tensor, Parameter) or x.layout != torch.strided:
        return False
    return not (x.is_meta or x.is_quantized or x.is_nested)


def _memory(x: Tensor) -> tuple[torch.device, int]:
    return x.device, x.untyped_storage().data_ptr()


def _size(x: Tensor) -> int:
    return x.numel() * x.itemsize
