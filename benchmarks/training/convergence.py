"""Loss curves of several hundred steps on real text: transformers' or TRL's own trainer, Liger-Kernel, liger_trainer.

    python benchmarks/training/convergence.py --minutes 9                     # SmolLM2-135M, 500 steps, bf16 autocast
    python benchmarks/training/convergence.py --tasks dpo --minutes 9
    python benchmarks/training/convergence.py --plots                         # draw what is on file

Three seeds of the stock trainer and one each of the others, every run in a process of its own. A run passes where it
could have been one of the stock trainer's: `training.judging` says by which rules. Every run is written to
``benchmarks/results/training_convergence_<device>.json`` as soon as it has ended, and what is there is not run again,
so that a call that ``--minutes`` has ended is continued by the same command.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.plots import COLOURS, save
from harness.record import Record, Row, device_slug
from harness.run import RESULTS, show_table
from training.clock import Clock, OutOfTimeError
from training.isolated import Isolated, IsolatedError
from training.judging import Verdict, judge, smoothed
from training.measure_step import device_without_touching_it
from training.plots import colour_of, name_of, pyplot
from training.tasks import CURVES, MODEL, PROVIDERS, TASKS, Training, curves

BENCHMARK = "training_convergence"
TITLES = {"sft": "fine-tuning", "dpo": "DPO", "distillation": "distillation"}
LABELS = {"loss": "training loss", "rewards/margins": "reward margin"}


def trainer_of(training: Training) -> Callable[[None], dict[str, list[float]]]:
    return lambda _: curves(training)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Those that have ended well, by seed: the others are held against the stock trainer's first."""
    return sorted((row for row in rows if row["error"] is None), key=lambda row: row["shape"]["seed"])


def verdicts(rows: Sequence[Row], window: int) -> Iterator[tuple[str, str, Verdict]]:
    """Provider, curve and verdict of every run of one task that isn't the stock trainer's."""
    good = in_order(rows)
    stock = [row["curves"] for row in good if row["provider"] == "hf"]
    if len(stock) < 2:
        return
    for row in good:
        if row["provider"] != "hf":
            for curve in row["curves"]:
                yield row["provider"], curve, judge(row["curves"][curve], [each[curve] for each in stock], window)


def draw(record: Record, task: str, window: int, path: Path) -> Path | None:
    """Each curve of a task with the stock trainer's band, and below it the distance from the twin of the same seed."""
    rows = in_order(row for row in record.rows if row["shape"]["task"] == task)
    stock = [row["curves"] for row in rows if row["provider"] == "hf"]
    if len(stock) < 2:
        return None
    names = CURVES[task]
    figure, axes = pyplot().subplots(
        2,
        len(names),
        figsize=(1 + 5.5 * len(names), 5),
        layout="constrained",
        squeeze=False,
        sharex=True,
        height_ratios=(3, 1),
    )
    for curve, (top, bottom) in zip(names, axes.T):
        theirs = [smoothed(each[curve], window) for each in stock]
        steps = range(window, window + len(theirs[0]))
        low, high = [min(each) for each in zip(*theirs)], [max(each) for each in zip(*theirs)]
        top.fill_between(steps, low, high, color=COLOURS["hf"], alpha=0.25, linewidth=0)
        for seed, values in enumerate(theirs):
            top.plot(
                steps,
                values,
                color=COLOURS["hf"],
                linewidth=0.9,
                label=f"Hugging Face, {len(theirs)} seeds" if not seed else None,
            )
        bottom.fill_between(
            steps,
            [b - a for a, b in zip(low, high)],
            color=COLOURS["hf"],
            alpha=0.25,
            linewidth=0,
            label="width of the band",
        )
        for row in rows:
            if row["provider"] == "hf":
                continue
            mine = smoothed(row["curves"][curve], window)
            style = {"color": colour_of(row["provider"]), "linewidth": 1.6}
            dashes = (0, (4, 2)) if row["provider"] == "ours" else (4, (4, 4))
            top.plot(steps, mine, linestyle=dashes, label=name_of(row["provider"]), **style)
            bottom.plot(steps, [abs(a - b) for a, b in zip(mine, theirs[0])], label=name_of(row["provider"]), **style)
        top.set_ylabel(f"{LABELS[curve]},\nmean of {window} steps")
        bottom.set_ylabel("distance from\nthe same seed", fontsize=9)
        bottom.set_ylim(bottom=0)
        bottom.set_xlabel("optimizer step")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=9)
    axes[1][0].legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    setting = record.rows[0]["shape"]
    figure.suptitle(f"{TITLES[task]} of {setting['model']}, {rows[0]['dtype']}, {record.device}", fontsize=10)
    return save(figure, path)


