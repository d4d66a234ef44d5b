"""Write docs/benchmarks.md, and the plots in it, from the JSON files in benchmarks/results.

    python benchmarks/report.py

Nothing is measured here, so it needs no accelerator.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import adapted_head
import add_rms_norm
import cross_entropy
import gated_activation
import gradient_accuracy
import layer_norm
import linear_cross_entropy
import linear_jsd
import linear_log_probs
import preference_losses
import rms_norm
import rotary
from harness.benchmark import Benchmark, Case
from harness.plots import LABELS, draw_sweep
from harness.record import Record, Row, device_slug
from harness.run import RESULTS, times_floor
from training import distributed_report
from training import page as training_page

BENCHMARKS = (
    linear_cross_entropy.BENCHMARK,
    adapted_head.BENCHMARK,
    linear_log_probs.BENCHMARK,
    *preference_losses.BENCHMARKS,
    linear_jsd.BENCHMARK,
    cross_entropy.BENCHMARK,
    rms_norm.BENCHMARK,
    add_rms_norm.BENCHMARK,
    layer_norm.BENCHMARK,
    rotary.BENCHMARK,
    *gated_activation.BENCHMARKS,
)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks of single ops

<!-- Written by `make benchmark-report` (python benchmarks/report.py) from benchmarks/results. Do not edit. -->

Each op runs forward and backward, beside its peers, on the same inputs. `make benchmarks` measures again on the machine
it runs on; `make benchmark-report` writes this page.

- **device ms**: one call in a replayed device graph, over sets of inputs that together exceed the cache several times.
  No host can slow it down. Empty where the host must wait for the device in the middle of a call.
- **event ms**: events around plain calls, median and the band from 20 to 80 %, the cache flushed before each. Where
  matrix products take the time, which heat a device and slow it down, everyone's begin after a pause of half a second.
- **× floor**: device time (event time where there is none) over the time that no implementation is expected to beat,
  measured in the same run. For all ops but the LM head that is a copy of the bytes that must move.
- **host µs**: time to enqueue one call of a tiny problem, which bounds small steps.
- **peak MB**: most memory allocated during a call over what was there before it, its results included, in 1e6 bytes;
  of preference losses, in brackets, against plain logits.

Before it is timed, each provider's outputs and gradients are compared with float64 on a small problem; one that is
wrong is not timed. Gradients are formed by `torch.autograd.grad` with given output gradients, for everyone alike.
"""


def table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; ``alignment`` has an l or an r a column."""
    rule = ["---" if side == "l" else "---:" for side in alignment]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)) + "\n"


def name_of(provider: str) -> str:
    label = LABELS.get(provider, provider)
    return f"**{label}**" if provider.startswith("ours") else label


def in_ms(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{milliseconds:.1f}" if milliseconds >= 10 else f"{milliseconds:.3g}"


def describe(case: Case) -> str:
    sizes = (name if size is True else f"{name} {size:,}" for name, size in case.sizes.items())
    return ", ".join((*sizes, case.dtype)).replace("_", " ")


def rows_of(record: Record, benchmark: Benchmark, case: Case) -> list[Row]:
    """The record's rows of a case, in the order in which the benchmark names the providers."""
    found = {row["provider"]: row for row in record.rows if Case(row["dtype"], **row["shape"]) == case}
    return [found[name] for name in benchmark.providers if name in found]


def share_of_memory(row: Row, rows: Sequence[Row], plain: str | None) -> str:
    """A row's peak against that of the provider ``plain`` in the same case, in brackets."""
    whole = next((each["peak_bytes"] for each in rows if each["provider"] == plain), None)
    if not whole or row["provider"] == plain:
        return ""
    return f" ({100 * (row['peak_bytes'] / whole - 1):+.0f} %)".replace("-", "−")


def cells(row: Row, rows: Sequence[Row], tiny: dict[str, Row], benchmark: Benchmark) -> list[str]:
    event = row["event_ms"]
    host = tiny.get(row["provider"], {}).get("host_us")
    ratio = times_floor(row)
    share = share_of_memory(row, rows, benchmark.plain)
    no_graph = row["device_note"] and f"no device time: {row['device_note']}"
    reasons = [f"not run: {row['error']}"] if row["error"] else [benchmark.providers[row["provider"]].note, no_graph]
    return [
        name_of(row["provider"]),
        in_ms(row["device_ms"]),
        "" if event is None else f"{in_ms(event[1])} ({in_ms(event[0])}–{in_ms(event[2])})",
        "" if ratio is None else f"{ratio:.2f}",
        "" if host is None else f"{host:.0f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}{share}",
        "; ".join(each for each in reasons if each).replace("|", "\\|"),
    ]


def section(benchmark: Benchmark, record: Record, plots: list[Path], page: Path) -> str:
    """Tables of the bar shapes and the plots of one op on one device."""
    parts = [f"### {benchmark.title}\n", f"{benchmark.about}\n"]
    tiny = {row["provider"]: row for row in rows_of(record, benchmark, benchmark.tiny)}
    columns = ("provider", "device ms", "event ms", "× floor", "host µs", "peak MB", "note")
    # Without the column that no row of this op fills.
    graphs = benchmark.device_graphs
    shown = [i for i, column in enumerate(columns) if graphs or column != "device ms"]
    for case in benchmark.bars:
        rows = rows_of(record, benchmark, case)
        if not rows:
            continue
        floors = [row["floor_ms"] for row in rows if row["floor_ms"] is not None]
        floor = f", floor {in_ms(floors[0])} ms" if floors else ""
        parts.append(f"**{describe(case)}**{floor}\n")
        lines = (cells(row, rows, tiny, benchmark) for row in rows)
        chosen = [[line[i] for i in shown] for line in lines]
        parts.append(table([columns[i] for i in shown], "".join("lrrrrrl"[i] for i in shown), chosen))
    parts.extend(f"![{plot.stem.replace('_', ' ')}]({os.path.relpath(plot, page.parent)})\n" for plot in plots)
    return "\n".join(parts)


