"""Time and memory over a problem's size, one line a provider. Importing this needs no matplotlib, drawing does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .benchmark import Case, Sweep
from .record import Record, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "LABELS", "draw_sweep", "save"]

LABELS = {
    "ours": "liger_trainer",
    "ours-512m": "liger_trainer, 512 MiB tiles",
    "ours-2g": "liger_trainer, 2 GiB tiles",
    "ours-1g": "liger_trainer, 1 GiB tiles",
    "ours-256m": "liger_trainer, 256 MiB tiles",
    "ours-keep-2g": "liger_trainer, 2 GiB kept",
    "ours-keep-512m": "liger_trainer, 512 MiB kept",
    "ours-keep-0": "liger_trainer, nothing kept",
    "ours-least": "liger_trainer, least memory",
    "ours-least-1g": "liger_trainer, least memory and 1 GiB kept",
    "ours-stacked": "liger_trainer, weights stacked",
    "hf": "Hugging Face",
    "compile": "torch.compile",
    "torch": "PyTorch fused",
    "liger": "Liger-Kernel",
    "liger-fp32": "Liger-Kernel, fp32 dW",
    "liger-cutedsl": "Liger-Kernel, CuTe DSL",
    "trl": "TRL",
    "cce": "Cut Cross-Entropy",
    "cce-exact": "Cut Cross-Entropy, exact",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart; variants share a colour.
COLOURS = {
    "ours": "#D55E00",
    "hf": "#555555",
    "compile": "#0072B2",
    "torch": "#56B4E9",
    "liger": "#009E73",
    "trl": "#E69F00",
    "cce": "#CC79A7",
}
MARKERS = {"ours": "o", "hf": "s", "compile": "^", "torch": "v", "liger": "D", "trl": "P", "cce": "X"}


def line_style(provider: str) -> dict[str, object]:
    family = provider.split("-")[0]
    emphasised = family == "ours"
    return {
        "color": COLOURS[family],
        "marker": MARKERS[family],
        "markersize": 6 if emphasised else 4.5,
        "markerfacecolor": COLOURS[family] if provider == family else "white",
        "linestyle": "-" if provider == family else "--",
        "linewidth": 2.6 if emphasised else 1.4,
        "zorder": 4 if emphasised else 3,
    }


def dress(axis: Axes, sizes: Sequence[int], xlabel: str, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(xlabel)
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="y", color="0.9", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_sweep(record: Record, sweep: Sweep, folder: Path, stem: str) -> Path | None:
    """Draw a sweep's rows to ``folder/stem.png``; returns None where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    found: dict[str, list[tuple[int, Row]]] = {}
    for row in record.rows:
        if row["event_ms"] is not None and Case(row["dtype"], **row["shape"]) in sweep.cases:
            found.setdefault(row["provider"], []).append((row["shape"][sweep.size], row))
    lines = {name: sorted(points, key=lambda point: point[0]) for name, points in found.items() if name in LABELS}
    if sweep.providers:
        lines = {name: points for name, points in lines.items() if name in sweep.providers}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    sizes = sorted({size for points in lines.values() for size, _ in points})
    peaks = {name: [row["peak_bytes"] for _, row in points] for name, points in lines.items()}
    peaks = {name: each for name, each in peaks.items() if None not in each}
    unit = 1e9 if max(map(max, peaks.values()), default=0) >= 1e9 else 1e6
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for name in LABELS:
        if name not in lines:
            continue
        xs = [size for size, _ in lines[name]]
        p20, median, p80 = zip(*(row["event_ms"] for _, row in lines[name]))
        style = line_style(name)
        time.plot(xs, median, label=LABELS[name], **style)
        time.fill_between(xs, p20, p80, color=style["color"], alpha=0.15, linewidth=0)
        if name in peaks:
            memory.plot(xs, [peak / unit for peak in peaks[name]], **style)
    floors = {size: row["floor_ms"] for points in lines.values() for size, row in points}
    time.plot(sizes, [floors[size] for size in sizes], color="0.2", linestyle=":", linewidth=1.6, label="floor")
    time.set_yscale("log")
    time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    dress(time, sizes, sweep.label, "time, ms (median, 20 to 80 % of the calls shaded)")
    dress(memory, sizes, sweep.label, f"peak memory over the inputs, {'GB' if unit == 1e9 else 'MB'}")
    memory.set_ylim(bottom=0)
    time.yaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"{sweep.title} — forward and backward, {record.device}", fontsize=11)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return save(figure, folder / f"{stem}.png")


def save(figure: Figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
