"""The package that users install: the wheel, in an environment of its own, away from the checkout."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mcl_kernels.backends import native

ROOT = Path(__file__).parents[1]
SCRIPT = """
import importlib.util, pathlib, torch
import mcl_kernels
from mcl_kernels import ClusterBatchSampler, KMeans, MultistageRunner, masked_info_nce, nt_xent

assert "site-packages" in mcl_kernels.__file__, mcl_kernels.__file__
assert pathlib.Path(mcl_kernels.__file__).with_name("py.typed").exists()
assert (pathlib.Path(mcl_kernels.__file__).parent / "cli" / "report.html.jinja").exists()
assert all(importlib.util.find_spec(name) is None for name in ("tests", "benchmarks", "experiments"))

x = torch.randn(32, 8)
runner = MultistageRunner(32, n_stages=2, n_clusters=2, directory="run")
for stage in runner:
    model = torch.nn.Linear(8, 8)
    for batch in stage.batch_sampler(8, clusters_per_batch=2):
        loss = nt_xent(model(x[batch]), model(x[batch] + 0.1), stage.labels[batch])
        loss.backward()
        assert model.weight.grad.isfinite().all()
    stage.finish(model(x).detach(), state=model.state_dict())
assert len(MultistageRunner(32, n_stages=2, n_clusters=2, directory="run").finished) == 2
print("done")
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# Without torch nothing is compiled.
BUILD = """
import sys
sys.modules["torch"] = None
import setuptools.build_meta as backend
getattr(backend, sys.argv[1])(sys.argv[2])
"""


class Distributions(NamedTuple):
    wheel: zipfile.ZipFile
    sources: Path  # the source distribution, unpacked
    wheel_of_sources: zipfile.ZipFile


def copy_of_checkout(to: Path) -> Path:
    return shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(".?*", "build", "dist", "*.egg-info", "runs"))


