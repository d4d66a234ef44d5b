"""Plant each fault of ``faults.py``, one at a time, and see a test fail.

    python -m tests.mutation.run                      # all, in a copy of the repository
    python -m tests.mutation.run --only "cross entropy" --write

The working tree is not touched. ``--write`` puts the results into the table of docs/testing.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]

COPIED = ("liger_trainer", "tests", "recipes", "benchmarks/harness", "pyproject.toml")
PAGE = ROOT / "docs/testing.md"
BEGIN, END = "<!-- written by tests/mutation/run.py -->", "<!-- end -->"


def planted(text: str, fault: Fault) -> str:
    """The file's text with the fault in it.

    Raises:
        ValueError: what is to be changed does not occur.
    """
    parts = text.split(fault.before)
    if len(parts) < fault.occurrence + 2:
        raise ValueError(f"{fault.name}: {fault.file}.py has not {fault.occurrence + 1} times {fault.before!r}")
    head, tail = parts[: fault.occurrence + 1], parts[fault.occurrence + 1 :]
    return fault.before.join(head) + fault.after + fault.before.join(tail)


def pytest(copy: Path, tests: str, timeout: float) -> tuple[str, str]:
    """("passed", ""), ("failed", the name of the test) or ("hung", "")."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    try:
        done = subprocess.run(
            [*command, *tests.split()],
            cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "hung", ""
    if done.returncode == 0:
        return "passed", ""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if found is None and done.returncode < 0:  # the fault wrote where it should not, and the process died of it
        found = re.search(r'^  File "\S*/(tests/\S+)", line \d+ in (test_\w+)$', done.stderr, re.MULTILINE)
        if found is not None:
            return "failed", f"{found[1]}::{found[2]}"
    if found is None:
        raise RuntimeError(f"pytest says nothing of use about {tests}:\n{done.stdout}\n{done.stderr}")
    return "failed", found[1]


def write_table(results: list[tuple[Fault, str, str]]) -> None:
    """Put the results into the page, beside those of faults that were not planted this time."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    known = dict(re.findall(r"^\| (.*?) \| (.*\|)$", table, re.MULTILINE))
    for fault, outcome, test in results:
        found = f"`{test.removeprefix('tests/kernels/')}`" if test else f"**{outcome}: not caught**"
        known[fault.name] = f"`{fault.file}.py` | {found} |"
    rows = [f"| {fault.name} | {known[fault.name]}" for fault in FAULTS if fault.name in known]
    caught = sum("not caught" not in row for row in rows)
    summary = f"{len(FAULTS)} faults, {len(rows)} of them planted, {caught} caught."
    header = "| fault | planted in | caught by |\n| --- | --- | --- |"
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{summary}\n\n{header}\n" + "\n".join(rows) + f"\n\n{END}{after}", encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name or file has this in it")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one fault")
    parser.add_argument("--skip-baseline", action="store_true", help="leave out the tests without a fault")
    parser.add_argument("--write", action="store_true", help="write the table of docs/testing.md")
    asked = parser.parse_args()
    faults = [fault for fault in FAULTS if asked.only in fault.name or asked.only in fault.file]
    results: list[tuple[Fault, str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source, target = ROOT / name, copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, target)
        for tests in () if asked.skip_baseline else dict.fromkeys(fault.tests for fault in faults):
            if (outcome := pytest(copy, tests, asked.timeout))[0] != "passed":
                sys.exit(f"without any fault, {tests}: {' '.join(outcome)}")
        for fault in faults:
            path = copy / "liger_trainer/kernels" / f"{fault.file}.py"
            text = path.read_text(encoding="utf-8")
            start = time.perf_counter()
            path.write_text(planted(text, fault), encoding="utf-8")
            try:
                outcome, test = pytest(copy, fault.tests, asked.timeout)
            finally:
                path.write_text(text, encoding="utf-8")
            results.append((fault, outcome, test))
            print(f"{'caught' if outcome == 'failed' else outcome.upper():<8}{fault.name}: {test} "
                  f"({time.perf_counter() - start:.0f} s)", flush=True)  # fmt: skip
            if asked.write:
                write_table(results)
    missed = [fault.name for fault, outcome, _ in results if outcome != "failed"]
    print(
        f"{len(results) - len(missed)} of {len(results)} faults caught" + "".join(f"\nNOT CAUGHT: {n}" for n in missed)
    )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
