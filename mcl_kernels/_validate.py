"""Checks of arguments: each error names the argument, what came and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._forked import use_one_thread_if_forked

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if isinstance(value, str) and value in choices:
        return
    expected = f"{name} must be one of " + ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):  # an array, for example, which cannot be compared
        raise TypeError(f"{expected}: got {type(value).__name__}")
    raise ValueError(f"{expected}: got {value!r}")


def check_objective(objective: object) -> None:
    if not callable(objective) or isinstance(objective, type):
        expected = (
            "a function of mcl_kernels.objectives or your own, settings given: hard_negative(), not hard_negative"
        )
        raise TypeError(f"objective must be {expected}: got {objective!r}")


def as_integer(name: str, value: object, *, least: int) -> int:
    """An integer of any kind (numpy's too), as Python's."""
    use_one_thread_if_forked()  # here and below: a check comes before any computation
    try:
        integer = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer: got {type(value).__name__}") from None
    if integer < least:
        raise ValueError(f"{name} must be at least {least}: got {integer}")
    if integer >= 2**63:
        raise ValueError(f"{name} must be less than 2**63: got {integer}")
    return integer


def as_number(name: str, value: object, expected: str = "a number") -> float:
    """A real number of any kind, as Python's."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}: got {type(value).__name__}")
    return float(value)


def check_positive(name: str, value: object, expected: str = "a number") -> None:
    """Raises unless value is a number > 0. Not for tensors: reading one would synchronise and break a graph."""
    if not as_number(name, value, expected) > 0:
        raise ValueError(f"{name} must be positive: got {value}")


def check_at_least_0(name: str, value: object) -> None:
    """Raises unless value, a number or a tensor of one element, is >= 0."""
    if not (isinstance(value, Tensor) and value.numel() == 1):
        as_number(name, value)
    if not value >= 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least 0: got {value}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, np.bool_)):  # the truth of an array or of the text "False" is ambiguous
        raise TypeError(f"{name} must be True or False: got {type(value).__name__}")


def check_dense(name: str, x: Tensor) -> None:
    """Raises for a sparse or nested tensor."""
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor: got a nested one; use {name}.to_padded_tensor(0.0)")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor: got layout {x.layout}; use {name}.to_dense()")


def check_embeddings(name: str, x: object, *shapes: str) -> None:
    """Raises unless x is a floating point tensor of one of the shapes, by default [rows, features], features > 0."""
    shapes = shapes or ("[rows, features]",)
    use_one_thread_if_forked()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor: got {type(x).__name__}")
    check_dense(name, x)
    if x.ndim not in [shape.count(",") + 1 for shape in shapes]:
        raise ValueError(f"{name} must have shape {' or '.join(shapes)}: got {list(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature: got shape {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64: got {x.dtype}")


def check_same_width(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless two sets of embeddings can be multiplied with each other."""
    if x.shape[1] != other.shape[1]:
        raise ValueError(f"{name} must have as many features as {other_name}: got {x.shape[1]} for {other.shape[1]}")
    check_same_device(name, x, other_name, other)


def check_same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless two sets of embeddings can be paired row by row."""
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}: got {list(x.shape)} for {list(other.shape)}")
    check_same_device(name, x, other_name, other)


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}: got {x.device} for {other.device}")


def check_integer_vector(name: str, values: object) -> Tensor:
    """Labels or ids, checked and returned as they are: the values, which may be a memory map, are not read."""
    use_one_thread_if_forked()
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be an integer tensor: got {type(values).__name__}")
    if values.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be an integer tensor: got {values.dtype}")
    check_dense(name, values)
    if values.ndim != 1:
        raise ValueError(f"{name} must be a vector: got shape {list(values.shape)}")
    return values


def as_integer_vector(name: str, values: object) -> Tensor:
    """Labels or ids as int64, checked."""
    return check_integer_vector(name, values).long()


def as_integers(name: str, values: object, owner_name: str, owner: Tensor) -> Tensor:
    """Labels or ids as int64, checked to be one per row of `owner`."""
    values = as_integer_vector(name, values)
    if values.shape[0] != owner.shape[0]:
        raise ValueError(
            f"{name} must have one entry per row of {owner_name}: "
            f"got {values.shape[0]} {name} for {owner.shape[0]} rows"
        )
    check_same_device(name, values, owner_name, owner)
    return values
