"""Tables and plots of the many-GPU benchmark's records, for docs/benchmarks.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.plots import line_style
from harness.record import Record, Row, device_slug
from training.plots import FAMILY, name_of

__all__ = ["efficiency", "loss_difference", "sections"]

# The part of a row's shape that a table has in its title.
TITLE = ("model", "task", "gpus", "batch", "checkpointing", "trainer")
Table = Callable[[Sequence[str], str, Any], str]


def same_but(rows: Sequence[Row], row: Row, **changed: Any) -> Row | None:
    """The row that differs from another one in these fields of its shape, or in its provider."""
    provider = changed.pop("provider", row["provider"])
    shape = row["shape"] | changed
    return next((each for each in rows if each["provider"] == provider and each["shape"] == shape), None)


def loss_difference(rows: Sequence[Row], row: Row) -> float | None:
    """The largest difference from the untouched model's losses in the first steps, relative to them."""
    other = same_but(rows, row, provider="hf")
    if other is None or other is row or not row["losses"] or not other["losses"]:
        return None
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(row["losses"], other["losses"], strict=False))


def efficiency(rows: Sequence[Row], row: Row) -> tuple[float, int] | None:
    """(tokens a second and GPU over those on the fewest GPUs on file at the same work a GPU, how many these are)."""
    rate = row["tokens_per_second_per_gpu"]
    counts = sorted({each["shape"]["gpus"] for each in rows if each["shape"]["gpus"] < row["shape"]["gpus"]})
    for gpus in counts:
        fewer = same_but(rows, row, gpus=gpus)
        if rate and fewer is not None and fewer["tokens_per_second_per_gpu"]:
            return rate / fewer["tokens_per_second_per_gpu"], gpus
    return None


def collectives(rows: Sequence[Row], row: Row) -> str:
    """Counts of a step, and whether the untouched model has the same."""
    found = row["collectives"]
    if not found:
        return ""
    other = same_but(rows, row, provider="hf")
    text = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in sorted(found.items()))
    if other is None or other is row or other["collectives"] is None:
        return text
    return f"{text} ({'as hf' if other['collectives'] == found else 'not as hf'})"


def cells(rows: Sequence[Row], row: Row) -> list[str]:
    shape = row["shape"]
    start = [shape["strategy"], f"{shape['length']:,}", name_of(row["provider"])]
    if row["error"]:
        return [*start, "", "", "", "", "", f"not run: {row['error']}".replace("|", "\\|")]
    base = same_but(rows, row, provider="hf")
    rate, peak = row["tokens_per_second_per_gpu"], row["peak_bytes"]
    against = ""
    if base is not None and base is not row and base["tokens_per_second_per_gpu"]:
        against = f"{rate / base['tokens_per_second_per_gpu']:.2f} ×"
        if peak and base["peak_bytes"]:
            against += f", {peak / base['peak_bytes']:.0%}"
    difference, found = loss_difference(rows, row), efficiency(rows, row)
    return [
        *start,
        f"{rate:,.0f}",
        "" if peak is None else f"{peak / 1e9:.1f}",
        against,
        "" if difference is None else f"{difference:.1e}",
        "" if found is None else f"{found[0]:.1%} of {found[1]}",
        collectives(rows, row),
    ]


def draw(rows: Sequence[Row], title: str, path: Path) -> Path | None:
    """Tokens a second and peak memory over the context, one panel a strategy; None where there is one context only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if not row["error"] and row["shape"]["length"]]
    strategies = sorted({row["shape"]["strategy"] for row in rows})
    if len({row["shape"]["length"] for row in rows}) < 2:
        return None
    figure, axes = plt.subplots(
        2,
        len(strategies),
        figsize=(4 * len(strategies), 6),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for column, strategy in enumerate(strategies):
        for provider in dict.fromkeys(row["provider"] for row in rows):
            line = sorted(
                (row for row in rows if row["provider"] == provider and row["shape"]["strategy"] == strategy),
                key=lambda row: row["shape"]["length"],
            )
            lengths = [row["shape"]["length"] for row in line]
            style: dict[str, Any] = line_style(FAMILY.get(provider, provider))
            axes[0, column].plot(
                lengths, [row["tokens_per_second_per_gpu"] for row in line], label=name_of(provider), **style
            )
            axes[1, column].plot(lengths, [(row["peak_bytes"] or 0) / 1e9 for row in line], **style)
        axes[0, column].set_title(strategy)
        axes[1, column].set_xlabel("context, tokens")
        axes[1, column].set_xscale("log", base=2)
    axes[0, 0].set_ylabel("tokens per second and GPU")
    axes[1, 0].set_ylabel("peak memory, GB")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def title_of(shape: dict[str, Any]) -> str:
    what = f"{shape['model']}, {shape['task'].upper()}, {shape['gpus']} GPU{'s' if shape['gpus'] > 1 else ''}, "
    what += f"batch {shape['batch']} a GPU" + (", layers recomputed" if shape["checkpointing"] else "")
    return what + (", through the trainer" if shape["trainer"] else "")


def largest(rows: Sequence[Row], table: Table) -> str:
    found = [row for row in rows if row["shape"]["length"] == 0 and row.get("largest_length") is not None]
    if not found:
        return ""
    lines = []
    for row in found:
        base = same_but(rows, row, provider="hf")
        over = ""
        if base is not None and base is not row and base.get("largest_length"):
            over = f"{row['largest_length'] / base['largest_length']:.1f} ×"
        lines.append(
            [row["shape"]["strategy"], name_of(row["provider"]), f"{row['largest_length']:,}", over, row["error"] or ""]
        )
    return "Largest context, to 1,024 tokens:\n\n" + table(
        ("strategy", "provider", "tokens", "against hf", "note"), "llrrl", lines
    )


def record_section(record: Record, results: Path, page: Path, table: Table) -> Iterator[str]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in record.rows:
        groups.setdefault(tuple(row["shape"][name] for name in TITLE), []).append(row)
    columns = (
        "strategy", "context", "provider", "tokens/s a GPU", "peak GB", "against hf", "losses differ by", "efficiency",
        "collectives a step",
    )  # fmt: skip
    for shape, rows in groups.items():
        title = title_of(dict(zip(TITLE, shape, strict=True)))
        yield f"### {title}\n"
        ordered = sorted(
            (row for row in rows if row["shape"]["length"]),
            key=lambda row: (row["shape"]["strategy"], row["shape"]["length"]),
        )
        if ordered:
            yield table(columns, "lrlrrrrrl", [cells(record.rows, row) for row in ordered])
        longest = largest(rows, table)
        if longest:
            yield longest
        slug = "_".join(str(each).lower() for each in shape)
        plot = draw(
            rows, f"{title}, {record.device}", results / f"{record.benchmark}_{slug}_{device_slug(record.device)}.png"
        )
        if plot is not None:
            yield f"![{title}]({os.path.relpath(plot, page.parent)})\n"


def sections(results: Path, page: Path, table: Table) -> list[str]:
    """Markdown of every record of the benchmark in a folder, and its plots beside them; nothing without records."""
    parts = []
    for path in sorted(results.glob("distributed_*.json")):
        record = Record.load(path)
        versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
        task = record.benchmark.removeprefix("distributed_")
        parts.append(f"## Training on several GPUs: {record.device}, {task}\n")
        parts.append(
            f"{record.date}: {versions}. The median step, of the slowest rank; the highest peak of any rank. Losses "
            "are means over ranks in the first ten steps, compared with those of hf; efficiency is the rate a GPU over "
            "that on the fewest GPUs on file.\n"
        )
        parts.extend(record_section(record, results, page, table))
    return parts
