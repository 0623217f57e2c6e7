"""For all tests, those of examples in docstrings included: they assume `import torch` and the names of their module."""

import importlib.metadata
import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "0.0"
if tuple(map(int, TRITON.split(".")[:2])) < (3, 4):
    # Looking for examples imports every module, and these are the language of Triton 3.4.
    collect_ignore_glob = ["mcl_kernels/backends/triton_device.py", "mcl_kernels/*/triton/*.py"]
elif not torch.cuda.is_available():
    # Without a GPU the Triton kernels are interpreted, which is read when Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product_of_numpy = InterpreterBuilder.create_dot

    def rounded_once(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        """A tile's product as a tensor core's: the same bits wherever its operands lie.

        Interpreted it is NumPy's, in fp32 by a BLAS that may sum rows and transposed rows in other orders. Forward and
        backward then disagree on a logit by more than its exponential forgives.
        """
        if d.data.dtype != np.float32:
            return product_of_numpy(self, a, b, d, *options)
        summed = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32) + d.data
        return TensorHandle(summed, d.dtype.scalar)

    InterpreterBuilder.create_dot = rounded_once


@pytest.fixture(autouse=True)
def _torch_in_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
