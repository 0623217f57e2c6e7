"""Display of the demo in a terminal: a table of results, and a progress bar during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mcl_kernels.cli.progress import ProgressLines

if TYPE_CHECKING:
    from mcl_kernels.cli.demo_results import Row


class TerminalDisplay:
    """Prints the table row by row, and a progress bar with loss and remaining time during training.

    If standard output is not a terminal, lines of progress on standard error replace the bar.
    """

    COLUMNS = "{:<26} {:>6} {:>6} {:>14} {:>7} {:>8}"

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.print_line(self.COLUMNS.format("", "digit", "bit", "AMI with", "pseudo", ""))
        self.print_line(self.COLUMNS.format("trained", "probe", "probe", "earlier stages", "labels", "seconds"))

    def print_line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def stop(self) -> None:
        """Removes the progress bar."""
        self.progress.stop()

    def start(self, name: str, steps: int) -> None:
        self.task = self.progress.add_task(name, total=steps, loss=float("nan"))
        self.lines = ProgressLines()
        self.progress.start()

    def step(self, loss: float) -> None:
        self.progress.update(self.task, advance=1, loss=loss)
        if not self.console.is_terminal:
            (task,) = self.progress.tasks
            steps = f"step {task.completed:,.0f} of {task.total:,.0f}"
            self.lines.print_if_due(f"{task.description}: {steps}, loss {loss:.3f}")
        if self.progress.finished:
            self.progress.stop()
            self.progress.remove_task(self.task)

    def add_row(self, row: Row) -> None:
        bit = "" if row.bit_probe is None else f"{row.bit_probe:.2f}"
        ami = " ".join(f"{value:.2f}" for value in row.ami)
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        labels = str(len(row.label_sizes) or "")
        self.print_line(self.COLUMNS.format(row.name, f"{row.digit_probe:.2f}", bit, ami, labels, seconds))
