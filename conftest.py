"""For the examples in docstrings, which assume `import torch` and the names of their module."""

from importlib.util import find_spec

import pytest
import torch

# Looking for examples imports every module, and these are Triton's language.
collect_ignore_glob = [] if find_spec("triton") else ["mcl_kernels/logsumexp/triton_*.py"]


@pytest.fixture(autouse=True)
def _torch_in_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
