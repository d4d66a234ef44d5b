"""A process of its own for whatever may run out of memory or time, or crash: it answers one request after another."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

__all__ = ["Isolated", "IsolatedError", "in_turn"]

Answer = Callable[[Any], Any]
GRACE_SECONDS = 3


class IsolatedError(Exception):
    """The process gave no answer.

    The message says why. ``output`` is the end of what the process had written.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def _work(make: Callable[..., Answer], arguments: tuple[Any, ...], requests: Connection, log: str) -> None:
    with Path(log).open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            answer = make(*arguments)
            while True:
                requests.send(("answer", answer(requests.recv())))
        except EOFError:  # nobody asks any more
            return
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            kind = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {lines[0][:300]}"
            requests.send(("error", kind))
            raise  # the traceback goes to the log


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: an accelerator's, or the CPU allocator's, which raises a plain RuntimeError."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Isolated:
    """Runs ``make(*arguments)`` in a fresh process, and there what it returns, once for each request.

    Args:
        make: an importable function; it returns the function that answers requests.
        arguments: for ``make``; like requests and answers they are pickled.
        environment: variables that the process has besides those of this one.
    """

    def __init__(self, make: Callable[..., Answer], *arguments: Any, environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._requests, theirs = context.Pipe()
        handle, log = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._log = Path(log)
        self._process = context.Process(target=_work, args=(make, arguments, theirs, log), daemon=True)
        before = {name: os.environ.get(name) for name in environment or {}}
        os.environ.update(environment or {})
        try:
            self._process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            theirs.close()

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to a request.

        Raises:
            IsolatedError: none came: ``make`` or its function raised, the process died, or ``seconds`` passed. The
                process has ended then.
        """
        try:
            self._requests.send(request)
            if not self._requests.poll(max(0.0, seconds)):
                raise self._failed(f"took more than {seconds:.0f} s")
            kind, value = self._requests.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(10)
            raise self._failed(f"the process ended with exit code {self._process.exitcode}") from None
        if kind == "error":
            raise self._failed(value)
        return value

    def _failed(self, reason: str) -> IsolatedError:
        self._end()
        error = IsolatedError(reason, self._log.read_text(errors="replace")[-3000:])
        self.close()
        return error

    def _end(self) -> None:
        self._requests.close()  # who waits for a request ends; who is at work is given no time for it
        self._process.join(GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """End the process."""
        self._end()
        self._log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Closable(Protocol):
    def close(self) -> None: ...


Process = TypeVar("Process", bound=Closable)


def in_turn(starts: Iterable[Callable[[], Process]]) -> Iterator[Process]:
    """The processes one after the other, each started while the one before it is at work, and closed after its turn."""
    waiting: Process | None = None
    try:
        for start in starts:
            current, waiting = waiting, start()
            if current is not None:
                with closing(current):
                    yield current
        if waiting is not None:
            yield waiting
    finally:
        if waiting is not None:
            waiting.close()
