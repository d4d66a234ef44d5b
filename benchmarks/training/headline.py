"""Training steps beside every alternative: time, memory, largest context, and where a step's time goes.

    python benchmarks/training/headline.py steps --runs llama-1b llama-1b-half --minutes 9
    python benchmarks/training/headline.py contexts --runs llama-1b-context llama-8b-lora --minutes 9
    python benchmarks/training/headline.py plots

``steps`` measures runs of `training.runs` under providers, each in a process of its own: an out-of-memory error, a
crash or a time-out ends its row alone. A provider may carry options, as ``ours:recompute=cheap``. ``contexts`` doubles
the length of the sequences up to ``--points-until``, for the points of the curves, and then looks for the largest that
fits where the peaks so far say that it lies.
``plots`` draws what is on file.

Every row is written as soon as it is known, to ``benchmarks/results/training_{steps,contexts}_<device>.json``. What is
there is not measured again (``--again`` does), so that a call that ``--minutes`` has ended is continued by the same
command. ``--tiny`` shrinks every run for a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.record import Record, Row
from harness.run import RESULTS, rounded, show_table
from training.clock import Clock, OutOfTimeError
from training.contexts import OUT_OF_MEMORY, fits, next_length
from training.isolated import Isolated, IsolatedError, in_turn
from training.measure_step import device_without_touching_it, measurer
from training.providers import PREFERENCE_PROVIDERS, PROVIDERS, Provider
from training.runs import PREFERENCES, RUNS, Run
from training.step_trace import LAUNCH_BLOCKING

STEPS, CONTEXTS = "training_steps", "training_contexts"
HEADLINE = tuple(name for name in RUNS if not name.startswith("family-") and not name.endswith("-context"))
USUAL = {
    "steps": (*PROVIDERS, "ours:recompute=cheap"),
    "contexts": ("hf", "liger-kernel", "ours", "ours:recompute=cheap,mlp_chunk_tokens=8192"),
}
# Free memory in pieces of the wrong size would decide what fits.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def shape_of(name: str, run: Run, length: int) -> dict[str, Any]:
    return {"run": name, "batch": run.batch, "length": length}


def new_row(name: str, run: Run, provider: str, length: int) -> Row:
    shape = shape_of(name, run, length)
    return {
        "provider": provider,
        "dtype": "bfloat16",
        "shape": shape,
        "step_ms": None,
        "peak_bytes": None,
        "error": None,
    }


def rows_of(record: Record, name: str, provider: str) -> list[Row]:
    return [row for row in record.rows if row["shape"]["run"] == name and row["provider"] == provider]


def summary(row: Row) -> str:
    if row["error"]:
        return row["error"]
    p20, median, p80 = row["step_ms"]
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_bytes'] / 1e9:.2f} GB, "
        f"{median:.4g} ms ({p20:.4g} to {p80:.4g}, {row['steps']} steps), "
        f"loss {row['first_loss']:.4f} to {row['last_loss']:.4f}"
    )


def store(row: Row, record: Record, path: Path, progress: str, started: float) -> None:
    record.add({name: rounded(value) for name, value in row.items()})
    record.save(path)
    print(
        f"{progress} {row['provider']}: {summary(row)} [{time.monotonic() - started:.0f} s]",
        file=sys.stderr,
        flush=True,
    )


def failed(row: Row, error: IsolatedError) -> None:
    """Say in the row why there is no answer, and on stderr what an unexpected failure has written."""
    row["error"] = str(error)
    if row["error"] != OUT_OF_MEMORY:
        print(error.output, file=sys.stderr, flush=True)


def isolated(options: argparse.Namespace, run: Run, provider: str, **environment: str) -> Isolated:
    limit = None if options.limit_gb is None else int(options.limit_gb * 1e9)
    return Isolated(measurer, run, provider, limit, environment=ALLOCATOR | environment)


def timing(options: argparse.Namespace, length: int, *, shares: bool) -> dict[str, Any]:
    settings = {name: getattr(options, name) for name in ("warmup", "steps", "seconds")}
    return {"what": "time", "length": length, "shares": shares, **settings}


def chosen(options: argparse.Namespace) -> list[tuple[str, Run, str]]:
    """Every run with every provider that is asked for, or that suits its task."""
    jobs = []
    for name in options.runs:
        run = RUNS[name].tiny() if options.tiny else RUNS[name]
        sizes = {size: getattr(options, size, None) for size in ("batch", "length")}
        run = replace(run, **{size: value for size, value in sizes.items() if value is not None})
        providers = options.providers or (PREFERENCE_PROVIDERS if run.task in PREFERENCES else options.usual)
        jobs += [(name, run, provider) for provider in providers]
    return jobs


def measure_steps(options: argparse.Namespace, record: Record, path: Path, clock: Clock) -> None:
    """Times and shares of each job from one process, memory over a step's time, where asked for, from another."""
    on_file = [(row["provider"], row["shape"]) for row in record.rows if not options.again]
    jobs = [job for job in chosen(options) if (job[2], shape_of(job[0], job[1], job[1].length)) not in on_file]
    good: dict[tuple[str, str], list[Row]] = {}
    kinds: list[tuple[str, dict[str, str]]] = [("time", {}), ("memory", LAUNCH_BLOCKING)]
    tasks = [
        (turn, i, job, kind, environment)
        for turn in range(1, options.rounds + 1)
        for i, job in enumerate(jobs, 1)
        for kind, environment in (
            kinds if options.memory_curves == ["all"] or job[0] in options.memory_curves else kinds[:1]
        )
    ]
    starts = (partial(isolated, options, run, provider, **more) for _, _, (_, run, provider), _, more in tasks)
    with closing(in_turn(starts)) as processes:
        for (turn, i, (name, run, provider), kind, _), process in zip(tasks, processes):
            started = time.monotonic()
            progress = f"[{i}/{len(jobs)}, round {turn}] {name}"
            if kind == "time":
                clock.check()
                row = new_row(name, run, provider, run.length) | {"rounds": turn}
                try:
                    row |= clock.ask(process, timing(options, run.length, shares=True))
                    good.setdefault((name, provider), []).append(row)
                except IsolatedError as error:
                    failed(row, error)
                # Of several rounds the one with the median time counts.
                rounds = sorted(good.get((name, provider), [row]), key=lambda each: each["step_ms"])
                row = rounds[len(rounds) // 2] | {"rounds": turn}
            elif not row["error"]:
                try:
                    row["memory"] = clock.ask(process, {"what": "memory", "length": run.length})
                except IsolatedError as error:
                    failed(row, error)
            store(row, record, path, progress, started)


def length_to_try(rows: list[Row], options: argparse.Namespace) -> int | None:
    """Points of the curve, then the largest length; None where it is known, or can't be for another reason."""
    tried = fits(rows)
    if tried is None:
        return None
    peaks = {row["shape"]["length"]: row["peak_bytes"] for row in rows if row["peak_bytes"]}
    capacity = next((row["capacity_bytes"] for row in rows if row.get("capacity_bytes")), None)
    if all(tried.values()) and max(tried, default=0) < options.points_until:
        capacity = None  # a point of the curve, not the end of it
    where = options.start, options.multiple, options.precision, options.longest
    return next_length(tried, *where, peaks, capacity)


def measure_contexts(options: argparse.Namespace, record: Record, path: Path, clock: Clock) -> None:
    """The lengths of each job up to the largest that fits; one process serves as long as it answers."""
    jobs = chosen(options)
    if options.again:
        again = {(name, provider) for name, _, provider in jobs}
        record.rows = [row for row in record.rows if (row["shape"]["run"], row["provider"]) not in again]
    for i, (name, run, provider) in enumerate(jobs, 1):
        process: Isolated | None = None
        try:
            while (length := length_to_try(rows_of(record, name, provider), options)) is not None:
                clock.check()
                started = time.monotonic()
                row = new_row(name, run, provider, length)
                process = process or isolated(options, run, provider)
                try:
                    row |= clock.ask(process, timing(options, length, shares=False))
                except IsolatedError as error:
                    failed(row, error)
                store(row, record, path, f"[{i}/{len(jobs)}] {name} at {length:,}", started)
                if row["error"] or Provider.parse(provider).compiled:  # what is compiled is compiled for one length
                    process.close()
                    process = None
        finally:
            if process is not None:
                process.close()


def show(record: Record, jobs: list[tuple[str, Run, str]]) -> None:
    lines = []
    for name, _, provider in jobs:
        for row in sorted(rows_of(record, name, provider), key=lambda each: each["shape"]["length"]):
            median = row["step_ms"] and row["step_ms"][1]
            peak = row["peak_bytes"] and row["peak_bytes"] / 1e9
            tokens = row.get("tokens_per_second")
            lines.append(
                (name, row["shape"]["length"], provider, tokens and f"{tokens:,.0f}", median, peak, row["error"])
            )
    columns = ("run", "length", "provider", "tokens/s", "step ms", "peak GB", "note")
    show_table(f"{record.benchmark} on {record.device}", columns, lines)


MEASURE: dict[str, tuple[str, Callable[..., None]]] = {
    "steps": (STEPS, measure_steps),
    "contexts": (CONTEXTS, measure_contexts),
}


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, default_runs in (("steps", HEADLINE), ("contexts", ("llama-1b-context", "llama-8b-lora"))):
        command = commands.add_parser(name)
        command.set_defaults(usual=USUAL[name])
        command.add_argument("--runs", nargs="+", choices=RUNS, default=list(default_runs), metavar="RUN")
        command.add_argument(
            "--providers", nargs="+", help=f"of {', '.join(PROVIDERS)}, ours with options as ours:a=1,b=2"
        )
        command.add_argument("--again", action="store_true", help="measure again what is on file")
        command.add_argument("--minutes", type=float, help="begin nothing that would not end within so many")
        command.add_argument("--timeout", type=float, default=240, help="seconds of one answer")
        command.add_argument("--tiny", action="store_true", help="small enough for a CPU")
        command.add_argument("--limit-gb", type=float, help="let a process allocate so much, 1e9 bytes, and no more")
        command.add_argument("--warmup", type=int, default=5, help="steps before the measured ones")
        command.add_argument("--steps", type=int, default=20, help="measured steps; the median counts")
        command.add_argument("--seconds", type=float, default=30, help="after so many, one measured step suffices")
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files and plots")
    command = commands.choices["steps"]
    command.add_argument("--batch", type=int, help="sequences, or pairs, in place of the run's")
    command.add_argument("--length", type=int, help="tokens of a sequence in place of the run's")
    command.add_argument(
        "--memory-curves",
        nargs="+",
        choices=("all", "none", *RUNS),
        default=["all"],
        metavar="RUN",
        help="all, none, or the runs whose memory over a step's time is measured, in a second process",
    )
    command.add_argument("--rounds", type=int, default=1, help="run all so often; their median runs count")
    command = commands.choices["contexts"]
    command.set_defaults(warmup=2, steps=5, seconds=15)
    command.add_argument("--start", type=int, default=1024, help="the first length")
    command.add_argument("--points-until", type=int, default=16384, help="lengths are doubled up to here, if they fit")
    command.add_argument("--multiple", type=int, default=1024, help="of which every length is one")
    command.add_argument("--precision", type=float, default=1 / 16, help="of the largest length, relative")
    command.add_argument("--longest", type=int, default=2**20)
    commands.add_parser("plots").add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for each in getattr(options, "providers", None) or ():
        try:
            Provider.parse(each)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    if options.command == "plots":
        from training.plots import draw_all

        for plot in draw_all(options.results):
            print(plot)
        return 0
    benchmark, measure = MEASURE[options.command]
    record, path = Record.open(options.results, benchmark, device_without_touching_it(options.timeout))
    clock = Clock(options.minutes, options.timeout)
    ended = True
    try:
        measure(options, record, path, clock)
    except OutOfTimeError:
        ended = False
    show(record, chosen(options))
    if not ended:
        print("The minutes are over; the same command goes on from here (without --again).", file=sys.stderr)
    return 0 if ended else 3


if __name__ == "__main__":
    sys.exit(main())
