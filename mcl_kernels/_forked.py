"""One thread in a forked process, whose parent's threads are not there.

PyTorch's own operations wait for these threads forever, where the parent has used them. A worker of a `DataLoader`,
which is a forked process too, has one thread already.
"""

from __future__ import annotations

import os
import warnings

import torch

_was_forked = False


def _note_fork() -> None:
    global _was_forked
    _was_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def use_one_thread_if_forked() -> None:
    """Sets PyTorch to one thread, once in a forked process; the caller may set another number afterwards.

    For good, and not for one call: the backward pass of a loss comes later, and has operations of PyTorch's own.
    """
    global _was_forked
    if not _was_forked:
        return
    _was_forked = False
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "mcl_kernels: this process was forked, so PyTorch computes with one thread from here on: those of the "
            "parent are not there, and it would wait for them forever. The start methods spawn and forkserver keep "
            "all threads, and so does torch.set_num_threads() where the parent has computed nothing",
            RuntimeWarning,
            stacklevel=2,
        )


# No part of a compiled graph, as what `logsumexp.api` marks.
use_one_thread_if_forked._dynamo_marked_constant = True  # type: ignore[attr-defined]
