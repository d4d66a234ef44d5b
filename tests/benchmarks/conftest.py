from __future__ import annotations

import pytest
import torch

from harness import measure, run


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, with as few calls as the harness can do with."""
    monkeypatch.setattr(measure, "FEWEST_CALLS", 1)
    monkeypatch.setattr(measure, "MOST_CALLS", 2)
    monkeypatch.setattr(run, "host_time", lambda call, device: measure.host_time(call, device, chunks=1, calls=1))
    return torch.device("cpu")
