"""A forked process, which does not inherit its parent's threads, computes with one thread and does not hang."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from mcl_kernels.backends import native

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
IMPLS = ["reference"] + (["native"] if native.describe()[0] else [])

# Sizes for which PyTorch uses threads in the operations around the kernels. The inputs are created in the parent: a
# child that created them would hang before it called the library.
SCRIPT = """
import multiprocessing, sys, torch, warnings
from mcl_kernels import *

torch.set_num_threads(1)
impl, context = sys.argv[1], multiprocessing.get_context("fork")
x, y = torch.randn(2, 40_000, 8)
a, b = (z[: 2_000 if impl == "reference" else 40_000].clone().requires_grad_() for z in (x, y))
stored = next(iter(MultistageRunner(400_000, n_clusters=3))).labels
labels, some_rows = torch.arange(400_000) % 700, x[:7].clone()
fitted = KMeans(5, max_iter=3, impl=impl).fit(x)

def gradients():
    return torch.autograd.grad(nt_xent(a, b, labels[: len(a)], impl=impl), (a, b))

def enqueued():
    queue = LabelledQueue(50_000, 8)
    queue.enqueue(x)
    return [queue.embeddings]

CALLS = {
    "nt_xent": gradients,
    "masked_logsumexp": lambda: [masked_logsumexp(a.detach(), impl=impl)],
    "count_negatives": lambda: [count_negatives(labels)],
    "compose_labels": lambda: [compose_labels(labels, labels)],
    "fit": lambda: [KMeans(5, max_iter=3, impl=impl).fit(x).labels_],
    "predict": lambda: [fitted.predict(x)],
    "assign_clusters": lambda: assign_clusters(x, some_rows),
    "finish": lambda: [next(iter(MultistageRunner(40_000, n_clusters=3))).finish(x).labels[:]],
    "enqueue": enqueued,
    "labels": lambda: [stored[:]],
    "cached_backward": lambda: [cached_backward(torch.exp, [x, y], lambda rows: rows.sum())],
    "model_soup": lambda: [model_soup([{"w": x}, {"w": y}])["w"]],
}
"""
IN_CHILDREN = """
def child(call, expected):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    n_warnings = sum("this process was forked" in str(warning.message) for warning in seen)
    equal = all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
    sys.exit(0 if equal and n_warnings == 1 and torch.get_num_threads() == 1 else 3)

expected = {name: call() for name, call in CALLS.items()}
torch.set_num_threads(2)
x.exp()  # starts the threads of the parent
codes = {}
for name, call in CALLS.items():
    process = context.Process(target=child, args=(call, expected[name]))
    process.start()
    process.join(60)
    codes[name] = "hangs" if process.exitcode is None else process.exitcode
    process.kill()
assert torch.get_num_threads() == 2  # unchanged in the parent
print({name: code for name, code in codes.items() if code})
"""
# A number of threads that the process sets after the first call is kept.
THREADS_CHOSEN_LATER = """
def child():
    compose_labels(labels, labels)
    torch.set_num_threads(2)
    compose_labels(labels, labels)
    sys.exit(torch.get_num_threads())

torch.set_num_threads(2)  # without computing, so the child can start threads of its own
process = context.Process(target=child)
process.start()
process.join(60)
print(process.exitcode)
"""
IN_A_WORKER = """
class Items(torch.utils.data.Dataset):
    def __len__(self): return len(CALLS)
    def __getitem__(self, index): return [z.detach().clone() for z in list(CALLS.values())[index]()]

warnings.filterwarnings("error", "mcl_kernels: this process was forked")  # a worker has one thread already
options = {"num_workers": 1, "multiprocessing_context": context, "timeout": 60}
loader = torch.utils.data.DataLoader(Items(), batch_size=None, **options)
print([name for (name, tensors), result in zip(expected.items(), loader, strict=True)
       if not all(torch.equal(one, other) for one, other in zip(result, tensors, strict=True))])
"""


def output(code: str, impl: str) -> str:
    """Runs SCRIPT followed by `code`; returns its output."""
    command = [sys.executable, "-c", SCRIPT + code, impl]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=root)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_forked_children_and_workers_of_a_data_loader_compute_what_their_parent_does(impl: str) -> None:
    assert output(IN_CHILDREN + IN_A_WORKER, impl) == "{}\n[]"


def test_a_number_of_threads_set_in_a_forked_child_is_kept() -> None:
    assert output(THREADS_CHOSEN_LATER, "reference") == "2"
    chosen_first = THREADS_CHOSEN_LATER.replace("def child():\n", "def child():\n    torch.set_num_threads(3)\n", 1)
    assert output(chosen_first.replace("    torch.set_num_threads(2)\n", "", 1), "reference") == "3"
