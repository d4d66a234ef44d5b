"""The processes of one run of the many-GPU benchmark, which import what they need before it is their turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.record import Row
from training.contexts import OUT_OF_MEMORY
from training.distributed_worker import GO, POLL_SECONDS, Run, as_json

__all__ = ["OUT_OF_TIME", "Group", "Measured"]

OUT_OF_TIME = "out of time"
WORKER = Path(__file__).with_name("distributed_worker.py")

Measured = tuple[dict[int, Row], str | None]


class Group:
    """Starts ``run.gpus`` processes under torchrun. They import, and use no device before :meth:`measure`.

    ``run.lengths`` don't matter. The processes end with :meth:`measure`, with :meth:`close`, or when this process is
    gone while they wait.
    """

    def __init__(self, run: Run) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.gpus}"]
        with (folder / "log").open("w") as output:
            self._process = subprocess.Popen(
                [*command, str(WORKER), as_json(run), str(folder), str(os.getpid())],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1"} | os.environ,
                start_new_session=True,
            )

    def measure(self, lengths: Sequence[int], seconds: float) -> Measured:
        """Let the processes measure; (rows by length, what ended it before all lengths were measured or None).

        The error is ``OUT_OF_TIME`` where ``seconds`` were over. Whatever happens, no process is left afterwards.
        """
        folder = Path(self._folder.name)
        (folder / "lengths").write_text(json.dumps(lengths))
        (folder / "lengths").rename(folder / GO)  # whole at once
        rows_at = [folder / f"{length}.json" for length in lengths]
        until = time.monotonic() + seconds
        error = None
        try:
            # Once the last row is there, nothing that processes do on their way out is worth waiting for.
            while self._process.poll() is None and not all(path.exists() for path in rows_at):
                if time.monotonic() > until:
                    error = OUT_OF_TIME
                    break
                time.sleep(POLL_SECONDS)
        finally:
            end(self._process)
        rows = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
        reasons = [path.read_text() for path in sorted(folder.glob("error*.txt"))]
        if len(rows) == len(lengths):
            return rows, None
        if OUT_OF_MEMORY in reasons:
            return rows, OUT_OF_MEMORY
        lines = (folder / "log").read_text().strip().splitlines() or ["no output"]
        return rows, error or (reasons[0] if reasons else lines[-1])

    def close(self) -> None:
        """End the processes."""
        end(self._process)
        self._folder.cleanup()


def end(process: subprocess.Popen[Any]) -> None:
    """End torchrun, where it still runs, and the processes that it has started, each in a session of its own."""
    if process.poll() is not None:
        return
    torchrun = psutil.Process(process.pid)
    torchrun.suspend()  # so that it starts no more of them
    started = torchrun.children(recursive=True)
    for each in (*started, torchrun):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    until = time.monotonic() + 10
    while not all(map(ended, started)) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def ended(process: psutil.Process) -> bool:
    """Whether it holds nothing any more; a container's first process may never collect its exit status."""
    try:
        # Its first thread may be through while others still give the device back.
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
    except psutil.NoSuchProcess:
        return True
