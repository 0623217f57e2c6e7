"""The pages of the documentation, README included: their blocks of code, and a session that runs those in Python."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MODULES = {path.stem for path in (ROOT / "mcl_kernels" / "integrations").glob("[a-z]*.py")}
HOSTS = MODULES | {"accelerate", "datasets", "lightning", "torchdata"}

# Runs the blocks of a page one after the other, as a reader pastes them. Each has to cause the warnings of this library
# that it announces by comments, `# warns: few negatives`, and no others.
SESSION = """
import linecache, sys, warnings
import mcl_kernels
from tests.pages import announced_warnings, blocks

page = sys.argv[1]
for number, block in enumerate(blocks(page, "python"), 1):
    name = f"{page}, block {number} in Python"
    linecache.cache[name] = len(block), None, block.splitlines(keepends=True), name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(block, name, "exec"), globals())
    announced = announced_warnings(block)
    for warning in caught:
        ours = "mcl_kernels" in warning.filename or warning.filename == name
        if ours and issubclass(warning.category, UserWarning):
            found = [text for text in announced if text in str(warning.message)]
            assert found, f"{name}: {warning.message}"
            announced.remove(found[0])
    assert not announced, f"{name} does not warn: {announced}"
"""


class Block(NamedTuple):
    language: str
    code: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def all_blocks(page: str) -> list[Block]:
    return [Block(language, textwrap.dedent(code)) for _, language, code in BLOCK.findall(text_of(page))]


def blocks(page: str, *languages: str) -> list[str]:
    return [block.code for block in all_blocks(page) if block.language in languages]


def announced_warnings(block: str) -> list[str]:
    return re.findall(r"# warns: (.+)", block)


def hosts_of(page: str) -> set[str]:
    """Host libraries that the blocks of a page import, by themselves or through an integration."""
    found = set()
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            parts = [name.removeprefix("mcl_kernels.integrations.").split(".")[0] for name in modules]
            found |= HOSTS.intersection(parts)
    return found


def run_python_blocks(page: str, directory: Path) -> None:
    """Runs the blocks in a new process in `directory`; skips the page if a host library is missing."""
    for host in sorted(hosts_of(page)):
        pytest.importorskip(host)
    script = f"import sys; sys.path.append({str(ROOT)!r})\n{SESSION}"
    command = [sys.executable, "-c", script, page]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
