"""The losses as modules: options are given and checked once, tensors are given to `forward`."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mcl_kernels._validate import check_choice, check_objective, check_positive
from mcl_kernels.distributed.group import ranks_of
from mcl_kernels.logsumexp.api import IMPLS
from mcl_kernels.logsumexp.pairs import NEGATIVES
from mcl_kernels.losses.functional import check_options, clip_loss, masked_info_nce, nt_xent
from mcl_kernels.losses.sharded import needed_exchange
from mcl_kernels.objectives import Objective, info_nce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Loss(nn.Module):
    """The options that the three losses share, which the constructors of the three list with their types."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_choice("negatives", options["negatives"], NEGATIVES)
        check_choice("impl", options["impl"], IMPLS)
        check_objective(options["objective"])
        check_options(options["exchange"], options["reduction"], options["normalize"])
        if options["group"] is not None:
            ranks_of(options["group"])
            needed_exchange(*(options[name] for name in ("exchange", "negatives", "objective", "reduction")))
        self.options = options

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loss:
        """Returns a copy, for the average of a model for example, with the same process group."""
        memo[id(self.options["group"])] = self.options["group"]
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def extra_repr(self) -> str:
        """The temperature, and the options that differ from their defaults."""
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


class MaskedInfoNCE(_Loss):
    """`masked_info_nce` as a module: each query against its positive and the keys of its own cluster.

    The first loss with a `LabelledQueue` is 0, since the queue is empty at first. MoCo's is full of random rows.

    Args:
        temperature: t > 0, a float, a tensor [] or [1], or a vector [N]. A Parameter is learned. The values of a tensor
            are not checked.
        negatives, objective, normalize, reduction, impl, group, exchange: as in `masked_info_nce`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, in the constructor. `forward` raises as
            `masked_info_nce`.

    Source: as `masked_info_nce`.

    Example:
        >>> loss = MaskedInfoNCE(temperature=1.0, reduction="sum")
        >>> loss
        MaskedInfoNCE(temperature=1.0, reduction=sum)
        >>> loss(torch.eye(4), torch.eye(4), labels=torch.tensor([0, 0, 1, 1]))
        tensor(1.2530)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        negatives: str = "same",
        objective: Objective = info_nce,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(
            negatives=negatives, objective=objective, normalize=normalize, reduction=reduction, impl=impl, group=group,
            exchange=exchange,
        )  # fmt: skip
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> Tensor:
        return masked_info_nce(
            query, key, labels, key_labels, temperature=self.temperature, positive=positive, ids=ids, key_ids=key_ids,
            **self.options,
        )  # fmt: skip


class NTXentLoss(_Loss):
    """`nt_xent` as a module, SimCLR's loss: each view against its other view and all views of its own cluster.

    Args:
        temperature: t > 0, a float, a tensor [] or [1], or a vector [2N]. A Parameter is learned. The values of a
            tensor are not checked.
        negatives, objective, normalize, reduction, impl, group, exchange: as in `nt_xent`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, in the constructor. `forward` raises as `nt_xent`.

    Source: as `nt_xent`.

    Example:
        >>> loss = NTXentLoss(torch.nn.Parameter(torch.ones(1)))
        >>> loss
        NTXentLoss(temperature=1 (learned))
        >>> loss(torch.eye(4), torch.eye(4), labels=torch.tensor([0, 0, 1, 1])).detach()
        tensor(0.5514)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        negatives: str = "same",
        objective: Objective = info_nce,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(
            negatives=negatives, objective=objective, normalize=normalize, reduction=reduction, impl=impl, group=group,
            exchange=exchange,
        )  # fmt: skip
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self, view_a: Tensor, view_b: Tensor, labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        return nt_xent(view_a, view_b, labels, temperature=self.temperature, ids=ids, **self.options)


class ClipLoss(_Loss):
    """`clip_loss` as a module, CLIP's loss: images against captions and captions against images, within clusters.

    The scale of the logits belongs to the model, and is given to `forward`.

    Args:
        negatives, objective, normalize, reduction, impl, group, exchange: as in `clip_loss`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, in the constructor. `forward` raises as
            `clip_loss`.

    Source: as `clip_loss`.

    Example:
        >>> features = torch.eye(4)
        >>> ClipLoss()(features, features, logit_scale=1.0, labels=torch.tensor([0, 0, 1, 1]))
        tensor(0.3133)
    """

    def __init__(
        self,
        *,
        negatives: str = "same",
        objective: Objective = info_nce,
        normalize: bool = False,
        reduction: str = "mean",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(
            negatives=negatives, objective=objective, normalize=normalize, reduction=reduction, impl=impl, group=group,
            exchange=exchange,
        )  # fmt: skip

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        labels: Tensor | None = None,
        *,
        text_labels: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        return clip_loss(
            image_features, text_features, labels, logit_scale=logit_scale, text_labels=text_labels, ids=ids,
            **self.options,
        )  # fmt: skip


def _check_temperature(temperature: object) -> None:
    """Raises for what no batch accepts; the length of a vector is checked with the batch."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
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
