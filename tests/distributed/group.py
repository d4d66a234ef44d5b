"""Processes that stay: a group of them starts once, with gloo or NCCL between them, and runs function after function.

Starting a process costs seconds of imports, running a tiny model does not.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 240.0  # seconds for one function, DeepSpeed's compiling included; a hang ends here


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def device() -> torch.device:
    """Where this process computes."""
    kind = os.environ.get("GROUP_DEVICE", "cpu")
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind != "cpu" else torch.device("cpu")


def _serve(rank: int, size: int, port: int, kind: str, connection: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR=kind,
        GROUP_DEVICE=kind,
        HF_HUB_OFFLINE="1",
    )
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            function, arguments, options = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*arguments, **options), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


class Group:
    """``size`` processes; :meth:`run` calls a function in each of them."""

    def __init__(self, size: int, device: str = "cpu") -> None:
        self.size = size
        self.device = device
        self._processes: list[Any] = []
        self._connections: list[Any] = []

    def _start(self) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, self.device, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What ``function(*arguments, **options)`` returned in each process, by rank.

        Raises:
            AssertionError: with the traceback of a process in which it raised, or where one gave no answer in time.
                The group starts afresh at the next call.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments, options))
        results, failures = [], []
        for rank, connection in enumerate(self._connections):
            # Once one process has failed, the others may wait for it for ever.
            if connection.poll(2.0 if failures else TIMEOUT):
                try:
                    result, failure = connection.recv()
                except (EOFError, OSError):
                    result, failure = None, "the process has ended"
            else:
                result, failure = None, "no answer"
            results.append(result)
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
