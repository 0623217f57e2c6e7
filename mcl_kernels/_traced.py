"""Whether a call is traced: then it is made of operators that a graph can hold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_traced(*tensors: Tensor | None) -> bool:
    """Returns whether a call is compiled or transformed, or has fake or wrapped tensors, or such without values."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or any(type(x) not in (Tensor, Parameter) or x.is_meta for x in tensors if x is not None)
    )
