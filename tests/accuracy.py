"""The assertion "as accurate as the definition", shared by all tests of numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    got: Tensor, reference: Tensor, exact: Tensor, what: str = "result", usual: float | None = None
) -> None:
    """Asserts that `got` is at most twice as far from the fp64 result as the reference on the same rounded inputs.

    A slack of 4 machine epsilons of the output dtype times the largest exact value is added. The whole tensor is
    checked too, by its cosine with the exact one and by its signed bias, which a few outliers would hide.

    A scalar of the reference may be exact by chance, and is on some CPUs. `usual`, the relative error of the terms that
    it sums, then replaces the error of the reference if it is larger.
    """
    assert got.dtype == reference.dtype, f"{what}: dtype {got.dtype}, expected {reference.dtype}"
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    machine_epsilon = torch.finfo(got.dtype).eps
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: NaN or infinity in other places than the exact result"
    assert torch.equal(got[~finite].double().nan_to_num(), exact[~finite].nan_to_num()), f"{what}: other infinities"
    got, reference, exact = got[finite].double(), reference[finite].double(), exact[finite].double()
    if got.numel() == 0:
        return

    slack = 4 * machine_epsilon * float(exact.abs().max())
    if usual is not None and got.numel() == 1:
        reference = exact + torch.maximum((reference - exact).abs(), usual * exact.abs())
    error, allowed = float((got - exact).abs().max()), 2 * float((reference - exact).abs().max()) + slack
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"

    # Rounding errors of many elements cancel in their mean; the error of a single element does not.
    bias = abs(float((got - exact).mean()))
    allowed = 2 * abs(float((reference - exact).mean())) + slack / min(4.0, got.numel() ** 0.5)
    assert bias <= allowed, f"{what}: signed bias {bias:.3g}, allowed {allowed:.3g}"

    turned, allowed = _angle(got, exact), 2 * _angle(reference, exact) + 16 * machine_epsilon**2 + 1e-14
    assert turned <= allowed, f"{what}: 1 - cosine {turned:.3g}, allowed {allowed:.3g}"


def relative_error(got: Tensor, exact: Tensor) -> float:
    """The largest error over the largest exact value; 0 where that is 0."""
    largest = float(exact.double().abs().max()) if exact.numel() else 0.0
    return float((got.double() - exact.double()).abs().max()) / largest if largest else 0.0


def _angle(x: Tensor, y: Tensor) -> float:
    """1 - cosine; 0 for tensors of zeros."""
    norms = float(x.norm() * y.norm())
    return 1 - float(x @ y) / norms if norms > 0 else 0.0