def times_ours(row: Row, ours: Row) -> float:
    """A row's time over ours: device times, or event times where one of the two has no other."""
    if row["device_ms"] is not None and ours["device_ms"] is not None:
        return row["device_ms"] / ours["device_ms"]
    return row["event_ms"][1] / ours["event_ms"][1]


def glance(records: dict[str, Record]) -> str:
    """Ours beside the fastest peer on every bar shape."""
    lines = []
    for benchmark in BENCHMARKS:
        for case in benchmark.bars if benchmark.name in records else ():
            rows = [row for row in rows_of(records[benchmark.name], benchmark, case) if row["event_ms"] is not None]
            ours = next((row for row in rows if row["provider"] == "ours"), None)
            peers = [row for row in rows if not row["provider"].startswith("ours")]
            if ours is None or not peers:
                continue
            ratios = [times_ours(row, ours) for row in peers]
            best = peers[ratios.index(min(ratios))]
            lines.append(
                [
                    f"{benchmark.title}: {describe(case)}",
                    f"{times_floor(ours):.2f}",
                    f"{times_floor(best):.2f}",
                    name_of(best["provider"]),
                    f"{min(ratios):.2f}",
                ]
            )
    columns = ("op and shape", "liger_trainer, × floor", "fastest peer, × floor", "which", "its time over ours")
    return table(columns, "lrrlr", lines)


def accuracy_section(record: Record) -> str:
    shape = {key: value for key, value in record.rows[0]["shape"].items() if key != "micro_batches"}
    case = Case(record.rows[0]["dtype"], **shape)
    found: dict[str, dict[int, Row]] = {}
    for row in record.rows:
        found.setdefault(row["provider"], {})[row["shape"]["micro_batches"]] = row
    references = {
        gradient_accuracy.ONE_PRODUCT: "*one fp32-accumulated product, rounded once*",
        gradient_accuracy.EXACT_SUM: "*exact micro-gradients, summed in the gradient's dtype*",
    }

    def number(row: Row | None, key: str) -> str:
        return "" if row is None or row[key] is None else f"{row[key]:.2e}"

    lines = []
    for provider, rows in found.items():
        base, *rest = provider.split(", ")
        name = references.get(provider) or ", ".join([name_of(base), *rest])
        errors = [number(rows.get(m), "d_weight") for m in gradient_accuracy.MICRO_BATCHES]
        note = next((row["error"] for row in rows.values() if row["error"]), "")
        lines.append([name, number(rows.get(1), "d_hidden"), *errors, f"not run: {note}" if note else ""])
    columns = ["provider", "dX", *(f"dW, {m} micro-batches" for m in gradient_accuracy.MICRO_BATCHES), "note"]
    columns[2] = "dW, whole batch"
    return (
        "### Gradients of LM head and cross entropy against float64\n\n"
        f"Relative error in the Frobenius norm; {describe(case)}, logits of standard deviation "
        f"{gradient_accuracy.LOGIT_STD:g}. The rows are cut into micro-batches whose gradients PyTorch accumulates in "
        "`weight.grad`; with *fp32 grad* it has `weight.grad_dtype = torch.float32`. The two lines in italics are "
        "references: what a product in the inputs' dtype can reach, and what accumulating in the weight's dtype costs "
        "whatever the kernel.\n\n" + table(columns, "lrrrrl", lines)
    )


def write(results: Path, page: Path) -> None:
    """Draw the plots beside the results and write the page."""
    names = [*(benchmark.name for benchmark in BENCHMARKS), gradient_accuracy.NAME, *training_page.BENCHMARKS]
    devices: dict[str, dict[str, Record]] = {}
    for path in sorted(results.glob("*.json")):
        if path.stem.rpartition("_")[0] in names:
            record = Record.load(path)
            devices.setdefault(record.device, {})[record.benchmark] = record
    parts = [HEAD]
    for device, records in devices.items():
        slug = device_slug(device)
        parts.append(f"## {device}\n")
        settings: dict[str, list[str]] = {}
        for record in records.values():
            versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
            settings.setdefault(f"{record.date}: {versions}", []).append(record.benchmark)
        for setting, of in settings.items():
            parts.append(f"{setting}{'' if len(settings) == 1 else f' ({chr(44).join(of)})'}.\n")
        bandwidths = [each.copy_bandwidth_gb_s for each in records.values() if each.copy_bandwidth_gb_s]
        if bandwidths:
            parts.append(f"A copy reads and writes {min(bandwidths):,.0f} to {max(bandwidths):,.0f} GB/s together.\n")
        parts.append(glance(records))
        for benchmark in BENCHMARKS:
            if benchmark.name not in records:
                continue
            record = records[benchmark.name]
            stem = f"{benchmark.name}_{{}}_{slug}"
            plots = [draw_sweep(record, sweep, results, stem.format(sweep.name)) for sweep in benchmark.sweeps]
            parts.append(section(benchmark, record, [plot for plot in plots if plot], page))
        if gradient_accuracy.NAME in records:
            parts.append(accuracy_section(records[gradient_accuracy.NAME]))
        if training := training_page.section(records, results, page, table):
            parts.append(training)
    parts.extend(distributed_report.sections(results, page, table))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files, and of the plots")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args(arguments)
    write(options.results, options.page)
    print(options.page)


if __name__ == "__main__":
    main()
