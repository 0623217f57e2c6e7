"""Repeated launches compute what recorded ones did, and are those that Triton's dispatch would launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, nt_xent
from tests.new_process import run_python

pytest.importorskip("triton.knobs", reason="the test extra brings it, where there is one")

from triton.runtime.interpreter import InterpretedFunction

from mcl_kernels.backends import triton_launch
from mcl_kernels.logsumexp import device_plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="repeats launches of the interpreter")


def tensor_at(address: int, like: Tensor) -> Tensor:
    """The memory at an address with the layout of another tensor."""
    if not like.numel():
        return like
    count = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (count * like.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def as_tensors(arguments: Any, recorded: Any) -> Any:
    """Arguments of a repeated launch with tensors in place of addresses."""
    if isinstance(recorded, Tensor):
        return tensor_at(arguments, recorded)
    if isinstance(recorded, tuple):
        fields = [as_tensors(*pair) for pair in zip(arguments, recorded, strict=True)]
        return type(recorded)(*fields)
    assert arguments is recorded or arguments == recorded
    return recorded


class Interpreted:
    """A kernel of the interpreter that is launched as a compiled one, by addresses."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, run: Callable[..., None], kernel: Any, arguments: Any, options: dict[str, Any]) -> None:
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        self.recorded = list(kernel.signature.bind(*arguments, **named).arguments.values())
        self.kernel, self.interpret, self.launched = kernel, run, 0
        self._run = self.run

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert (stream, *rest[:5]) == (7, self.function, self.packed_metadata, None, None, None)
        self.launched += 1
        arguments = [as_tensors(*pair) for pair in zip(rest[5:], self.recorded, strict=True)]
        self.interpret(self.kernel, *arguments, grid=(x, y, z), warmup=False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Interpreted]:
    """Kernels as Triton's dispatch returned them; repeated launches of them are interpreted."""
    kernels: list[Interpreted] = []
    interpret = InterpretedFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Interpreted:
        interpret(self, *arguments, grid=grid, warmup=warmup, **options)
        kernels.append(Interpreted(interpret, self, arguments, options))
        return kernels[-1]

    def parameters(self: Any) -> list[Any]:
        found = signature(self.fn).parameters.values()
        return [SimpleNamespace(name=x.name, is_constexpr="constexpr" in str(x.annotation)) for x in found]

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(InterpretedFunction, "signature", property(lambda self: signature(self.fn)), raising=False)
    monkeypatch.setattr(InterpretedFunction, "params", property(parameters), raising=False)
    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_launch, "TESTED", True)
    monkeypatch.setattr(device_plan, "_is_built", lambda device: False)
    monkeypatch.setattr(triton_launch, "_kept", {})
    return kernels


