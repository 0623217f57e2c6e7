"""Objectives: the loss of an anchor from its positive logit a and the log-sum-exp b of its negatives.

An objective is a function `(a, b, n, scale) -> loss`, or an instance of `Objective`, elementwise in vectors of one
entry per anchor, fp32 or fp64, with

    a      positive logits, scale * <q, p>
    b      log sum exp of the negatives' logits
    n      number of negatives, in the dtype of a; None unless the objective sets `counts = True`
    scale  inverse temperature, 0-d or one entry per anchor

The losses replace the result for an anchor without negatives by 0, with gradient 0.

Every formula stays in logarithms: exp(b) overflows fp32 at b = 89, well inside the range of scale 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels._validate import as_number, check_at_least_0, check_positive

ObjectiveLike = Callable[..., Tensor]


class Objective:
    """Base of objectives with settings or needs. A plain function has the defaults of these attributes.

    Attributes:
        counts: n is the number of negatives, counted in O(N log N), and not None.
        scales: factors (f, g, ...) of the scale. b is a tuple of log-sum-exps, one for each factor. None: b is the
            log-sum-exp itself, [N].
        mixes_anchors: the loss of an anchor depends on others. `__call__` takes a fifth argument, bool [N], true for
            anchors with negatives.

    Example:
        >>> class Margin(Objective):
        ...     def __call__(self, a, b, n=None, scale=None):
        ...         return torch.relu(b - a + 0.1)
        >>> Margin()(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([1.1000])
    """

    counts: ClassVar[bool] = False
    scales: tuple[float, ...] | None = None
    mixes_anchors: ClassVar[bool] = False

    __call__: ObjectiveLike


class Needs(NamedTuple):
    """Attributes of an objective, which a function may set too."""

    counts: bool
    scales: tuple[float, ...] | None
    mixes_anchors: bool


def needs_of(objective: ObjectiveLike) -> Needs:
    """Attributes of `Objective` as this objective sets them, or their defaults."""
    return Needs(
        getattr(objective, "counts", Objective.counts),
        getattr(objective, "scales", Objective.scales),
        getattr(objective, "mixes_anchors", Objective.mixes_anchors),
    )


def info_nce(a: Tensor, b: Tensor, n: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """InfoNCE, the loss of SimCLR, MoCo and CLIP.

        log(1 + e^(b - a)) = -log(e^a / (e^a + sum_j e^s_j))

    Source: van den Oord et al. 2018 (arXiv 1807.03748), equation 4.

    Example:
        >>> float(info_nce(torch.tensor(2.0), torch.tensor(2.0)))
        0.6931471824645996
    """
    # Above 50 the logarithm is b - a itself, to the last bit of fp64.
    return F.softplus(b - a, threshold=50)


def decoupled(a: Tensor, b: Tensor, n: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Decoupled contrastive learning (DCL): the positive leaves the denominator.

        b - a

    Source: Yeh et al. 2022 (arXiv 2110.06848), equation 6.

    Example:
        >>> float(decoupled(torch.tensor(2.0), torch.tensor(3.0)))
        1.0
    """
    return b - a


# The classes below are named like the functions above, since callers use them as functions with a setting.


@dataclass(frozen=True)
class decoupled_weighted(Objective):  # noqa: N801
    """Decoupled contrastive learning with von Mises-Fisher weights of the positives (DCLW).

        b_i - w_i a_i,    w_i = 2 - B exp(<q_i, p_i> / sigma) / sum_k exp(<q_k, p_k> / sigma)

    B is the number of anchors with negatives, over which the weights are normalised; the gradient flows through them.

    Args:
        sigma: width of the weights, in units of cosine similarity.

    Raises:
        TypeError, ValueError: a sigma that is no positive number, in the constructor.

    Source: Yeh et al. 2022 (arXiv 2110.06848), equation 7, and its public code.

    Example:
        >>> a, b = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0])
        >>> decoupled_weighted()(a, b, None, torch.tensor(1.0), torch.tensor([True, True]))
        tensor([1., 2.])
    """

    sigma: float = 0.5
    mixes_anchors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)

    def __call__(self, a: Tensor, b: Tensor, n: Tensor | None, scale: Tensor, has_negatives: Tensor) -> Tensor:
        # The lowest finite number, not -inf: its softmax has a gradient even where no anchor has negatives.
        similarity = (a / scale).masked_fill(~has_negatives, torch.finfo(a.dtype).min)
        weight = 2.0 - has_negatives.sum() * torch.softmax(similarity / self.sigma, dim=0)
        return b - weight * a


