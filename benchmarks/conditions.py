"""Conditions of a measurement: versions, processor and commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PACKAGES = ("torch", "triton", "lightly", "pytorch-metric-learning", "inf-cl", "memeff")


def conditions(device: torch.device) -> dict[str, str]:
    """Returns installed versions, the name of the processor that computes, and the commit of this checkout.

    The commit ends in "+changes" if files of the library differ from it.
    """
    versions = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", "mcl_kernels", "csrc", "setup.py")
    return {
        "versions": "; ".join(versions),
        "processor": processor,
        "commit": commit + ("+changes" if changed else ""),
    }


def _cpu_model() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return models[0].split(":")[1].strip() if models else platform.processor()


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    return result.stdout.strip()
