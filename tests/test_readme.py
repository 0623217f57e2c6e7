"""Every code block of the README runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_kernels.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
ON_FILES = [line for line in LINES if line.startswith(("mcl-kernels cluster", "mcl-kernels assign"))]
COMMANDS = [line for line in LINES if line not in ON_FILES]


def test_no_other_kind_of_block() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} == {"python", "bash", "text"}


def test_python_blocks(tmp_path: Path) -> None:
    """Blocks run in order in one session, as a reader pastes them."""
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_commands_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in order, on features as a reader has them."""
    monkeypatch.chdir(tmp_path)
    for stage in range(len(ON_FILES)):
        np.save(f"features-{stage}.npy", np.random.default_rng(stage).random((200, 8), dtype=np.float32))
    for command in ON_FILES:
        assert main(shlex.split(command)[1:]) == 0
    assert int(torch.load("labels-1.pt", weights_only=True).max()) + 1 > 10
    assert Path("labels-0.pt.json").exists()
    assert len(np.load("clusters-2.npy")) == 200


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path: Path) -> None:
    """`make demo` runs in its quick form; `make test`, which runs this test, only collects."""
    binaries = Path(sys.executable).parent
    if command.startswith("pip"):  # into an environment of its own, not into that of the tests
        venv.create(tmp_path / "venv", with_pip=True)
        binaries = tmp_path / "venv" / "bin"
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "DEMO_FLAGS": f"--quick --output {tmp_path}",
        "PYTEST_ADDOPTS": "--collect-only --quiet -p no:cacheprovider",
        "PIP_NO_DEPS": "1",
    }
    for name in [name for name in environment if name.startswith(("PYTEST_XDIST", "PYTEST_CURRENT", "MAKE"))]:
        del environment[name]
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_and_figures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target