def views(a: Tensor, b: Tensor, scale: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    return nt_xent(a, b, labels, temperature=scale.reciprocal(), impl="triton", **options)


def pairs(a: Tensor, b: Tensor, scale: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    return clip_loss(a, b, labels, logit_scale=scale, impl="triton", **options)


def batch(a: Tensor, b: Tensor, scale: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    return masked_info_nce(a, b, labels, temperature=scale.reciprocal(), impl="triton", **options)


def queue(a: Tensor, b: Tensor, scale: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    keys = torch.cat((b, b.flip(0), b[:3]))
    key_labels = None if labels is None else torch.cat((labels, labels, labels[:3]))
    return masked_info_nce(
        a, keys, labels, key_labels, positive=b, temperature=scale.reciprocal(), impl="triton", **options
    )


LOSSES = [views, pairs, batch, queue]


def make_batch(seed: int, dtype: torch.dtype, n: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, n, 24, generator=generator).to(dtype)
    labels = torch.randint(-1, 3, (n,), generator=generator)
    return [*rows, torch.rand((), generator=generator) + 2, labels]


def results(loss: Callable[..., Tensor], tensors: list[Tensor], labelled: bool, **options: Any) -> list[Tensor]:
    a, b, scale, labels = tensors
    leaves = [x.clone().requires_grad_() for x in (a, b, scale)]
    losses = loss(*leaves, labels.clone() if labelled else None, reduction="none", **options)
    weights = torch.linspace(1, 2, len(losses))
    return [losses.detach(), *torch.autograd.grad(losses, leaves, weights)]


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for value, other in zip(got, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_repeated_launches_have_the_bits_of_recorded_ones(
    request: pytest.FixtureRequest, compiled: list[Interpreted], loss: Callable[..., Tensor], normalize: bool,
    labelled: bool,
) -> None:  # fmt: skip
    """The memory of a repetition holds NaN before."""
    options = {"normalize": normalize}
    results(loss, make_batch(0, torch.float32), labelled, **options)
    recorded, kept = len(compiled), len(triton_launch._kept)
    request.getfixturevalue("poisoned_memory")
    got = results(loss, make_batch(1, torch.float32), labelled, **options)
    if loss is not views or normalize:  # views that are not normalised are a composition
        assert len(compiled) == recorded  # nothing went by Triton's dispatch
        assert all(kernel.launched for kernel in compiled)
    assert len(triton_launch._kept) == kept
    triton_launch._kept.clear()
    assert_same_bits(got, results(loss, make_batch(1, torch.float32), labelled, **options))


@pytest.mark.parametrize("loss", [views, *(pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES[1:])])
def test_each_layout_is_recorded_by_itself(compiled: list[Interpreted], loss: Callable[..., Tensor]) -> None:
    """A call takes no kernel that was recorded for another dtype, size, stride, negatives or wanted gradient."""
    strided = [x.t().contiguous().t() if x.ndim == 2 else x for x in make_batch(2, torch.float32)]
    calls: list[tuple[list[Tensor], bool, dict[str, Any]]] = [
        (make_batch(2, torch.float32), True, {}),
        (make_batch(2, torch.bfloat16), True, {}),
        (make_batch(2, torch.float32, n=17), True, {}),
        (strided, True, {}),
        (make_batch(2, torch.float32), True, {"negatives": "different"}),
        (make_batch(2, torch.float32), True, {"negatives": "all"}),
        (make_batch(2, torch.float32), True, {"ids": torch.arange(20) // 2}),
        (make_batch(2, torch.float32), False, {}),
    ]
    if loss is queue:
        calls = [call for call in calls if "ids" not in call[2]]
    first = [results(loss, tensors, labelled, **options) for tensors, labelled, options in calls]
    for expected, (tensors, labelled, options) in zip(first, calls, strict=True):
        triton_launch._kept.clear()
        assert_same_bits(results(loss, tensors, labelled, **options), expected)


def test_what_is_not_aligned_goes_by_the_dispatch(compiled: list[Interpreted]) -> None:
    aligned = make_batch(0, torch.float32)
    expected = results(views, aligned, False)
    recorded = len(compiled)
    memory = torch.empty(20 * 24 + 1)
    unaligned = memory[1:].view(20, 24).copy_(aligned[0]).requires_grad_()
    b, scale = aligned[1].clone().requires_grad_(), aligned[2].clone().requires_grad_()
    losses = views(unaligned, b, scale, None, reduction="none")
    assert len(compiled) > recorded
    assert torch.equal(losses.detach(), expected[0])


def test_an_input_that_is_given_twice_goes_by_the_dispatch(compiled: list[Interpreted]) -> None:
    a = make_batch(0, torch.float32)[0]
    for _ in range(2):
        loss = clip_loss(a, a, logit_scale=torch.tensor(3.0), impl="triton")
    assert not any(kernel.launched for kernel in compiled)
    for _ in range(2):  # the layout is not spoiled
        assert torch.equal(loss, clip_loss(a, a.clone(), logit_scale=torch.tensor(3.0), impl="triton"))
    assert any(kernel.launched for kernel in compiled)


def test_hooks_of_saved_tensors_change_strides(compiled: list[Interpreted]) -> None:
    """As `torch.autograd.graph.save_on_cpu` does on a GPU."""
    a, b, scale, _ = make_batch(0, torch.float32)
    wide = torch.cat((a, torch.full_like(a, 7.0)), dim=1)

    def gradients(unpack: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [wide.clone().requires_grad_(), b.clone().requires_grad_()]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            loss = pairs(leaves[0][:, :24], leaves[1], scale, None, normalize=False)
            return list(torch.autograd.grad(loss, leaves))

    expected = gradients(lambda x: x)
    assert_same_bits(gradients(lambda x: x.contiguous()), expected)
    triton_launch._kept.clear()
    assert_same_bits(gradients(lambda x: x.contiguous()), expected)
    assert_same_bits(gradients(lambda x: x), expected)


def test_the_precision_of_the_backward_pass_is_that_of_its_time(compiled: list[Interpreted]) -> None:
    tensors = [x.requires_grad_(x.is_floating_point()) for x in make_batch(0, torch.float32)]
    before = torch.get_float32_matmul_precision()
    try:
        loss = views(*tensors)
        torch.set_float32_matmul_precision("high")
        loss.backward()
    finally:
        torch.set_float32_matmul_precision(before)
    loss, recorded = views(*tensors), len(compiled)
    loss.backward()
    assert len(compiled) > recorded  # kernels of the other precision are not repeated


def test_a_thread_that_finds_another_recording_does_not_record(compiled: list[Interpreted]) -> None:
    tensors = make_batch(0, torch.float32)
    with triton_launch._record_lock:
        expected = results(pairs, tensors, True)
    assert not triton_launch._kept
    assert_same_bits(results(pairs, tensors, True), expected)
    assert triton_launch._kept


def test_hooks_of_triton_are_called(compiled: list[Interpreted], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_batch(0, torch.float32)
    expected, recorded = results(pairs, tensors, True), len(compiled)
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton_launch, "knobs", SimpleNamespace(
        runtime=SimpleNamespace(debug=False, launch_enter_hook=hook, launch_exit_hook=None),
        compilation=triton_launch.knobs.compilation,
    ))  # fmt: skip
    assert_same_bits(results(pairs, tensors, True), expected)
    assert len(compiled) == 2 * recorded


def test_an_operator_among_the_launches_is_not_repeated(compiled: list[Interpreted]) -> None:
    x = torch.ones(4)
    for value in (1.0, 2.0):
        (result,) = triton_launch.repeated(("sum",), (x * value,), lambda value=value: (x * value + 1,))
        assert result is not None
        assert torch.equal(result, x * value + 1)
    assert list(triton_launch._kept.values()) == [None]


DISPATCHED = """
import torch
from benchmarks.gpu.launch_count import make_cases
from benchmarks.gpu.stand_in import dispatch
from mcl_kernels.backends import triton_launch

launched = []
with dispatch(record=lambda kernel, *arguments: launched.append((kernel, arguments))):
    def kernels_of(step):
        launched.clear()
        step()
        return [kernel for kernel, _ in launched], [arguments[:4] for _, arguments in launched], list(launched)

    for n in (16, 17, 64, 1000):
        for case in make_cases(n):
            step = case.step(case.ours)
            triton_launch._kept.clear()
            first, grids, calls = kernels_of(step)
            again, same_grids, repeated = kernels_of(step)
            assert first == again and grids == same_grids, case.name
            # Those of the repetition have no tensor left.
            def leaves(x):
                return [y for field in x for y in leaves(field)] if isinstance(x, tuple) else [x]
            for (_, arguments), (_, direct) in zip(calls, repeated, strict=True):
                assert not any(isinstance(x, torch.Tensor) for x in leaves(direct))
                for x, y in zip(leaves(arguments[9:]), leaves(direct[9:]), strict=True):
                    if isinstance(x, torch.Tensor):
                        assert isinstance(y, int) and (y % 16 == 0) == (x.data_ptr() % 16 == 0)
                    elif not hasattr(x, "base"):
                        assert x is y or x == y
            print(case.name, n, len(first))
            assert all(found is not None for found in triton_launch._kept.values())
"""


def test_repetitions_launch_the_kernels_that_the_dispatch_finds() -> None:
    """With Triton's own specialisation and descriptors, for a GPU that does not exist."""
    result = run_python(DISPATCHED, TRITON_INTERPRET="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:3] == ["nt_xent 16 13", "clip_loss 16 19", "masked_info_nce, queue 16 15"]
