"""``python -m liger_trainer env``."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import liger_trainer.__main__ as command_line
from liger_trainer import _self_test, kernels
from liger_trainer.kernels._force_torch import op_names


def test_the_command_says_what_a_bug_report_needs() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "liger_trainer", "env"], capture_output=True, text=True, timeout=180, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for word in (torch.__version__, "transformers", "Triton kernels", *op_names()):
        assert word in run.stdout
    assert "FAILED" not in run.stdout
    assert run.stdout.rstrip().splitlines()[-1].startswith("VERDICT: every op agrees with its reference on")


def test_every_public_op_is_tested() -> None:
    tested = {case.name.split()[0] for case in _self_test._cases()}
    public = {name for name in kernels.__all__ if name.islower() and name != "use_torch"}
    assert tested == public


def wrong_norm(x, weight, eps, offset, casting):
    """Has lost eps, and half a per cent."""
    rstd = 1.005 * torch.rsqrt(x.float().square().mean(-1, keepdim=True))
    y = x.float() * rstd * weight.float()
    return y.to(x.dtype), rstd[..., 0].contiguous()


def raising_norm(x, weight, eps, offset, casting):
    raise RuntimeError("no such instruction")


def nan_norm(x, weight, eps, offset, casting):
    return torch.full_like(x, float("nan")), x.new_ones(x.shape[:-1], dtype=torch.float32)


@pytest.mark.parametrize("fault", [wrong_norm, raising_norm, nan_norm])
def test_a_wrong_kernel_is_named(fault, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: False)
    with torch.library._scoped_library("liger_trainer", "IMPL") as library:
        library.impl("rms_norm_forward", fault, "CPU")
        assert command_line.main(["env"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"rms_norm +registered and torch\n", said)
    failed = re.search(r"VERDICT: (\d+) of \d+ checks FAILED on cpu: (.*)\.\n", said)
    assert failed is not None
    assert {each.split()[0] for each in failed[2].split(", ")} == {"rms_norm", "rms_norm_and_residual"}
    assert ("no such instruction" in said) == (fault is raising_norm)


def test_what_was_switched_to_torch_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with kernels.use_torch("rotary"):
        assert command_line.main(["env", "--no-test"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rotary +torch, by request\n", said)
    assert "VERDICT" not in said
