"""One thread in a forked process, whose parent's threads are not there.

PyTorch's own operations wait for these threads forever, where the parent has used them. A worker of a `DataLoader`,
which is a forked process too, has one thread already.
"""

from __future__ import annotations

import os
import warnings

import torch

_inherited_threads: int | None = None  # in a forked process until it is set to one thread


def _note_fork() -> None:
    global _inherited_threads
    _inherited_threads = torch.get_num_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def use_one_thread_if_forked() -> None:
    """Sets PyTorch to one thread, once in a forked process that has not set a number itself.

    For good, and not for one call: the backward pass of a loss comes later, and has operations of PyTorch's own.
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


# No part of a compiled graph, as what `logsumexp.api` marks.
use_one_thread_if_forked._dynamo_marked_constant = True  # type: ignore[attr-defined]
