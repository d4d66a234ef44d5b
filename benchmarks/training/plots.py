"""Plots of the headline's results. Importing this needs no matplotlib, drawing does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.plots import COLOURS, dress, save
from harness.record import Record, Row, device_slug

from .contexts import largest
from .providers import Provider
from .runs import RUNS
from .step_trace import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_all", "draw_contexts", "draw_memory", "draw_shares", "draw_steps", "name_of"]

NAMES = {
    "hf": "Hugging Face",
    "hf-compile": "torch.compile",
    "liger-kernel": "Liger-Kernel",
    "trl": "TRL",
    "ours": "liger_trainer",
    "ours-compile": "liger_trainer, compiled",
}
FAMILY = {"hf-compile": "compile", "liger-kernel": "liger", "ours-compile": "ours"}
KIND_COLOURS = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#BBBBBB", "#EEEEEE"), strict=True))
PHASE_SHADES = {"forward": "#FFFFFF", "backward": "#F0F0F0", "optimizer": "#E0E0E0"}


def name_of(provider: str) -> str:
    """What tables and plots call a provider."""
    parsed = Provider.parse(provider)
    return ", ".join([NAMES[parsed.kind], *(f"{name}={value}" for name, value in parsed.options.items())])


def colour_of(provider: str) -> str:
    kind = Provider.parse(provider).kind
    return COLOURS[FAMILY.get(kind, kind)]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def of_run(record: Record, run: str) -> list[Row]:
    """The rows of a run that have figures."""
    return [row for row in record.rows if row["shape"]["run"] == run and row["error"] is None]


def unit_of(most_bytes: float) -> tuple[float, str]:
    return (1e9, "GB") if most_bytes >= 1e9 else (1e6, "MB")


def title_of(record: Record, run: str, row: Row | None = None) -> str:
    """The run's title, and the row's batch and length where they aren't those of the title, as in a dry run."""
    size = ""
    if row is not None and (row["shape"]["batch"], row["shape"]["length"]) != (RUNS[run].batch, RUNS[run].length):
        size = f" (here {row['shape']['batch']} × {row['shape']['length']})"
    return f"{RUNS[run].title}{size}, bf16, {record.device}"


def bars(axis: Axes, rows: Sequence[Row], values: Sequence[float], label: str, form: str) -> None:
    from matplotlib.ticker import MaxNLocator

    names = [name_of(row["provider"]).replace(", ", ",\n", 1) for row in rows]
    drawn = axis.barh(names, values, color=[colour_of(row["provider"]) for row in rows])
    axis.bar_label(drawn, labels=[form.format(value) for value in values], padding=3)
    axis.set_xlabel(label)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.spines[["top", "right"]].set_visible(False)


def draw_steps(record: Record, run: str, path: Path) -> Path | None:
    """Tokens per second and peak memory, a bar a provider."""
    rows = of_run(record, run)
    if not rows:
        return None
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 1.1 + 0.36 * len(rows)), layout="constrained", sharey=True)
    bars(axes[0], rows, [row["tokens_per_second"] for row in rows], "tokens per second", "{:,.0f}")
    unit, name = unit_of(max(row["peak_bytes"] for row in rows))
    bars(axes[1], rows, [row["peak_bytes"] / unit for row in rows], f"peak memory ({name})", "{:.1f}")
    figure.axes[0].yaxis.set_inverted(True)  # shared: inverting it twice would undo it
    figure.suptitle(title_of(record, run, rows[0]), fontsize=10)
    return save(figure, path)


def draw_memory(record: Record, run: str, path: Path) -> Path | None:
    """Memory over the time of one step, a panel a provider, on one scale."""
    rows = [row for row in of_run(record, run) if row.get("memory")]
    rows = [row for row in rows if not Provider.parse(row["provider"]).compiled]
    if not rows:
        return None
    unit, name = unit_of(max(row["memory"]["peak_bytes"] for row in rows))
    figure, axes = pyplot().subplots(
        1, len(rows), figsize=(2.1 + 2.3 * len(rows), 3), layout="constrained", sharey=True, squeeze=False
    )
    for axis, row in zip(axes[0], rows, strict=True):
        memory = row["memory"]
        for phase, (begin, end) in memory["phases"].items():
            axis.axvspan(begin, end, color=PHASE_SHADES[phase], zorder=0)
            if end - begin > 0.15 * memory["ms"]:
                axis.annotate(
                    phase,
                    ((begin + end) / 2, 0.02),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    fontsize=8,
                    color="0.45",
                )
        times = [(i + 0.5) * memory["ms"] / len(memory["mb"]) for i in range(len(memory["mb"]))]
        values = [each * 1e6 / unit for each in memory["mb"]]
        axis.fill_between(times, values, color=colour_of(row["provider"]), alpha=0.25, linewidth=0)
        axis.plot(times, values, color=colour_of(row["provider"]), linewidth=1.4)
        peak = memory["peak_bytes"] / unit
        axis.axhline(peak, color="0.3", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"{peak:.1f} {name}",
            (memory["ms"], peak),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        axis.set_title(name_of(row["provider"]).replace(", ", ",\n"), fontsize=10)
        axis.set_xlim(0, memory["ms"])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"memory allocated ({name})")
    axes[0][0].set_ylim(0, 1.12 * max(row["memory"]["peak_bytes"] for row in rows) / unit)
    figure.supxlabel("time within a step, ms (each kernel waited for)", fontsize=9)
    figure.suptitle(title_of(record, run, rows[0]), fontsize=10)
    return save(figure, path)


