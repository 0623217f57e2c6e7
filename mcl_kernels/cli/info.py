"""`mcl-kernels info`: the implementations available here, versions and devices."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import mcl_kernels
from mcl_kernels.backends.cuda import no_device

OPTIONAL_PACKAGES = ("triton", "faiss-cpu", "safetensors", "scikit-learn", "matplotlib", "rich", "jinja2", "mlxtend")


def run() -> None:
    """Prints versions, devices, implementations and optional packages."""
    print(f"mcl_kernels {mcl_kernels.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    print(f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    if missing := no_device():
        print(f"cuda: {missing}")
    for name, entry in mcl_kernels.capabilities().items():
        available = "yes" if entry["available"] else "no"
        print(f"impl {name:<10} {available:<4} {entry['reason']}")
    for package in OPTIONAL_PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<15} {version}")
