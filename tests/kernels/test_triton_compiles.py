"""Triton compiles every kernel that the ops launch, which its interpreter can't tell; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from liger_trainer.kernels._triton import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not HAS_TRITON, reason="no usable Triton")
def test_every_launch_compiles(tmp_path):
    # A process of its own, since this one's Triton interprets.
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels", "cuda", "90", "32", "bfloat16"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout.split()[0]) > 40
