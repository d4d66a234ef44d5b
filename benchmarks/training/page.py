"""The part of docs/benchmarks.md about training steps, from the results on file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from harness.record import Record, Row, device_slug

from .contexts import largest
from .convergence import BENCHMARK as CONVERGENCE
from .convergence import TITLES, draw, verdicts
from .headline import CONTEXTS, STEPS
from .plots import draw_record, name_of
from .runs import RUNS

__all__ = ["BENCHMARKS", "section"]

BENCHMARKS = (STEPS, CONTEXTS, CONVERGENCE)
WINDOW = 25

Table = Callable[[Sequence[str], str, Iterable[Sequence[str]]], str]

ABOUT = """\
Whole optimizer steps with random weights and tokens, in bf16 with AdamW (fused, its state in bf16), each provider in a
process of its own: the median of 20 steps after 5, with the band from 20 to 80 % of the steps, and the most memory that
was allocated during them. Rates and memory are also given over those of the first line. Memory over a step's time is
traced in a process in which every kernel is waited for; the shares are those of one profiled step.
"""
CONTEXTS_ABOUT = """\
The length of the sequences is doubled until they don't fit, and bisected to a sixteenth.
"""
CONVERGENCE_ABOUT = """\
Training on real text, three seeds of the stock trainer and one run each of the others from the first of these seeds;
curves smoothed over {window} steps. Distances are in widths of the band between the stock trainer's seeds: how far a
curve leaves the band at the most (median width), and how far it is from the stock run of its own seed on average (mean
width). A run passes with at most 0.1 and 0.25.
"""


def bold(provider: str) -> str:
    name = name_of(provider)
    return f"**{name}**" if provider.startswith("ours") else name


def images(plots: Iterable[Path], page: Path) -> list[str]:
    return [f"![{plot.stem.replace('_', ' ')}]({os.path.relpath(plot, page.parent)})\n" for plot in plots]


def over(value: float, first: float | None) -> str:
    return "" if first is None else f" ({value / first:.2f} ×)"


def step_lines(rows: Sequence[Row]) -> list[list[str]]:
    good = [row for row in rows if row["error"] is None]
    speed, peak = (good[0]["tokens_per_second"], good[0]["peak_bytes"]) if good else (None, None)
    lines = []
    for row in rows:
        name = bold(row["provider"])
        if row["error"] is not None:
            lines.append([name, "", "", "", "", row["error"].replace("|", "\\|")])
            continue
        p20, median, p80 = row["step_ms"]
        lines.append([
            name,
            f"{row['tokens_per_second']:,.0f}{over(row['tokens_per_second'], speed)}",
            f"{row['peak_bytes'] / 1e9:.1f}{over(row['peak_bytes'], peak)}",
            f"{median:,.1f} ({p20:,.1f}–{p80:,.1f})",
            f"{row['first_loss']:.3f}, {row['last_loss']:.3f}",
            "",
        ])  # fmt: skip
    return lines


def steps(record: Record, plots: dict[str, list[Path]], page: Path, table: Table) -> list[str]:
    parts = ["### Training steps\n", ABOUT]
    columns = ("provider", "tokens per second", "peak GB", "step ms", "first and last loss", "note")
    for run in (name for name in RUNS if any(row["shape"]["run"] == name for row in record.rows)):
        rows = [row for row in record.rows if row["shape"]["run"] == run]
        parts += [
            f"**{RUNS[run].title}**\n",
            table(columns, "lrrrrl", step_lines(rows)),
            *images(plots.get(run, ()), page),
        ]
    return parts


def contexts(record: Record, plots: dict[str, list[Path]], page: Path, table: Table) -> list[str]:
    parts = ["### The largest context\n", CONTEXTS_ABOUT]
    for run in dict.fromkeys(row["shape"]["run"] for row in record.rows):
        lines = []
        first = None
        of_run = [row for row in record.rows if row["shape"]["run"] == run]
        for provider in dict.fromkeys(row["provider"] for row in of_run):
            rows = [row for row in of_run if row["provider"] == provider]
            good, bad = largest(rows)
            first = first or good or None
            note = next((row["error"] for row in rows if row["error"] not in (None, "out of memory")), "")
            bound = "not reached" if bad is None else f"{bad:,}"
            lines.append([bold(provider), f"{good:,}{over(good, first)}", bound, note])
        columns = ("provider", "largest that fits", "shortest that doesn't", "note")
        parts += [f"**{RUNS[run].title}**\n", table(columns, "lrrl", lines), *images(plots.get(run, ()), page)]
    return parts


def convergence(record: Record, results: Path, page: Path, table: Table) -> list[str]:
    parts = ["### Convergence\n", CONVERGENCE_ABOUT.format(window=WINDOW)]
    lines, plots = [], []
    for task, title in TITLES.items():
        rows = [row for row in record.rows if row["shape"]["task"] == task]
        for provider, curve, verdict in verdicts(rows, WINDOW):
            word = "passes" if verdict.passed else "fails"
            lines.append([title, curve, bold(provider), f"{verdict.excess:.3f}", f"{verdict.drift:.3f}", word])
        plots.append(draw(record, task, WINDOW, results / f"{CONVERGENCE}_{task}_{device_slug(record.device)}.png"))
    columns = ("task", "curve", "provider", "outside of the band", "from the same seed", "")
    return [*parts, table(columns, "lllrrl", lines), *images((plot for plot in plots if plot), page)]


def section(records: dict[str, Record], results: Path, page: Path, table: Table) -> str:
    """Tables and plots of the training benchmarks that a device has results of; the plots are drawn beside them.

    Args:
        records: by the benchmark's name; those of other benchmarks don't matter.
        results: folder of the plots.
        page: the page, to which the images' paths are relative.
        table: writes a table: columns, their alignment as ``l`` and ``r``, rows.
    """
    parts: list[str] = []
    if STEPS in records:
        parts += steps(records[STEPS], draw_record(records[STEPS], results), page, table)
    if CONTEXTS in records:
        parts += contexts(records[CONTEXTS], draw_record(records[CONTEXTS], results), page, table)
    if CONVERGENCE in records:
        parts += convergence(records[CONVERGENCE], results, page, table)
    return "\n".join(parts)
