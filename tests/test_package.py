"""What a user gets: the wheel, installed in an environment of its own, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

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
    assert any(name.endswith("licenses/LICENSE") for name in names)

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # The torch that is installed here, so that the same build serves.
    torch_version = f"torch=={torch.__version__.split('+')[0]}"
    run(python, "-m", "pip", "install", "--quiet", wheel, torch_version)
    (tmp_path / "elsewhere").mkdir()
    assert run(python, "-c", SCRIPT, cwd=tmp_path / "elsewhere") == "done\n"
    assert "blockwise" in run(tmp_path / "venv" / "bin" / "mcl-kernels", "info", cwd=tmp_path)
