"""What the many-GPU benchmark's processes import while they wait for their turn takes nothing of a GPU.

pytest tests/gpu/test_benchmark_imports.py
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from training.distributed_worker import Run, import_for
import_for(Run("tiny", sys.argv[2], sys.argv[3], sys.argv[4], 1, 1, (16,), False, sys.argv[5] == "trainer"))
print([torch._C._cuda_hasPrimaryContext(each) for each in range(torch.cuda.device_count())])
"""
LIBRARIES = {"liger-kernel": "liger_kernel", "zero3": "deepspeed", "dpo": "trl"}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("trainer", ["loop", "trainer"])
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize(
    ("provider", "task"), [("hf", "sft"), ("liger-kernel", "sft"), ("ours", "sft"), ("ours", "dpo")]
)
def test_no_context(provider: str, task: str, strategy: str, trainer: str) -> None:
    for each in (provider, task, strategy):
        if each in LIBRARIES and importlib.util.find_spec(LIBRARIES[each]) is None:
            pytest.skip(f"needs {LIBRARIES[each]}")
    command = [sys.executable, "-c", CODE, str(BENCHMARKS), provider, task, strategy, trainer]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == str([False] * torch.cuda.device_count())
