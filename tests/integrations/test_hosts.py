"""Version checks and import paths of the integrations."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mcl_kernels.integrations import _host
from tests.pages import text_of


@pytest.mark.parametrize(
    ("found", "minimum", "recent_enough"),
    [
        ("1.5.0", "1.5", True),
        ("1.10", "1.5", True),
        ("2.0.0.dev1", "1.5", True),
        ("1.4.22", "1.5", False),
        ("0.9", "1.5", False),
    ],
)
def test_an_old_host_is_named(monkeypatch: pytest.MonkeyPatch, found: str, minimum: str, recent_enough: bool) -> None:
    monkeypatch.setattr(_host, "version", lambda name: found)
    if recent_enough:
        _host.require("lightly", minimum)
    else:
        with pytest.raises(
            ImportError, match=f"needs lightly >= 1.5: found {found} .pip install 'mcl-kernels.lightly.'"
        ):
            _host.require("lightly", minimum)


@pytest.mark.parametrize(
    "host", ["lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers", "transformers"]
)
def test_a_missing_host_is_named(host: str) -> None:
    """The version is checked before the imports, which would fail with an old version too."""
    code = f"""
import importlib.metadata, sys
def version(name, original=importlib.metadata.version):
    if name.replace("-", "_").startswith("{host}"):
        raise importlib.metadata.PackageNotFoundError(name)
    return original(name)
importlib.metadata.version = version
sys.modules["{host}"] = None
import mcl_kernels.integrations.{host}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: this integration needs" in result.stderr, result.stderr
    assert "found none (pip install" in result.stderr


def test_importing_the_library_loads_no_host() -> None:
    code = """
import sys, mcl_kernels, mcl_kernels.integrations
hosts = {"lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers", "transformers"}
assert not hosts & set(sys.modules), hosts & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


PAGE = text_of("docs/integrations.md")
LISTED = [  # rows of the table of hosts: "lightly.NTXentLoss", "DCLLoss", ...
    (names.split(".")[0], name)
    for names in re.findall(r"^\| [^|]+ \| `pip install [^|]+` \| `([^|]+)` \|$", PAGE, re.MULTILINE)
    for name in names.partition(".")[2].split("`, `")
]
SWAPS = re.findall(
    r"^-(from (\w+)\S* import (\w+))\n\+(from mcl_kernels\.integrations\.\w+ import \w+)$", PAGE, re.MULTILINE
)


def test_the_page_lists_every_class() -> None:
    classes = set()
    for path in Path(_host.__file__).parent.glob("[!_]*.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        classes |= {(path.stem, node.name) for node in nodes if isinstance(node, ast.ClassDef) and node.name[0] != "_"}
    assert set(LISTED) == classes
    assert SWAPS


@pytest.mark.parametrize(("module", "name"), LISTED)
def test_each_class_is_a_subclass_of_the_one_it_replaces(module: str, name: str) -> None:
    pytest.importorskip(module)
    ours = getattr(importlib.import_module(f"mcl_kernels.integrations.{module}"), name)
    assert name in [host.__name__ for host in ours.__mro__[1:] if not host.__module__.startswith("mcl_kernels")]


@pytest.mark.parametrize(("before", "host", "name", "after"), SWAPS)
def test_swapped_imports(before: str, host: str, name: str, after: str) -> None:
    pytest.importorskip(host)
    theirs: dict[str, type] = {}
    ours: dict[str, type] = {}
    exec(before, theirs)
    exec(after, ours)
    assert issubclass(ours[name], theirs[name])
    assert ours[name] is not theirs[name]
