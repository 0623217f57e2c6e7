"""Limits a forked process to one thread, since the thread pool of its parent does not exist in it.

If the parent has used its threads, PyTorch's operations in the child wait for them forever. A worker of a `DataLoader`
is a forked process too, but already limited to one thread.
"""

from __future__ import annotations

import os
import warnings

import torch

_inherited_threads: int | None = None  # number of threads of the parent, in a forked process not checked yet


def _note_fork() -> None:
    global _inherited_threads
    _inherited_threads = torch.get_num_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def use_one_thread_if_forked() -> None:
    """Sets PyTorch to one thread, once per forked process, unless the process has set a number of threads itself.

    The limit is not lifted after the call: the backward pass of a loss runs later, and uses PyTorch's operations too.
    """
    global _inherited_threads
    if _inherited_threads is None:
        return
    inherited, _inherited_threads = _inherited_threads, None
    if torch.get_num_threads() == inherited > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "mcl_kernels: this process was forked, so PyTorch is set to one thread: it does not inherit the threads of "
            "its parent, and PyTorch would wait for them forever. Start it by spawn or forkserver to use more; or, if "
            "the parent has computed nothing, call torch.set_num_threads() in it after this warning",
            RuntimeWarning,
            stacklevel=2,
        )


# Called while torch.compile traces, and not part of the compiled graph.
use_one_thread_if_forked._dynamo_marked_constant = True  # type: ignore[attr-defined]