@dataclass(frozen=True)
class ifm(Objective):  # noqa: N801
    """Implicit feature modification: a weighted mean of InfoNCE and InfoNCE of adversarially perturbed logits.

        (L(b - a) + alpha L(b - a + 2 eps scale)) / (1 + alpha),    L(x) = log(1 + e^x)

    Args:
        eps: perturbation of each similarity, applied before the division by the temperature.
        alpha: weight of the perturbed loss.

    Raises:
        TypeError, ValueError: an eps or alpha that is no number of at least 0, in the constructor.

    Source: Robinson et al. 2021 (arXiv 2106.11230), equation 5, and its public code.

    Example:
        >>> a, b, scale = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(5.0)
        >>> ifm(eps=0.0)(a, b, None, scale) == info_nce(a, b)
        tensor([True])
    """

    eps: float = 0.1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_at_least_0("eps", self.eps)
        check_at_least_0("alpha", self.alpha)

    def __call__(self, a: Tensor, b: Tensor, n: Tensor | None, scale: Tensor) -> Tensor:
        perturbed = info_nce(a, b + 2.0 * self.eps * scale)
        return (info_nce(a, b) + self.alpha * perturbed) / (1.0 + self.alpha)


@dataclass(frozen=True)
class debiased(Objective):  # noqa: N801
    """Debiased contrastive loss: corrects for the positives that hide among the negatives.

        log(1 + e^(g - a)),    e^g = max((e^b - n tau_plus e^a) / (1 - tau_plus), n e^-scale)

    Args:
        tau_plus: prior probability that a negative has the anchor's own class, in [0, 1).

    Raises:
        TypeError, ValueError: a tau_plus that is no number in [0, 1), in the constructor.

    Source: Chuang et al. 2020 (arXiv 2007.00224), equation 8.

    Example:
        >>> a, b, n = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
        >>> debiased(tau_plus=0.0)(a, b, n, torch.tensor(5.0))
        tensor([1.3133])
    """

    tau_plus: float = 0.1
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= as_number("tau_plus", self.tau_plus) < 1.0:
            raise ValueError(f"tau_plus must be in [0, 1): got {self.tau_plus}")

    def __call__(self, a: Tensor, b: Tensor, n: Tensor, scale: Tensor) -> Tensor:
        if self.tau_plus == 0.0:
            return info_nce(a, b)
        log_n = n.log()
        # e^b - n tau_plus e^a = e^b (1 - e^x); where x >= 0 nothing is left and the floor holds.
        x = math.log(self.tau_plus) + log_n + a - b
        positive_part = x < 0
        remaining = torch.log(-torch.expm1(torch.where(positive_part, x, -1.0)))
        corrected = b + remaining - math.log1p(-self.tau_plus)
        floor = log_n - scale
        return info_nce(a, torch.where(positive_part, torch.maximum(corrected, floor), floor))


@dataclass(frozen=True)
class hard_negative(Objective):  # noqa: N801
    """InfoNCE with negatives weighted by their hardness.

        log(1 + e^(g - a)),    g = log n + log sum_j e^((1 + beta) s_j) - log sum_j e^(beta s_j)

    Args:
        beta: concentration of the weights e^(beta s); 0 is InfoNCE.

    Raises:
        TypeError, ValueError: a beta that is no number of at least 0, in the constructor.

    Source: Robinson et al. 2021 (arXiv 2010.04592), equation 4, without the debiasing term.

    Example:
        >>> hard_negative(beta=0.5).scales
        (1.5, 0.5)
    """

    beta: float = 1.0
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least_0("beta", self.beta)

    @property
    def scales(self) -> tuple[float, float]:  # type: ignore[override]
        return 1.0 + self.beta, self.beta

    def __call__(self, a: Tensor, b: tuple[Tensor, Tensor], n: Tensor, scale: Tensor) -> Tensor:
        return info_nce(a, n.log() + b[0] - b[1])
