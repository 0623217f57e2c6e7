"""The compiled CPU kernels: the same bits everywhere, and no hang anywhere."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcl_kernels import capabilities, masked_logsumexp, nt_xent
from mcl_kernels.backends import native
from tests.cases import make_case
from tests.conftest import INSTRUCTION_SETS, use_instruction_set
from tests.new_process import run_python

pytestmark = pytest.mark.skipif(not native.describe()[0], reason=native.describe()[1])
FORMS = ["self", "rows", "both"]


def results(form: str, dtype: torch.dtype, *, n: int = 1500, d: int = 40) -> list[Tensor]:
    """LSE and gradients of a batch with one cluster of many blocks and several small ones."""
    case = make_case(n, None if form == "self" else n + 300, d, n_clusters=3, dtype=dtype)
    labels = case.labels.clamp(max=1)
    key_labels = None if case.key_labels is None else case.key_labels.clamp(max=1)
    leaves = [x.requires_grad_() for x in (case.query, case.key) if x is not None]
    scale = torch.tensor(5.0, requires_grad=True)
    lse = masked_logsumexp(
        *leaves, *([None] if case.key is None else []), labels, key_labels, scale=scale, ids=case.ids,
        key_ids=case.key_ids, bidirectional=form == "both", impl="native",
    )  # fmt: skip
    outputs = list(lse) if form == "both" else [lse]
    weighted = sum((x.where(x.isfinite(), 0) * torch.linspace(-1, 2, len(x))).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(weighted, [*leaves, scale])]


@pytest.fixture
def thread_count() -> int:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_for_any_number_of_threads(form: str, dtype: torch.dtype, thread_count: int) -> None:
    torch.set_num_threads(1)
    expected = results(form, dtype)
    for threads in (1, 2, 4, 4):
        torch.set_num_threads(threads)
        for got, wanted in zip(results(form, dtype), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_same_bits_from_two_threads_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_instruction_set(name, monkeypatch)
    expected = results("self", torch.bfloat16)
    found: list[list[Tensor]] = []
    callers = [threading.Thread(target=lambda: found.append(results("self", torch.bfloat16))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 3
    for result in found:
        assert all(torch.equal(got, wanted) for got, wanted in zip(result, expected, strict=True))


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCL_KERNELS_CPU", "mmx")
    with pytest.raises(RuntimeError, match=r"MCL_KERNELS_CPU must be .* portable.*got mmx"):
        masked_logsumexp(torch.randn(4, 3), impl="native")


def test_auto_is_native_on_a_cpu() -> None:
    x = torch.randn(300, 24)
    assert torch.equal(masked_logsumexp(x), masked_logsumexp(x, impl="native"))
    assert "native" in str(capabilities()["auto"]["reason"])


def test_native_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="impl='native' computes on CPU tensors: got device meta"):
        masked_logsumexp(torch.empty(4, 3, device="meta"), impl="native")


LOSS = """
import os, sys, torch
from mcl_kernels import masked_logsumexp
torch.set_num_threads(2)
x = torch.randn(1500, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)

def gradient():
    # No operation of PyTorch itself: in a forked child most of them also wait for threads that do not exist.
    return torch.autograd.grad(masked_logsumexp(x, impl="native"), x, torch.ones(1500))[0]

expected = gradient()
"""


def test_in_a_forked_child() -> None:
    """A child without the threads of its parent does not wait for them."""
    result = run_python(
        LOSS + "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(gradient(), expected) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds the OpenMP runtime of torch as Linux shows it")
def test_in_a_nested_parallel_region() -> None:
    """Both threads of an OpenMP region compute, each alone, the same bits, and start no further threads."""
    result = run_python(
        LOSS + "import ctypes\n"
        "runtime = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}\n"
        "assert len(runtime) == 1, runtime\n"
        "results = []\n"
        "def body(data):\n"
        "    results.append(torch.equal(gradient(), expected))\n"
        "def threads():\n"
        "    return len(os.listdir('/proc/self/task'))\n"
        "callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)\n"
        "before = threads()\n"
        "ctypes.CDLL(runtime.pop()).GOMP_parallel(callback, None, 2, 0)\n"
        "assert results == [True, True], results\n"
        "assert threads() == before, (threads(), before)\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_in_a_spawned_data_loader_worker(tmp_path: Path) -> None:
    """`tests/test_forked.py` has forked ones."""
    script = tmp_path / "loader.py"
    script.write_text(
        LOSS + "class Losses(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, index): return gradient()\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(Losses(), num_workers=2, multiprocessing_context='spawn')\n"
        "    assert all(torch.equal(batch[0], expected) for batch in loader)\n"
    )
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of Linux")
@pytest.mark.parametrize(("function", "max_ratio"), [("masked_logsumexp", 3.0), ("nt_xent", 5.0)])
def test_peak_memory(function: str, max_ratio: float) -> None:
    """At most 3 times the rows in fp32, 5 times with normalisation: gradients included, inputs excluded."""
    rows, d = 65536, 128
    result = run_python(f"""
import pathlib, torch, mcl_kernels
def kib(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))
labels = torch.arange({rows}) % 128
views = torch.randn({rows // 2}, {d}, requires_grad=True), torch.randn({rows // 2}, {d}, requires_grad=True)
all_rows = torch.randn({rows}, {d}, requires_grad=True)
def grad(n):
    if {function!r} == "nt_xent":
        loss = mcl_kernels.nt_xent(*(view[: n // 2] if n < {rows} else view for view in views), labels[: n // 2])
        return torch.autograd.grad(loss, views)
    loss = mcl_kernels.masked_logsumexp(all_rows[:n] if n < {rows} else all_rows, labels=labels[:n]).mean()
    return torch.autograd.grad(loss, all_rows)
grad(512)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
grad({rows})
print(1024 * (kib("VmHWM") - before))
""")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= max_ratio * rows * d * 4


def test_losses_use_the_kernels() -> None:
    x, y = torch.randn(2, 200, 16)
    assert torch.equal(nt_xent(x, y), nt_xent(x, y, impl="native"))
