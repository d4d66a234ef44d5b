"""``pytest -m perf``: no op is slower than when its results were stored, on the device that they were measured on.

Times are compared as multiples of their floors, a copy or the bare products measured in the same run, so that a device
that runs at other clocks than then is no failure.
"""

from __future__ import annotations

import pytest

import report
from harness.benchmark import Case
from harness.measure import current_device
from harness.record import Record, device_name, device_slug
from harness.run import RESULTS, Runner, times_floor

ALLOWED = 1.10
ATTEMPTS = 3


@pytest.mark.perf
@pytest.mark.parametrize(
    ("op", "case"),  # "benchmark" is a fixture of pytest-benchmark, where that is installed
    [(op, case) for op in report.BENCHMARKS for case in op.bars],
    ids=lambda each: getattr(each, "name", None) or str(each),
)
def test_no_slower_than_stored(op, case):
    device = current_device()
    if device.type == "cpu":
        pytest.skip("needs an accelerator")
    name = device_name(device)
    path = RESULTS / f"{op.name}_{device_slug(name)}.json"
    record = Record.load(path) if path.exists() else None
    if record is None or record.device != name:
        pytest.skip(f"no results of {name}")
    stored = [row for row in record.rows if row["provider"] == "ours" and Case(row["dtype"], **row["shape"]) == case]
    if not stored or stored[0]["event_ms"] is None:
        pytest.skip("no stored time of this shape")
    allowed = ALLOWED * times_floor(stored[0])
    ratios = []
    for _ in range(ATTEMPTS):  # a busy machine makes one run slow, a slow kernel all of them
        row = Runner(op, device).measure(case, "ours")
        assert row["error"] is None
        ratios.append(times_floor(row))
        if ratios[-1] <= allowed:
            return
    pytest.fail(f"{min(ratios):.3f} times the floor, stored {times_floor(stored[0]):.3f}, allowed {allowed:.3f}")
