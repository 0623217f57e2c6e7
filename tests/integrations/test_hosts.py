"""Version checks and import paths of the integrations."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mcl_kernels.integrations import _host
from tests.pages import PAGES, text_of


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


SWAPS = re.findall(
    r"\| `(from \S+ import (\w+))`.*? \| `(from (mcl_kernels\.integrations\.\S+) import (\w+))` \|",
    "".join(map(text_of, PAGES)),
)


def test_the_pages_list_every_host() -> None:
    files = {path.stem for path in (Path(_host.__file__).parent).glob("[!_]*.py")}
    assert {module.rpartition(".")[2] for _, _, _, module, _ in SWAPS} == files


@pytest.mark.parametrize(("before", "theirs", "after", "module", "ours"), SWAPS)
def test_swapped_imports(before: str, theirs: str, after: str, module: str, ours: str) -> None:
    """The imported class is a subclass of the host's, with the same name."""
    pytest.importorskip(before.split()[1].split(".")[0])
    names: dict[str, type] = {}
    exec(before, names)
    host = names[theirs]
    exec(after, names)
    assert theirs == ours
    assert issubclass(names[ours], host)
    assert names[ours] is not host
