"""Processes of a group (NCCL with a GPU each, else gloo) that run functions for a test: started once, used by many."""

from __future__ import annotations

import os
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["Ranks"]


def _serve(rank: int, world: int, store: str, calls: Any, results: Any) -> None:
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    while (call := calls.get()) is not None:
        function, arguments, options = call
        try:
            results.put((rank, function(*arguments, **options), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``world`` processes; a call that fails on one rank ends them all, since the others may wait for it."""

    def __init__(self, world: int, folder: Path, *, timeout: float = 300.0) -> None:
        context = mp.get_context("spawn")
        self.timeout = timeout
        self.results = context.Queue()
        self.calls = [context.Queue() for _ in range(world)]
        store = str(folder / f"store{world}_{os.getpid()}")
        self.processes = [
            context.Process(target=_serve, args=(rank, world, store, calls, self.results), daemon=True)
            for rank, calls in enumerate(self.calls)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What ``function``, a function of a module, returns on each rank.

        Raises:
            AssertionError: with the traceback of the first rank that failed.
        """
        if not self.processes:
            raise AssertionError("an earlier call failed and ended the ranks")
        for calls in self.calls:
            calls.put((function, arguments, options))
        found: dict[int, Any] = {}
        while len(found) < len(self.calls):
            try:
                rank, result, error = self.results.get(timeout=self.timeout)
            except queue.Empty:
                error, rank = f"no answer in {self.timeout} s", "?"
            if error is not None:
                self.stop()
                raise AssertionError(f"rank {rank}: {error}")
            found[rank] = result
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        for calls in self.calls:
            calls.put(None)
        for process in self.processes:
            process.join(20)
        self.stop()

    def stop(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.terminate()
                process.join()
        self.processes = []
