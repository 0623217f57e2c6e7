"""What a user gets: the wheel, installed in an environment of its own, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from mcl_kernels import _native

ROOT = Path(__file__).parents[1]
SCRIPT = """
import importlib.util, pathlib, torch
import mcl_kernels
from mcl_kernels import ClusterBatchSampler, KMeans, MultistageRunner, masked_info_nce, nt_xent

assert "site-packages" in mcl_kernels.__file__, mcl_kernels.__file__
assert pathlib.Path(mcl_kernels.__file__).with_name("py.typed").exists()
assert pathlib.Path(mcl_kernels.__file__).with_name("report.html.jinja").exists()
assert importlib.util.find_spec("tests") is None and importlib.util.find_spec("benchmarks") is None

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


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("mcl_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if not name.startswith(("mcl_kernels/", "mcl_kernels-"))]
    assert wheel.name.endswith("-py3-none-any.whl")
    sources = {f"mcl_kernels/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").glob("*/*")}
    assert sources <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    assert any(name.endswith("licenses/LICENSE") for name in names)

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # The torch that is installed here, so that the same build serves.
    torch_version = f"torch=={torch.__version__.split('+')[0]}"
    run(python, "-m", "pip", "install", "--quiet", wheel, torch_version)
    (tmp_path / "elsewhere").mkdir()
    assert run(python, "-c", SCRIPT, cwd=tmp_path / "elsewhere") == "done\n"
    assert "blockwise" in run(tmp_path / "venv" / "bin" / "mcl-kernels", "info", cwd=tmp_path)


@pytest.mark.slow
def test_built_at_install_where_torch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without build isolation the library is in the package, and nothing is built on first use."""
    if not _native.describe()[0]:
        pytest.skip(_native.describe()[1])
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    # What an earlier build of other sources left behind would make the library that of nobody's sources.
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
