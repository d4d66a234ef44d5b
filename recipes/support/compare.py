"""The same run in several variants, each in processes of its own, shown side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from .measure import RunReport


def run_variant(name: str, script: Path, arguments: Sequence[str], report: Path, number: int) -> RunReport | None:
    """Run `script` again in a fresh process and read the report that it writes.

    In a distributed launch every process starts one of its own, and the new ones meet on a port of their own.

    Args:
        name: what to call it on the terminal.
        script: a recipe.
        arguments: its command line.
        report: the file to which it writes its report. Written by the main process only.
        number: which variant this is, from 0; it decides the port.

    Returns:
        The report, or ``None`` where the run failed or this is not the main process.
    """
    report.unlink(missing_ok=True)
    environment = dict(os.environ)
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + 1 + number)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    if is_main_process():
        print(f"\n── {name} ──", flush=True)
    code = subprocess.run([sys.executable, str(script), *arguments], env=environment, check=False).returncode
    return RunReport.load(report) if code == 0 and is_main_process() and report.is_file() else None


def is_main_process() -> bool:
    """Whether this process is the first of its launch, known before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def side_by_side(reports: Mapping[str, RunReport | None]) -> Table:
    """A table with a column for each variant, and one with the first in proportion to the last."""
    runs = list(reports.values())
    first, last = runs[0], runs[-1]
    both = len(runs) > 1 and first is not None and last is not None
    table = Table()
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    if both:
        table.add_column("ratio", justify="right")

    def row(label: str, template: str, name: str, scale: float = 1.0, ratio: bool = False) -> None:
        values = [None if run is None else getattr(run, name) for run in runs]
        cells = ["failed" if value is None else template.format(value * scale) for value in values]
        last_column = [f"{values[0] / values[-1]:.2f}x" if ratio else ""] if both else []
        table.add_row(label, *cells, *last_column)

    row("held-out loss before", "{:.4f}", "heldout_before")
    row("held-out loss after", "{:.4f}", "heldout_after")
    table.add_row("optimizer steps", *["failed" if run is None else str(len(run.steps)) for run in runs], *[""] * both)
    row("tokens per second", "{:,.0f}", "tokens_per_second", ratio=True)
    row("peak memory (GiB)", "{:.2f}", "peak_bytes", scale=2**-30, ratio=True)
    return table


def largest_difference(a: RunReport, b: RunReport) -> float:
    """The largest relative difference between two runs' training losses at the steps that both made."""
    return max((abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=False)), default=0.0)


def plot_losses(reports: Mapping[str, RunReport | None], path: Path) -> None:
    """Draw the training losses of every variant over one another, with the held-out loss before and after, as PNG."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = [{"linewidth": 4.0, "alpha": 0.35}, {"linewidth": 1.3, "linestyle": "--", "color": "black"}]
    for index, (name, run) in enumerate(reports.items()):
        if run is None or not run.steps:
            continue
        style = styles[index] if len(reports) > 1 else {"linewidth": 1.8}
        (line,) = axes.plot(run.steps, run.losses, label=f"{name}: training", **style)
        if index == 0:
            ends = [run.steps[0] - 1, run.steps[-1]]
            axes.plot(ends, [run.heldout_before, run.heldout_after], "o", color=line.get_color(), label="held out")
            axes.set_title(run.title, fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per labelled token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(reports: Mapping[str, RunReport | None], plot: Path, model: Path | None) -> None:
    """Print the table, the largest difference between the curves, and where plot and model are."""
    plot_losses(reports, plot)
    console = Console()
    run = next(run for run in reports.values() if run is not None)
    processes = f"{run.processes} process{'es' * (run.processes > 1)}"
    console.print(f"\n{run.title} · {run.device} · {processes}", soft_wrap=True, highlight=False)
    console.print(side_by_side(reports))
    runs = [run for run in reports.values() if run is not None]
    if len(runs) > 1:
        steps = min(len(run.steps) for run in runs)
        console.print(
            f"Training losses agree within {largest_difference(runs[0], runs[-1]):.1e} (relative) at all {steps} steps."
        )
    console.print(f"Loss curve: {plot}", soft_wrap=True, highlight=False)
    if model is not None:
        console.print(f"Model: {model}", soft_wrap=True, highlight=False)
