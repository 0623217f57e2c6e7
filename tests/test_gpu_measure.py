"""The script that measures on a GPU, at tiny sizes on the CPU; launches without a GPU; what is carried to one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import carry, measure
from benchmarks.gpu.measure import Options, Part, run_parts
from benchmarks.gpu.session import COLUMNS, Session, SkipPartError
from benchmarks.gpu.workloads import DTYPES, LOSSES, WORKLOADS
from tests.conftest import unavailable_reason

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    unavailable_reason("triton", "cpu") is not None, reason=str(unavailable_reason("triton", "cpu"))
)


def passes(session: Session) -> None:
    session.record("value", 1.5, "us", workload="one")


def raises(session: Session) -> None:
    session.record("value", 2)
    raise ValueError("no such\nkernel")


def dies(session: Session) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(session: Session) -> None:
    session.record("process", subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def skips(session: Session) -> None:
    raise SkipPartError("the tool is not installed")


def part(name: str, limit: float = 60, needs_right_numbers: bool = True, function: str | None = None) -> Part:
    return Part(name, f"tests.test_gpu_measure:{function or name}", limit, needs_right_numbers)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def statuses(out: Path) -> dict[str, str]:
    return {row["part"]: row["status"] for row in rows(out / "parts.csv")}


def is_running(pid: int) -> bool:
    """Returns whether a process runs; one that has ended may still be listed until its parent waits for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@needs_triton
def test_the_script_runs_through_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    ended = {row["part"]: (row["status"], row["reason"]) for row in rows(tmp_path / "parts.csv")}
    assert list(ended) == [part.name for part in measure.PARTS]
    done = ("machine", "smoke", "device", "host", "tiles", "kmeans")
    assert [name for name, (status, _) in ended.items() if status == "done"] == list(done)
    assert all("needs a GPU" in reason for name, (_, reason) in ended.items() if name not in done)

    measured = rows(tmp_path / "measured.csv")
    assert tuple(measured[0]) == COLUMNS
    assert {row["part"] for row in measured} == set(done)
    assert not [row for row in measured if row["quantity"] in ("failed", "wrong", "skipped")]
    timed = {
        (row["workload"], row["dtype"], row["contender"])
        for row in measured
        if row["part"] == "device" and row["quantity"] == "device time" and float(row["value"]) > 0
    }
    losses = {workload.loss: workload.name for workload in WORKLOADS}
    assert {(name, dtype, "ours") for name in losses.values() for dtype in DTYPES} <= timed
    assert {name for name, _, contender in timed if contender == "eager"} >= {losses["queue"], losses["clip"]}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(path.parent == tmp_path for path in files)


def test_a_part_that_fails_or_hangs_ends_alone(tmp_path: Path) -> None:
    parts = [part("raises"), part("dies"), part("hangs", limit=8), part("skips"), part("passes")]
    assert not run_parts(parts, Options(tmp_path, "cpu", tiny=True, budget=100))
    assert statuses(tmp_path) == {
        "raises": "failed", "dies": "failed", "hangs": "over time", "skips": "skipped", "passes": "done",
    }  # fmt: skip
    reasons = {row["part"]: row["reason"] for row in rows(tmp_path / "parts.csv")}
    assert reasons["raises"] == "ValueError: no such kernel"
    assert reasons["skips"] == "the tool is not installed"
    assert reasons["hangs"] == "killed after 8 s"
    measured = {row["part"]: row["value"] for row in rows(tmp_path / "measured.csv")}
    assert (measured["raises"], measured["passes"]) == ("2", "1.5")
    assert not is_running(int(measured["hangs"]))
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("keep_going", [False, True])
def test_nothing_is_timed_after_wrong_numbers(tmp_path: Path, keep_going: bool) -> None:
    parts = [
        part("smoke", needs_right_numbers=False, function="raises"), part("device", function="passes"),
        part("tests", needs_right_numbers=False, function="passes"),
    ]  # fmt: skip
    assert not run_parts(parts, Options(tmp_path, "cpu", tiny=True, budget=100, keep_going=keep_going))
    assert statuses(tmp_path) == {"smoke": "failed", "device": "done" if keep_going else "skipped", "tests": "done"}


