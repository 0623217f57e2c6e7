"""For the examples in docstrings, which assume `import torch` and the names of their module."""

import pytest
import torch

# Looking for examples imports every module, and these are the language of Triton 3.4.
try:
    import triton.knobs  # noqa: F401
except ImportError:
    collect_ignore_glob = ["mcl_kernels/logsumexp/triton_*.py"]


@pytest.fixture(autouse=True)
def _torch_in_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
