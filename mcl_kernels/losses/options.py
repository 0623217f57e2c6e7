"""The options that the losses share, and the module that holds them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mcl_kernels._validate import check_choice, check_flag, check_objective, check_positive
from mcl_kernels.backends.table import IMPLS
from mcl_kernels.distributed.cost_model import EXCHANGES
from mcl_kernels.distributed.group import Ranks, agreement, collective_device, ranks_of
from mcl_kernels.logsumexp.api import check_scale
from mcl_kernels.logsumexp.pairs import NEGATIVES
from mcl_kernels.objectives import ObjectiveLike, info_nce, needs_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """Options of a loss. Its function documents each of them."""

    negatives: str
    normalize: bool
    reduction: str
    impl: str
    group: ProcessGroup | None
    exchange: str
    objective: ObjectiveLike = info_nce

    def check(self) -> None:
        """Raises for an option of the wrong type or value; `resolve` checks `impl`, and `ranks_of` checks `group`."""
        check_choice("negatives", self.negatives, NEGATIVES)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("exchange", self.exchange, EXCHANGES)
        check_flag("normalize", self.normalize)
        check_objective(self.objective)

    def needed_exchange(self, include: Sequence[str] = ()) -> str:
        """Exchange of a call: "gather" if an anchor needs more than its cluster, else the option itself."""
        needing_all = {
            f"include={tuple(include)!r}": len(include) > 1,
            f"negatives={self.negatives!r}": self.negatives != "same",
            "reduction='none'": self.reduction == "none",
            f"{self.objective}, which mixes anchors,": needs_of(self.objective).mixes_anchors,
        }
        reasons = [name for name, needs_all in needing_all.items() if needs_all]
        if reasons and self.exchange == "cluster":
            raise ValueError(f"exchange='cluster' keeps each cluster by itself: {reasons[0]} needs exchange='gather'")
        return "gather" if reasons else self.exchange

    def agreed_call(self, ranks: Ranks | None, loss: str, **arguments: object) -> AbstractContextManager[None]:
        """Context that raises an error in it, or one for arguments that differ, on every rank; empty without ranks."""
        if ranks is None:
            return nullcontext()
        # A rank that fails may have none of its tensors on the device of the others.
        devices = [x.device for x in arguments.values() if isinstance(x, Tensor)]
        accelerator = next((device for device in devices if device.type not in ("cpu", "meta")), None)
        shared = ("normalize", "exchange", "negatives", "objective", "reduction")
        arguments = {"loss": loss, **arguments, **{name: getattr(self, name) for name in shared}}
        return agreement(ranks, accelerator or collective_device(ranks), arguments)

    def reduce(self, loss: Tensor, ranks: Ranks | None = None, anchors: int | None = None) -> Tensor:
        """Reduced losses of the anchors.

        With `ranks` the losses are those of this rank's share of all `anchors`, scaled so that the mean over ranks (as
        DDP averages) is the reduction of the whole batch.
        """
        if self.reduction == "none":
            return loss
        if self.reduction == "mean" and ranks is None and loss.shape[0] > 0:
            return loss.mean()
        total = loss.sum() if ranks is None else loss.sum() * ranks.world_size
        n = loss.shape[0] if anchors is None else anchors
        return total / max(n, 1) if self.reduction == "mean" else total


def inverse_temperature(temperature: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Checked scale of the logits, [] or [N]."""
    if isinstance(temperature, Tensor):
        return check_scale("temperature", temperature, query, dtype).reciprocal()
    check_positive("temperature", temperature, "a number or a tensor")
    inverse = 1.0 / temperature
    if inverse > torch.finfo(dtype).max:
        raise ValueError(f"temperature is too small for logits of {dtype}: got {temperature}")
    return check_scale("temperature", inverse, query, dtype)


class LossModule(nn.Module):
    """Base of the losses as modules: the constructor checks the options, `forward` takes the tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        checked = Options(**options)
        checked.check()
        check_choice("impl", checked.impl, IMPLS["logsumexp"])
        if checked.group is not None:
            ranks_of(checked.group)
            checked.needed_exchange()
        self.options = options

    def __deepcopy__(self, memo: dict[int, Any]) -> LossModule:
        """Returns a copy, for the average of a model for example, with the same process group."""
        memo[id(self.options["group"])] = self.options["group"]
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def extra_repr(self) -> str:
        """Returns the temperature, and the options that differ from their defaults."""
        temperature: Any = getattr(self, "temperature", None)
        parts = [] if temperature is None else [f"temperature={_described_temperature(temperature)}"]
        defaults = inspect.signature(type(self)).parameters
        for name, value in self.options.items():
            if name in defaults and value == defaults[name].default:
                continue
            if name == "objective":
                value = getattr(value, "__name__", value)
            elif name == "group" and value is not None:
                value = f"{ranks_of(value).world_size} ranks"
            parts.append(f"{name}={value}")
        return ", ".join(parts)


def check_module_temperature(temperature: object) -> None:
    """Raises for a temperature that no batch accepts; the length of a vector is checked with the batch."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature, "a number or a tensor")
    elif not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature must be a float or a floating point tensor: got {temperature.dtype}")
    elif temperature.ndim > 1:
        raise ValueError(
            f"temperature must be a float, a tensor [] or [1], or a vector: got shape {list(temperature.shape)}"
        )


def _described_temperature(temperature: float | Tensor) -> str:
    if not isinstance(temperature, Tensor):
        return str(temperature)
    # A subclass may be a part of a sharded parameter, whose value other ranks would have to send.
    known = type(temperature) in (Tensor, nn.Parameter) and temperature.numel() == 1 and not temperature.is_meta
    shown = f"{float(temperature.detach()):.4g}" if known else f"tensor {list(temperature.shape)}"
    return f"{shown} (learned)" if temperature.requires_grad else shown
