"""Run the census: ``python -m tests.census`` for everything, ``python -m tests.census --types llama`` for one type.

Types run in worker processes with a time limit each, so that none can take others with it. With no ``--types``,
docs/models.md is written. The exit status is 1 where a type is wrong, and, over all types, where fewer pass or fewer
classes are replaced than must be.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def _work() -> None:
    """Answer each line ``task type`` on stdin with a JSON line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import logging
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from .examine import examine

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print is no answer
    for line in sys.stdin:
        print(json.dumps(examine(*line.split()).as_dict()), file=answers, flush=True)


class _Worker:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None

    def ask(self, task: str, model_type: str) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name.rpartition(".")[0], "--work"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(self.seconds, process.kill)
        alarm.start()
        try:
            print(task, model_type, file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            alarm.cancel()
        if answer:
            return json.loads(answer)
        status = process.wait()
        from .examine import Result

        words = f"took more than {self.seconds:.0f} s" if status == -9 else f"its process died with status {status}"
        return Result(task, model_type, "not built", words).as_dict()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def run(asked: list[tuple[str, str]], jobs: int, seconds: float, verbose: bool = True) -> list[dict[str, Any]]:
    """Examine all, in the order in which they are asked for."""
    waiting: queue.SimpleQueue[tuple[int, str, str]] = queue.SimpleQueue()
    for number, (task, model_type) in enumerate(asked):
        waiting.put((number, task, model_type))
    results: dict[int, dict[str, Any]] = {}

    def serve() -> None:
        worker = _Worker(seconds)
        try:
            while True:
                number, task, model_type = waiting.get_nowait()
                results[number] = result = worker.ask(task, model_type)
                if verbose:
                    reason = f": {result['reason']}" if result["reason"] else ""
                    print(f"{len(results)}/{len(asked)} {task} {model_type} {result['outcome']}{reason}", flush=True)
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(asked))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types, as llama; all without")
    parser.add_argument("--task", choices=("causal", "vision"), help="only these; both without")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes side by side")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of a type")
    parser.add_argument("--json", type=Path, help="write what was found, one type a line")
    parser.add_argument("--from-json", type=Path, help="read it instead of running anything")
    parser.add_argument("--page", type=Path, help=f"write the page (default: {PAGE.name} when all types run)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work()
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from .examine import TASKS, model_types
    from .table import markdown, shortfalls, summary

    if options.from_json:
        results = [json.loads(line) for line in options.from_json.read_text(encoding="utf-8").splitlines()]
    else:
        tasks = [options.task] if options.task else list(TASKS)
        asked = [(t, name) for t in tasks for name in model_types(t) if not options.types or name in options.types]
        unknown = set(options.types or ()) - {name for _, name in asked}
        if unknown:
            parser.error(f"transformers has no causal or vision-language model of type {', '.join(sorted(unknown))}")
        results = run(asked, options.jobs, options.seconds)
    if options.json:
        options.json.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    page = options.page or (None if options.types or options.task else PAGE)
    if page is not None:
        versions = {name: version(name) for name in ("torch", "transformers")}
        page.write_text(markdown(results, versions), encoding="utf-8")
    if options.types:
        for result in results:
            print(json.dumps(result, indent=2))
    found = summary(results)
    print(json.dumps(found, indent=2))
    if options.types or options.task:
        return int(any(result["outcome"] == "wrong" for result in results))
    short = shortfalls(found)
    print("\n".join(short))
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