def draw_shares(record: Record, run: str, path: Path) -> Path | None:
    """Where a step's time goes, a stacked bar a provider."""
    rows = [row for row in of_run(record, run) if row.get("shares_ms")]
    if not rows:
        return None
    figure, axis = pyplot().subplots(figsize=(9, 1.5 + 0.42 * len(rows)), layout="constrained")
    names = [name_of(row["provider"]).replace(", ", ",\n", 1) for row in rows]
    longest = max(sum(row["shares_ms"].values()) for row in rows)
    left = [0.0] * len(rows)
    for kind, colour in KIND_COLOURS.items():
        values = [row["shares_ms"][kind] for row in rows]
        drawn = axis.barh(names, values, left=left, color=colour, label=kind, edgecolor="white", linewidth=0.6)
        labels = [f"{value:.0f}" if value > 0.035 * longest else "" for value in values]
        dark = kind in ("matrix products", "fused kernels", "optimizer")
        axis.bar_label(drawn, labels=labels, label_type="center", fontsize=8, color="white" if dark else "0.2")
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set_xlabel("ms of one profiled step")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=9
    )
    figure.suptitle(title_of(record, run, rows[0]), fontsize=10)
    return save(figure, path)


def draw_contexts(record: Record, run: str, path: Path) -> Path | None:
    """Tokens per second and peak memory over the context, and the largest context that fits."""
    rows = [row for row in record.rows if row["shape"]["run"] == run]
    providers = list(dict.fromkeys(row["provider"] for row in rows if row["error"] is None))
    if not providers:
        return None
    good = of_run(record, run)
    unit, name = unit_of(max(row["peak_bytes"] for row in good))
    figure, (speed, memory, longest) = pyplot().subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    lengths = [row["shape"]["length"] for row in good]
    ticks = [2**power for power in range(min(lengths).bit_length() - 1, max(lengths).bit_length() + 1)]
    for provider in providers:
        points = sorted((row["shape"]["length"], row) for row in good if row["provider"] == provider)
        xs = [length for length, _ in points]
        parsed = Provider.parse(provider)
        style = {
            "color": colour_of(provider),
            "linewidth": 2.4 if parsed.ours else 1.5,
            "linestyle": "--" if parsed.options or parsed.compiled else "-",
            "marker": "o",
            "markersize": 4,
        }
        speed.plot(xs, [row["tokens_per_second"] for _, row in points], label=name_of(provider), **style)
        memory.plot(xs, [row["peak_bytes"] / unit for _, row in points], **style)
        if largest([row for row in rows if row["provider"] == provider])[1] is not None:
            memory.plot(
                xs[-1:], [points[-1][1]["peak_bytes"] / unit], marker="x", markersize=9, color=colour_of(provider)
            )
    for axis, title in ((speed, "tokens per second"), (memory, f"peak memory, {name} (×: no longer one fits)")):
        dress(axis, ticks, "context (tokens)", title)
        axis.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    found = [largest([row for row in rows if row["provider"] == provider]) for provider in providers]
    drawn = longest.barh(
        [name_of(each).replace(", ", ",\n") for each in providers],
        [each[0] for each in found],
        color=[colour_of(each) for each in providers],
    )
    longest.bar_label(
        drawn, labels=[f"{good:,}" if bad else f"at least {good:,}" for good, bad in found], padding=3, fontsize=9
    )
    longest.set_title("largest context that fits (tokens)", fontsize=10, loc="left")
    longest.invert_yaxis()
    longest.margins(x=0.35)
    longest.xaxis.set_visible(False)
    longest.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(title_of(record, run), fontsize=11)
    figure.legend(
        *speed.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(6, len(providers)),
        frameon=False,
        fontsize=9,
    )
    return save(figure, path)


PLOTS: dict[str, dict[str, Callable[[Record, str, Path], Path | None]]] = {
    "training_steps": {"bars": draw_steps, "memory": draw_memory, "shares": draw_shares},
    "training_contexts": {"curves": draw_contexts},
}


def draw_record(record: Record, folder: Path) -> dict[str, list[Path]]:
    """Draw everything that a record has, to ``folder``; the plots of each run."""
    slug = device_slug(record.device)
    drawn: dict[str, list[Path]] = {}
    for run in dict.fromkeys(row["shape"]["run"] for row in record.rows):
        for kind, draw in PLOTS[record.benchmark].items():
            plot = draw(record, run, folder / f"{record.benchmark}_{run}_{kind}_{slug}.png")
            if plot is not None:
                drawn.setdefault(run, []).append(plot)
    return drawn


def draw_all(folder: Path) -> list[Path]:
    """Draw the plots of all records of the headline in a folder, beside them."""
    plots = []
    for benchmark in PLOTS:
        for path in sorted(folder.glob(f"{benchmark}_*.json")):
            for each in draw_record(Record.load(path), folder).values():
                plots += each
    return plots