def show(record: Record, tasks: Sequence[str], window: int, folder: Path) -> bool:
    """Print the verdicts and draw the plots; False where a run of ours fails."""
    lines, passed = [], True
    for task in tasks:
        rows = [row for row in record.rows if row["shape"]["task"] == task]
        lines += [
            (task, row["provider"], row["shape"]["seed"], "", None, None, row["error"]) for row in rows if row["error"]
        ]
        for provider, curve, verdict in verdicts(rows, window):
            word = "passes" if verdict.passed else f"fails, most at step {verdict.at}"
            lines.append((task, provider, 0, curve, verdict.excess, verdict.drift, word))
            passed &= verdict.passed or provider != "ours"
        plot = draw(record, task, window, folder / f"{BENCHMARK}_{task}_{device_slug(record.device)}.png")
        if plot is not None:
            print(plot)
    columns = ("task", "provider", "seed", "curve", "outside of the band", "distance from the same seed", "")
    show_table(f"{BENCHMARK} on {record.device}; distances in widths of the stock trainer's band", columns, lines)
    return passed


def trainings(options: argparse.Namespace) -> list[Training]:
    """What is asked for, in the order in which it is run."""
    settings: Mapping[str, Any] = {
        name: getattr(options, name) for name in ("steps", "batch", "length", "bf16", "model", "text", "student_layers")
    }
    return [
        Training(task, provider, seed, **settings)
        for task in options.tasks
        for provider in options.providers
        for seed in (options.seeds if provider == "hf" else options.seeds[:1])
    ]


def new_row(training: Training) -> Row:
    shape = asdict(training)
    shape["model"] = Path(training.model).name
    dtype = "bf16 autocast" if training.bf16 else "float32"
    return {
        "provider": shape.pop("provider"),
        "dtype": dtype,
        "shape": {k: v for k, v in shape.items() if k not in ("bf16", "options")},
        "error": None,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the stock trainer; the others have the first"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="sequences, or pairs, of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, at most")
    parser.add_argument("--window", type=int, default=25, help="steps that curves are smoothed over")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="without bf16 autocast")
    parser.add_argument("--model", default=MODEL, help="a folder or .gguf file instead of SmolLM2 from the hub")
    parser.add_argument(
        "--text", help="UTF-8 file to fine-tune on, instead of the sources of Python's standard library"
    )
    parser.add_argument("--student-layers", type=int, default=20)
    parser.add_argument("--again", action="store_true", help="run again what is on file")
    parser.add_argument("--jobs", type=int, default=1, help="trainings that run at the same time")
    parser.add_argument("--minutes", type=float, help="begin nothing that would not end within so many")
    parser.add_argument("--timeout", type=float, default=580, help="seconds of one run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file and the plots")
    parser.add_argument("--plots", action="store_true", help="run nothing, draw what is on file")
    options = parser.parse_args(arguments)
    record, path = Record.open(options.results, BENCHMARK, device_without_touching_it(options.timeout))
    clock, ended = Clock(options.minutes, options.timeout), True
    jobs = [] if options.plots else trainings(options)
    lock = threading.Lock()
    on_file = [] if options.again else list(record.rows)

    def run(i: int, training: Training) -> None:
        row = new_row(training)
        if any(all(each[k] == row[k] for k in ("provider", "dtype", "shape")) for each in on_file):
            return
        clock.check()
        started = time.monotonic()
        try:
            with Isolated(trainer_of, training) as process:
                row["curves"] = clock.ask(process, None)
        except IsolatedError as error:
            row["error"] = str(error)
            print(error.output, file=sys.stderr)
        with lock:
            record.add(row)
            record.save(path)
        last = row["error"] or ", ".join(f"{name} {values[-1]:.4f}" for name, values in row["curves"].items())
        took = time.monotonic() - started
        print(
            f"[{i}/{len(jobs)}] {training.task} {training.provider}, seed {training.seed}: {last} [{took:.0f} s]",
            file=sys.stderr,
        )

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(run, i, training) for i, training in enumerate(jobs, 1)]
    errors = [error for each in futures if (error := each.exception()) is not None]
    for error in errors:
        if not isinstance(error, OutOfTimeError):
            raise error
    if errors:
        ended = False
        print("The minutes are over; the same command goes on from here (without --again).", file=sys.stderr)
    passed = show(record, options.tasks, options.window, options.results)
    return 3 if not ended else 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
