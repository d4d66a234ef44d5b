"""A device that PyTorch doesn't ship gets its kernels the way docs/backends.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import liger_trainer.kernels  # noqa: F401  defines the ops

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs/backends.md").read_text(encoding="utf-8")

# A device made in Python: tensors of PyTorch's PrivateUse1 device, called npu, that keep their values in a CPU tensor.
# Whatever the vendor's kernels don't do raises there, so nothing falls back unseen.
DEVICE = """
import sys, types, torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("npu")


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, values):
        tensor = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
        tensor.__class__ = cls
        tensor.values = values
        return tensor

    def __init__(self, values):
        pass


called = []


def vendor(name):
    def run(*arguments):
        called.append(name)
        op = getattr(torch.ops.liger_trainer, name)
        return tuple(map(OnDevice, op(*(a.values if isinstance(a, OnDevice) else a for a in arguments))))

    return run


npu_kernels = types.ModuleType("npu_kernels")
npu_kernels.rms_norm = vendor("rms_norm_forward")
npu_kernels.rms_norm_backward = vendor("rms_norm_backward")
sys.modules["npu_kernels"] = npu_kernels
"""

USE = """
from liger_trainer.kernels import rms_norm

torch.manual_seed(0)
values = [torch.randn(3, 5), torch.randn(5)]
upstream = torch.randn(3, 5)
x, weight = (OnDevice(v).requires_grad_() for v in values)
assert x.device.type == "npu"
y = rms_norm(x, weight, 1e-5)
assert type(y) is OnDevice and called == ["rms_norm_forward"]
gradients = torch.autograd.grad(y, (x, weight), OnDevice(upstream))
assert called == ["rms_norm_forward", "rms_norm_backward"]

x, weight = (v.clone().requires_grad_() for v in values)
expected = torch.nn.functional.rms_norm(x, (5,), weight, 1e-5)
torch.testing.assert_close(y.values, expected)
for ours, theirs in zip(gradients, torch.autograd.grad(expected, (x, weight), upstream), strict=True):
    torch.testing.assert_close(ours.values, theirs)
print("served by the vendor's kernels")
"""


def test_a_vendors_kernels_serve_its_device() -> None:
    example = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert example is not None
    # In a process of its own: a process can have one PrivateUse1 device, and keeps it.
    run = subprocess.run(
        [sys.executable, "-c", DEVICE + example[1] + USE], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "served by the vendor's kernels" in run.stdout


def test_the_document_names_every_op() -> None:
    defined = {
        schema.name.removeprefix("liger_trainer::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("liger_trainer::")
    }
    table = DOCUMENT.partition("## The ops")[2].partition("A schema is printed")[0]
    named = set(re.findall(r"`(\w+_(?:forward|backward))`", table))
    assert named == {name for name in defined if name.endswith(("_forward", "_backward"))}
