"""The losses as modules."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from mcl_kernels import (
    ClipLoss,
    MaskedInfoNCE,
    NTXentLoss,
    SupConLoss,
    clip_loss,
    masked_info_nce,
    nt_xent,
    objectives,
    supcon_loss,
)
from tests.conftest import Backend
from tests.loss_cases import pair


def test_modules_are_the_functions(backend: Backend) -> None:
    x, y = pair(12)
    labels, queue = torch.arange(12) % 3, pair(20, seed=2)[0]
    options = {"objective": objectives.ifm(), "reduction": "sum", "impl": backend.impl}
    assert torch.equal(NTXentLoss(0.2, **options)(x, y, labels), nt_xent(x, y, labels, temperature=0.2, **options))
    assert torch.equal(
        MaskedInfoNCE(0.2, **options)(x, queue, labels, torch.arange(20) % 3, positive=y),
        masked_info_nce(x, queue, labels, torch.arange(20) % 3, positive=y, temperature=0.2, **options),
    )
    assert torch.equal(
        ClipLoss(**options)(x, y, torch.tensor(3.0), labels), clip_loss(x, y, labels, logit_scale=3.0, **options)
    )
    options = {"positives": "sum", "reduction": "sum", "impl": backend.impl}
    assert torch.equal(
        SupConLoss(0.2, **options)(x, labels, labels % 2),
        supcon_loss(x, labels, labels % 2, temperature=0.2, **options),
    )


def test_modules_learn_a_temperature() -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.5))
    module = NTXentLoss(temperature, objective=objectives.hard_negative(0.5))
    module(*pair(6)).backward()
    assert dict(module.named_parameters())["temperature"] is temperature
    assert temperature.grad is not None


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (MaskedInfoNCE(), "MaskedInfoNCE(temperature=0.07)"),
        (NTXentLoss(0.2, normalize=True, impl="auto"), "NTXentLoss(temperature=0.2)"),
        (NTXentLoss(torch.tensor(0.25)), "NTXentLoss(temperature=0.25)"),
        (NTXentLoss(torch.nn.Parameter(torch.tensor([0.25]))), "NTXentLoss(temperature=0.25 (learned))"),
        (NTXentLoss(torch.nn.Parameter(torch.ones(6))), "NTXentLoss(temperature=tensor [6] (learned))"),
        (NTXentLoss(torch.ones((), device="meta")), "NTXentLoss(temperature=tensor [])"),
        (ClipLoss(), "ClipLoss()"),
        (ClipLoss(normalize=True, reduction="sum"), "ClipLoss(normalize=True, reduction=sum)"),
        (MaskedInfoNCE(objective=objectives.decoupled), "MaskedInfoNCE(temperature=0.07, objective=decoupled)"),
        (ClipLoss(objective=objectives.ifm()), "ClipLoss(objective=ifm(eps=0.1, alpha=1.0))"),
        (SupConLoss(), "SupConLoss(temperature=0.07)"),
        (SupConLoss(positives="sum", normalize=False), "SupConLoss(temperature=0.07, normalize=False, positives=sum)"),
        (MaskedInfoNCE(include=("qk", "qq")), "MaskedInfoNCE(temperature=0.07, include=('qk', 'qq'))"),
    ],
)
def test_modules_print_their_temperature_and_what_differs_from_the_defaults(
    module: torch.nn.Module, expected: str
) -> None:
    assert repr(module) == expected
    assert repr(copy.deepcopy(module)) == expected


@pytest.mark.parametrize("module", [MaskedInfoNCE, NTXentLoss, ClipLoss, SupConLoss])
def test_modules_list_the_options_of_their_function(module: type[torch.nn.Module]) -> None:
    """Defaults are equal; all other parameters of the function are tensors, which `forward` takes."""
    functions = {MaskedInfoNCE: masked_info_nce, NTXentLoss: nt_xent, ClipLoss: clip_loss, SupConLoss: supcon_loss}
    function = functions[module]  # type: ignore[index]
    function_parameters = dict(inspect.signature(function).parameters)
    module_parameters = inspect.signature(module).parameters
    forward_parameters = inspect.signature(module.forward).parameters
    assert module_parameters.keys() | forward_parameters.keys() == function_parameters.keys() | {"self"}
    for name, parameter in module_parameters.items():
        assert parameter.default == function_parameters[name].default
        assert parameter.annotation == function_parameters[name].annotation