def test_parts_without_time_are_listed(tmp_path: Path) -> None:
    assert run_parts([part("hangs"), part("passes")], Options(tmp_path, "cpu", tiny=True, budget=1))
    assert statuses(tmp_path) == {"hangs": "skipped", "passes": "skipped"}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupted_measurement_keeps_its_results(tmp_path: Path) -> None:
    code = (
        "import sys; from benchmarks.gpu import measure; from tests import test_gpu_measure as here;"
        "measure.PARTS = (here.part('passes'), here.part('hangs'), here.part('raises')); sys.exit(measure.main())"
    )
    command = [sys.executable, "-c", code, "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    measured = tmp_path / "measured.csv"
    while process.poll() is None and not (measured.exists() and "hangs" in measured.read_text()):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert statuses(tmp_path) == {"passes": "done", "hangs": "interrupted"}
    value, pid = (row["value"] for row in rows(measured))
    assert value == "1.5"
    assert not is_running(int(pid))


FILL = """
import sys, torch
from triton.runtime import cache
from benchmarks.gpu.stand_in import fill_cache
from mcl_kernels import masked_logsumexp
cache.triton_key = lambda: "another build"
with fill_cache(90):
    masked_logsumexp(torch.randn(300, 64, dtype=torch.bfloat16), impl="triton")
"""
LAUNCH = """
import torch
from triton.compiler import compiler
from benchmarks.gpu import carry
from benchmarks.gpu.stand_in import capture
from mcl_kernels import masked_logsumexp
carry.use()
def refuse(*arguments, **options):
    raise AssertionError("compiles again")
x = torch.randn(300, 64, dtype=torch.bfloat16)
with capture(90) as launches:
    masked_logsumexp(x, impl="triton")
with capture(80) as others:
    masked_logsumexp(x, impl="triton")
assert {launch.target.arch for launch in launches + others} == {80, 90}
assert [launch.name for launch in launches] == [launch.name for launch in others]
(forward,) = (launch for launch in launches if launch.name == "forward_kernel")
assert all(size > 0 for size in forward.grid)
compiler.ASTSource.make_ir = refuse
print(len(launches), all(launch.compile().asm["cubin"] for launch in launches))
others[0].compile()
"""


@needs_triton
def test_carried_kernels_are_found_in_another_place(tmp_path: Path) -> None:
    """By a process whose build of Triton has another key, and after the folder has moved."""
    made, moved = tmp_path / "made", tmp_path / "moved"
    (made / "triton").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(made / "triton"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FILL], cwd=ROOT, env=environment, check=True)
    import triton

    (made / "manifest.json").write_text(json.dumps({"triton": triton.__version__, "key": "another build"}))
    shutil.move(made, moved)
    environment |= carry.install(moved)
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    count, found = result.stdout.split()
    assert int(count) >= 1
    assert found == "True"
    assert result.stderr.splitlines()[-1] == "AssertionError: compiles again"  # those of another architecture


def test_without_a_carried_folder_kernels_are_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert carry.install(tmp_path) == {}
    assert "nothing is carried" in capsys.readouterr().out


def test_each_loss_has_a_workload_and_both_contenders_agree() -> None:
    assert {workload.loss for workload in WORKLOADS} == set(LOSSES)
    for workload in {workload.loss: workload.tiny() for workload in WORKLOADS}.values():
        batch = workload.batch(torch.float32, torch.device("cpu"))
        own, dense = LOSSES[workload.loss]
        expected = dense(*batch.leaves, *batch.fixed)
        torch.testing.assert_close(own(*batch.leaves, *batch.fixed, impl="reference"), expected)
