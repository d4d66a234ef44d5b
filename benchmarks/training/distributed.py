"""Training steps on several GPUs of one host: strategies × providers × contexts, each group of processes by itself.

The processes of the next run import what they need while a run measures.

    python benchmarks/training/distributed.py --preset methods --gpus 2
    python benchmarks/training/distributed.py --preset scaling --gpus 4
    python benchmarks/training/distributed.py --preset headline --gpus 8

``methods``: Llama-3.2-1B, every strategy, through Trainer and DPOTrainer, then in a plain loop. ``scaling``: FSDP2 on
1, 2, 4 ... GPUs at fixed work a GPU. ``headline``: Llama-3-8B, batch 8 a GPU, layers recomputed, FSDP1, FSDP2 and
ZeRO-3, contexts 1k to 16k, the largest context of each, and half of the GPUs for the efficiency. What --results, or
else benchmarks/results, holds already for this device and these versions is not measured again, so that a sweep can be
spread over several calls: give each ``--minutes``, and put its files where the next one finds them. ``--dry-run`` makes
everything tiny, for a CPU and gloo.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script

from harness.record import Record, Row, key
from training.contexts import OUT_OF_MEMORY, next_length
from training.distributed_group import OUT_OF_TIME, Group, Measured
from training.distributed_worker import Run
from training.isolated import in_turn

__all__ = ["PRESETS", "Sweep"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
STRATEGIES = ("fsdp2", "ddp", "zero3", "fsdp1", "zero2")
PROVIDERS = ("hf", "liger-kernel", "ours")
GRANULARITY = 1024  # tokens, of the largest context
LEAST_SECONDS = 25  # for which it is worth to begin a run


def methods(gpus: int) -> Iterator[Run]:
    base = Run("llama-3.2-1b", "hf", "sft", "ddp", gpus, 4, (4096,), False, False)
    for strategy in STRATEGIES:
        for provider in PROVIDERS:
            yield replace(base, strategy=strategy, provider=provider, trainer=True)
        for provider in ("hf", "ours"):
            yield replace(
                base, strategy=strategy, provider=provider, trainer=True, task="dpo", batch=2, lengths=(2048,)
            )
    for strategy in STRATEGIES:
        for provider in PROVIDERS:
            yield replace(base, strategy=strategy, provider=provider)


def scaling(gpus: int) -> Iterator[Run]:
    base = Run("llama-3.2-1b", "hf", "sft", "fsdp2", 1, 4, (4096,), False, False, steps=20)
    count = 1
    while count <= gpus:
        for provider in ("hf", "ours"):
            yield replace(base, provider=provider, gpus=count)
        count *= 2


def headline(gpus: int) -> Iterator[Run]:
    lengths = (1024, 2048, 4096, 8192, 16384)
    base = Run("llama-3-8b", "hf", "sft", "fsdp2", gpus, 8, lengths, True, False, warmup=2, steps=3)
    for strategy in ("fsdp2", "fsdp1", "zero3"):
        for provider in PROVIDERS:
            yield replace(base, strategy=strategy, provider=provider)
    if gpus > 1:
        for provider in PROVIDERS:
            yield replace(base, provider=provider, gpus=gpus // 2, lengths=(1024, 2048, 4096, 8192))
    for strategy in ("fsdp2", "fsdp1", "zero3"):
        for provider in PROVIDERS:
            yield replace(base, strategy=strategy, provider=provider, lengths=(), probe=True)


PRESETS: dict[str, Callable[[int], Iterator[Run]]] = {"methods": methods, "scaling": scaling, "headline": headline}


def tiny(run: Run) -> Run:
    """The run for a CPU: a tiny model, short sequences, a few steps."""
    lengths = tuple(16 * (i + 1) for i in range(min(len(run.lengths), 2)))
    return replace(run, model="tiny", batch=2, lengths=lengths, warmup=1, steps=2, seconds=20.0)


class Processes(Protocol):
    """What a sweep needs of :class:`Group`."""

    def measure(self, lengths: Sequence[int], seconds: float) -> Measured: ...

    def close(self) -> None: ...


class Sweep:
    """Measures runs one after the other into the records of a folder."""

    def __init__(
        self,
        folder: Path,
        device: str,
        seconds: float,
        *,
        start: Callable[[Run], Processes] = Group,
        longest: int = 2**20,
        granularity: int = GRANULARITY,
        show: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.folder, self.device = folder, device
        self.until = time.monotonic() + seconds
        self.start, self.longest, self.granularity, self.show = start, longest, granularity, show
        self.records: dict[str, tuple[Record, Path]] = {}

    def record(self, task: str) -> tuple[Record, Path]:
        if task not in self.records:
            self.records[task] = Record.open(self.folder, f"distributed_{task}", self.device)
        return self.records[task]

    def found(self, run: Run, length: int) -> Row | None:
        probe = {"provider": run.provider, "dtype": "bfloat16", "shape": run.shape(length)}
        wanted = key(probe)[2:]
        rows = self.record(run.task)[0].rows
        return next((row for row in rows if row["provider"] == run.provider and key(row)[2:] == wanted), None)

    def add(self, run: Run, row: Row) -> None:
        record, path = self.record(run.task)
        record.add({name: value for name, value in row.items() if name not in ("device", "versions")})
        record.save(path)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def measure(self, runs: Sequence[Run]) -> bool:
        """Whether everything is measured; False when the time was over before."""
        complete = True
        missing = [tuple(length for length in run.lengths if self.found(run, length) is None) for run in runs]
        starts = (partial(self.start, run) for run, lengths in zip(runs, missing, strict=True) if lengths)
        with closing(in_turn(starts)) as groups:
            for number, (run, lengths) in enumerate(zip(runs, missing, strict=True), 1):
                what = f"[{number}/{len(runs)}] {run.model} {run.task} {run.strategy} on {run.gpus}, {run.provider}"
                what += ", trainer" if run.trainer else ""
                complete &= self.search(run, what) if run.probe else self.lengths(run, what, lengths, groups)
        return complete

    def lengths(self, run: Run, what: str, missing: tuple[int, ...], groups: Iterator[Processes]) -> bool:
        if not missing:
            self.show(f"{what}: on file")
            return True
        if self.left < LEAST_SECONDS:
            self.show(f"{what}: not begun, {self.left:.0f} s are left")
            return False
        group = next(groups)
        began = time.monotonic()
        rows, error = group.measure(missing, self.left)
        self.show(f"{what}: took {time.monotonic() - began:.1f} s")
        for length in missing:
            if length in rows:
                self.add(run, rows[length])
                peak = rows[length]["peak_bytes"]
                self.show(
                    f"{what}, {length}: {rows[length]['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
                    + ("" if peak is None else f", {peak / 1e9:.1f} GB")
                )
            elif error == OUT_OF_TIME:
                self.show(f"{what}, {length}: {error}")
                return False
            else:
                self.show(f"{what}, {length}: {error}")
                self.add(run, failed(run, length, error or "no result"))
                if error == OUT_OF_MEMORY:
                    error = f"out of memory at {length} tokens already"
        return True

    def search(self, run: Run, what: str) -> bool:
        """Find the largest context by groups that do two steps; what was tried is kept in the row from call to call."""
        row = self.found(run, 0) or failed(run, 0, None) | {"probes": {}, "largest_length": None}
        if row["largest_length"] is not None:
            self.show(f"{what}: largest context on file")
            return True
        probes = {int(length): fits for length, fits in row["probes"].items()}
        peaks: dict[int, float] = {}
        capacity = row.get("capacity_bytes")
        for other in self.record(run.task)[0].rows:
            same = other["provider"] == run.provider and run.shape(other["shape"]["length"]) == other["shape"]
            if same and other["shape"]["length"] and other.get("peak_bytes"):
                probes[other["shape"]["length"]] = True
                peaks[other["shape"]["length"]] = other["peak_bytes"]
            elif same and other["error"] == OUT_OF_MEMORY:
                probes[other["shape"]["length"]] = False
        step = self.granularity
        with closing(in_turn(repeat(partial(self.start, run)))) as groups:
            while (length := next_length(probes, step, step, 0.0, self.longest, peaks, capacity)) is not None:
                if self.left < LEAST_SECONDS:
                    self.show(f"{what}: largest context not finished, {self.left:.0f} s are left")
                    return False
                group = next(groups)
                began = time.monotonic()
                rows, error = group.measure((length,), self.left)
                took = f"[{time.monotonic() - began:.1f} s]"
                if error not in (None, OUT_OF_MEMORY):
                    self.show(f"{what}: {length}: {error} {took}")
                    if error == OUT_OF_TIME:
                        return False
                    self.add(run, row | {"error": error, "largest_length": 0})
                    return True
                probes[length] = error is None
                if error is None:
                    peak, capacity = rows[length]["peak_bytes"], rows[length].get("capacity_bytes")
                    if peak is not None:
                        peaks[length] = peak
                self.show(f"{what}: {length} tokens {'fit' if error is None else 'do not fit'} {took}")
                row = row | {"probes": {str(each): fits for each, fits in sorted(probes.items())}}
                self.add(run, row | {"capacity_bytes": capacity})
        largest = max((each for each, fits in probes.items() if fits), default=0)
        self.add(run, row | {"largest_length": largest, "capacity_bytes": capacity})
        return True


def failed(run: Run, length: int, error: str | None) -> Row:
    """A row without figures."""
    return {
        "provider": run.provider,
        "dtype": "bfloat16",
        "shape": run.shape(length),
        "error": error,
        "step_ms": None,
        "tokens_per_second_per_gpu": None,
        "peak_bytes": None,
        "losses": None,
        "collectives": None,
    }


def name_of_device() -> str:
    """Asked in a process of its own: one that has asked holds memory of the device until it ends."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from harness.record import device_name; "
        "a = torch.accelerator; "
        "print(device_name(a.current_accelerator() if a.is_available() else torch.device('cpu')))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).resolve().parents[1])]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--gpus", type=int, default=2, help="processes; with scaling, the most")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, help="of the preset's, only these")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="of the preset's, only these")
    parser.add_argument("--lengths", nargs="+", type=int, help="of the preset's contexts, only these")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no more is started")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, for a CPU")
    options = parser.parse_args(arguments)
    runs = [
        run
        for run in PRESETS[options.preset](options.gpus)
        if (not options.strategies or run.strategy in options.strategies)
        and (not options.providers or run.provider in options.providers)
    ]
    if options.lengths:
        runs = [replace(run, lengths=tuple(each for each in run.lengths if each in options.lengths)) for run in runs]
        runs = [run for run in runs if run.lengths]
    if options.dry_run:
        runs = [tiny(run) for run in runs]
    options.results.mkdir(parents=True, exist_ok=True)
    for path in RESULTS.glob("distributed_*.json"):
        if not (options.results / path.name).exists() and not options.dry_run:
            shutil.copy(path, options.results)
    size = {"longest": 64, "granularity": 32} if options.dry_run else {}
    sweep = Sweep(options.results, name_of_device(), 60 * options.minutes, **size)
    complete = sweep.measure(runs)
    print("complete" if complete else "not complete: run it again, with the files of this call where it looks for them")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception, which ends what it started
    sys.exit(main())
