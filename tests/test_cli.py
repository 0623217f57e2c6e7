"""Output, signals, progress and exit status of the commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mcl_kernels
from mcl_kernels import KMeans
from mcl_kernels.cli import progress
from mcl_kernels.cli.main import main
from mcl_kernels.cli.streams import safe_streams
from tests.command_files import N, cluster, save_features

COMMAND = [sys.executable, "-m", "mcl_kernels"]
CLUSTER = [*COMMAND, "cluster", "f0.npy", "--clusters", "3", "--out", "y.npy"]


@pytest.fixture(autouse=True)
def _change_to_directory_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    save_features()


def run(command: list[str], redirection: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a shell with redirections; the exit status is that of the first command of a pipe."""
    quoted = " ".join(f"'{part}'" for part in command)
    script = f"{quoted} {redirection}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


REDIRECTIONS = ["| head -1", "| true", ">/dev/full", "2>/dev/full", ">&-", ">&- 2>&- <&-"]


@pytest.mark.slow
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_labels_are_written_wherever_the_output_goes(redirection: str) -> None:
    result = run(CLUSTER, redirection)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(np.load("y.npy")) == N


@pytest.mark.slow
def test_paths_that_the_terminal_cannot_print() -> None:
    name = "ä日\udcff"  # ends in a byte that is invalid in UTF-8
    Path("f0.npy").rename(f"{name}.npy")
    command = [*COMMAND, "cluster", f"{name}.npy", "--clusters", "3", "--out", f"{name}-y.npy"]
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        result = run(command, **environment)
        assert result.returncode == 0, result.stderr
        assert len(np.load(f"{name}-y.npy")) == N
        assert result.stdout.isascii()
        failed = run([*command, "--previous", f"{name}.csv"], **environment)
        assert failed.returncode == 1
        assert failed.stderr.startswith("mcl-kernels: --previous must be .npy or .pt files: got ")


@pytest.mark.slow
def test_errors_that_cannot_be_printed_keep_the_exit_status() -> None:
    for redirection in ("2>/dev/full", ">&- 2>&-"):
        assert (
            run([*COMMAND, "cluster", "missing.npy", "--clusters", "3", "--out", "y.npy"], redirection).returncode == 1
        )
        assert run([*COMMAND, "cluster"], redirection).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["info"], ["--version"], ["cluster", "--help"]], ids=" ".join)
def test_commands_that_only_print_report_a_failure_to_print(arguments: list[str]) -> None:
    closed = run([*COMMAND, *arguments], "| true")
    assert (closed.returncode, closed.stderr) in (
        (128 + signal.SIGPIPE, ""),
        (0, ""),  # printed before the pipe was closed
    )
    full = run([*COMMAND, *arguments], ">/dev/full")
    assert full.returncode == 1
    assert full.stderr == "mcl-kernels: standard output cannot be written: No space left on device\n"


def test_a_closed_pipe_gives_info_the_exit_status_of_sigpipe() -> None:
    with subprocess.Popen([*COMMAND, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


class ClosedPipe:
    """A standard stream whose reader has ended."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no descriptor")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_demo_continues_after_its_terminal_is_closed(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="the demo extra is not installed")
    from mcl_kernels.cli.demo_display import TerminalDisplay
    from mcl_kernels.cli.demo_results import Row

    monkeypatch.setattr(sys, stream, ClosedPipe())
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.0)
    with safe_streams() as out:
        display = TerminalDisplay()
        display.start("stage 0", 2)
        display.step(1.0)
        display.step(0.5)
        display.add_row(Row("stage 0: SimCLR", 0.5))
        display.stop()
    assert (out.error is not None) == (stream == "stdout")


def test_warnings_are_one_line_without_code(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("same.npy", np.ones((5, 2), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cluster("same.npy", "--clusters", 3, "--metric", "euclidean", "--out", "y.npy") == 0
    assert capsys.readouterr().err == (
        "mcl-kernels: warning: n_clusters=3 but only 1 clusters hold a row: too few rows differ\n"
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mcl-kernels {mcl_kernels.__version__}\n"


def test_an_interrupt_reports_whether_the_output_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KMeans, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy") == 130
    assert "interrupted; y.npy is unchanged" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_labels_are_written_leaves_no_temporary_files(number: signal.Signals) -> None:
    # Restores the handler of a foreground process: nohup and background shells make their children ignore signals.
    default = "default_int_handler" if number == signal.SIGINT else "SIG_DFL"
    code = f"import signal; signal.signal({int(number)}, signal.{default})\n"
    code += "import os, sys, time; from mcl_kernels.cli import main, output_files\n"
    code += "output_files.sha256_of = lambda path: (print('writing', flush=True), time.sleep(60))\n"
    code += "sys.exit(main.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *CLUSTER[3:]]
    Path("y.npy").write_bytes(b"old content")
    before = sorted(Path().iterdir())
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "writing\n":
            assert process.poll() is None
        assert len(list(Path().iterdir())) > len(before)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == "mcl-kernels: interrupted; y.npy is unchanged\n"
    assert sorted(Path().iterdir()) == before
    assert Path("y.npy").read_bytes() == b"old content"


def test_progress_is_printed_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy") == 0
    assert "iteration" not in capsys.readouterr().err  # it ends before the first line is due
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.0)
    for mini_batches in ([], ["--batch-size", "50"]):
        assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy", "--max-iter", "4", *mini_batches) == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("f0.npy: row 0 of 300, ")]
        assert [line for line in lines if line.startswith("k-means++: 2 of 3 centres, ")]
        assert [line for line in lines if line.startswith("k-means: iteration 1 of at most 4, ")]
    KMeans(3).fit(np.load("f0.npy"))
    assert capsys.readouterr().err == ""  # the library itself prints nothing


def test_progress_of_the_demo_is_printed_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich", reason="the demo extra is not installed")
    from mcl_kernels.cli.demo_display import TerminalDisplay

    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    display = TerminalDisplay()
    display.start("stage 1: MCL", 10)
    for _ in range(10):
        now += 10
        display.step(0.25)
    assert capsys.readouterr().err.splitlines() == [
        f"stage 1: MCL: step {step} of 10, loss 0.250, {10 * step} s" for step in (3, 6, 9)
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't allocate memory\nframe #0: c10::alloc"), "can't allocate memory"),
        (OSError(5, "Input/output error", "f0.npy"), "[Errno 5] Input/output error: 'f0.npy'"),
        (ValueError("two\nlines"), "two\\nlines"),
    ],
    ids=repr,
)
def test_errors_are_one_line(
    error: Any, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(KMeans, "fit", fail)
    assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy") == 1
    assert capsys.readouterr().err == f"mcl-kernels: {message}\n"
