"""Every code block of the README runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]


def test_no_other_kind_of_block() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} == {"python", "bash", "text"}


def test_python_blocks(tmp_path: Path) -> None:
    """One after the other, as a reader who pastes them into one session."""
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path: Path) -> None:
    """`make demo` in its quick form; `make test` collects only, since it is what runs this test."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DEMO_FLAGS": f"--quick --output {tmp_path}",
        "PYTEST_ADDOPTS": "--collect-only --quiet -p no:cacheprovider",
        # `pip install .` into a folder of its own, not over the environment of the tests.
        "PIP_TARGET": str(tmp_path / "installed"),
        "PIP_NO_DEPS": "1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_and_figures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target