def build(kind: str, tree: Path, into: Path) -> Path:
    into.mkdir()
    run(sys.executable, "-c", BUILD, f"build_{kind}", into, cwd=tree)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Distributions of a checkout in which an earlier build has left a module that no longer exists."""
    directory = tmp_path_factory.mktemp("distributions")
    tree = copy_of_checkout(directory / "tree")
    for stale in ("ghost.py", "ghosts/__init__.py", "csrc/cpu/ghost.h", "lib/ghost.so"):
        path = tree / "build" / "lib" / "mcl_kernels" / stale
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    with tarfile.open(build("sdist", tree, directory / "sdist")) as archive:
        archive.extractall(directory, filter="data")
    (sources,) = directory.glob("mcl[_-]kernels-*")  # old setuptools has the hyphen
    wheels = [build("wheel", root, directory / f"wheel of {root.name}") for root in (tree, sources)]
    return Distributions(zipfile.ZipFile(wheels[0]), sources, zipfile.ZipFile(wheels[1]))


@pytest.mark.slow
def test_a_checkout_is_not_built_into_itself(tmp_path: Path) -> None:
    tree = copy_of_checkout(tmp_path / "tree")
    command = [sys.executable, "setup.py", "build_py", "--build-lib", "."]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tree)
    assert result.returncode != 0
    assert "name another --build-lib" in result.stderr
    assert (tree / "mcl_kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_files_of_an_earlier_build_are_not_in_the_wheel(distributions: Distributions) -> None:
    assert not [name for name in distributions.wheel.namelist() if "ghost" in name]


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_is_that_of_the_checkout(distributions: Distributions) -> None:
    wheel, other = distributions.wheel, distributions.wheel_of_sources
    assert sorted(wheel.namelist()) == sorted(other.namelist())
    for name in wheel.namelist():
        assert name.endswith("RECORD") or wheel.read(name) == other.read(name), name


@pytest.mark.slow
def test_the_tests_of_the_source_distribution_run(distributions: Distributions) -> None:
    """All tests are found, except those that need a host library, and quick ones pass."""
    pytest_there = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    quick = ("-k", "test_accuracy.py or test_errors.py")
    run(*pytest_there, "--ignore", "tests/integrations", *quick, cwd=distributions.sources)
    for name in ("Makefile", "CHANGELOG.md", "constraints.txt", "constraints-oldest.txt", "constraints-bench.txt"):
        assert (distributions.sources / name).is_file()
    every = {path.relative_to(ROOT) for path in ROOT.glob("tests/**/*.*") if "__pycache__" not in path.parts}
    assert every <= {path.relative_to(distributions.sources) for path in distributions.sources.rglob("*")}
    made = {"build", "__pycache__"}  # by the wheel, and by these tests
    files = [x for x in distributions.sources.rglob("*") if x.is_file() and not made & set(x.parts)]
    assert sum(path.stat().st_size for path in files) < 5_000_000


@pytest.mark.slow
def test_each_integration_has_an_extra_and_integrations_is_all_of_them(distributions: Distributions) -> None:
    (name,) = (name for name in distributions.wheel.namelist() if name.endswith("METADATA"))
    required: dict[str, set[str]] = {}
    for line in email.message_from_bytes(distributions.wheel.read(name)).get_all("Requires-Dist", []):
        if match := re.fullmatch(r"([^;]+?) ?; extra == .([\w-]+).", line):
            required.setdefault(match[2], set()).add(match[1].replace(" ", ""))
    for path in (ROOT / "mcl_kernels" / "integrations").glob("[a-z]*.py"):
        distribution, minimum = re.search(r'^require\("([^"]+)", "([^"]+)"', path.read_text(), re.MULTILINE).groups()
        assert required[path.stem.replace("_", "-")] == {f"{distribution}>={minimum}"}
    (every,) = required["integrations"]
    hosts = re.fullmatch(r"mcl-kernels\[([\w,-]+)\]", every)[1].split(",")
    assert set(hosts) >= {path.stem.replace("_", "-") for path in (ROOT / "mcl_kernels/integrations").glob("[a-z]*.py")}
    assert all(len(required[host]) == 1 for host in hosts)


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package works without the checkout, and builds the library on first use."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("mcl_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if not name.startswith(("mcl_kernels/", "mcl_kernels-"))]
    assert wheel.name.endswith("-py3-none-any.whl")
    sources = {f"mcl_kernels/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    assert any(name.endswith("licenses/LICENSE") for name in names)

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Installs the torch of this environment, whose build then fits.
    torch_version = f"torch=={torch.__version__.split('+')[0]}"
    run(python, "-m", "pip", "install", "--quiet", wheel, torch_version)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(python, "-c", SCRIPT, cwd=tmp_path / "elsewhere") == "done\n"
    shown = run(tmp_path / "venv" / "bin" / "mcl-kernels", "info", cwd=tmp_path)
    assert re.search(r"^impl blockwise +yes", shown, re.MULTILINE)
    if native.describe()[0]:
        assert re.search(r"^impl native +yes", shown, re.MULTILINE)
        assert len(list((tmp_path / "cache" / "mcl_kernels").glob("*.so"))) == 1


@pytest.mark.slow
def test_an_installation_with_torch_builds_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without build isolation the library is in the package, and nothing is built on first use."""
    if not native.describe()[0]:
        pytest.skip(native.describe()[1])
    copy_of_checkout(tmp_path / "checkout")
    # Headers of an earlier build must not be compiled into the library.
    built = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = tmp_path / "checkout" / "build" / built / "mcl_kernels" / "csrc" / "cpu" / "removed.h"
    stale.parent.mkdir(parents=True)
    stale.write_text("// of an earlier version")
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
        tmp_path / "site", tmp_path / "checkout",
    )  # fmt: skip
    (library,) = (tmp_path / "site" / "mcl_kernels" / "lib").iterdir()
    assert library.suffix == ".so"
    code = "import sys; sys.path.insert(0, sys.argv[1] + '/site'); import torch, mcl_kernels\n"
    code += "assert mcl_kernels.__file__.startswith(sys.argv[1]), mcl_kernels.__file__\n"
    code += "mcl_kernels.masked_logsumexp(torch.eye(3), impl='native')"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(sys.executable, "-c", code, tmp_path, cwd=tmp_path)
    assert not (tmp_path / "cache").exists()
