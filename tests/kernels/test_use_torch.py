"""The switches that put an op's torch implementation in its kernel's place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from liger_trainer.kernels import _force_torch, _library, geglu, rms_norm, rotary, use_torch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which implementation served, on a device with Triton that is the CPU."""
    found: list[str] = []

    def noting(name, function):
        def call(*args):
            found.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(_library, "TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(_library, "HAS_TRITON", True)
    for op in _library.OPS.values():
        monkeypatch.setattr(op, "_direct", {})
        if op.kernel is not None:
            monkeypatch.setattr(op, "kernel", noting(f"triton {op.name}", op.reference))
        monkeypatch.setattr(op, "reference", noting(f"torch {op.name}", op.reference))
    return found


def step() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    geglu(rms_norm(x, None), x).sum().backward()


KERNELS = [
    "triton rms_norm_forward",
    "triton gated_activation_forward",
    "triton gated_activation_backward",
    "triton rms_norm_backward",
]


def test_one_op_is_forced_and_freed_again(calls):
    calls_of = []
    for names in ((), ("rms_norm",), ("swiglu",), ("all",), ()):
        calls.clear()
        if names:
            with use_torch(*names):
                step()
        else:
            step()
        calls_of.append([each for each in calls if each.split()[0] == "torch"] if names else list(calls))
    # the kernel of this test calls the reference that was there before it was noted
    assert calls_of[0] == calls_of[-1] == KERNELS
    assert calls_of[1] == ["torch rms_norm_forward", "torch rms_norm_backward"]
    assert calls_of[2] == ["torch gated_activation_forward", "torch gated_activation_backward"]
    assert calls_of[3] == [each.replace("triton", "torch") for each in KERNELS]


def test_it_nests_and_survives_an_error(calls):
    with use_torch("rms_norm"):
        with use_torch("geglu"):
            assert _force_torch.forced_ops() == ["gated_activation", "rms_norm"]
        with pytest.raises(TypeError), use_torch("geglu"):
            geglu(torch.ones(2, dtype=torch.int64), torch.ones(2))
        assert _force_torch.forced_ops() == ["rms_norm"]
    assert _force_torch.forced_ops() == []


def test_the_dispatcher_follows(calls):
    """As a compiled graph calls the op."""
    x = torch.randn(3, 4)
    with use_torch("rms_norm"):
        torch.ops.liger_trainer.rms_norm_forward(x, None, 1e-6, 0.0, "llama")
    torch.ops.liger_trainer.rms_norm_forward(x, None, 1e-6, 0.0, "llama")
    assert calls == ["torch rms_norm_forward", "triton rms_norm_forward"]


def test_a_vendors_kernel_gives_way():
    def vendor(x, weight, eps, offset, casting):
        return torch.full_like(x, 7.0), x.new_zeros(x.shape[:-1])

    x = torch.randn(3, 5)
    with torch.library._scoped_library("liger_trainer", "IMPL") as library:
        library.impl("rms_norm_forward", vendor, "CPU")
        op = _library.OPS["rms_norm_forward"]
        assert (rms_norm(x, None) == 7).all()
        assert op.implementation("cpu") == "registered"
        with use_torch("rms_norm"):
            torch.testing.assert_close(rms_norm(x, None), torch.nn.functional.rms_norm(x, (5,), eps=1e-6))
            assert op.implementation("cpu") == "torch"
        assert (rms_norm(x, None) == 7).all()


def test_every_public_op_has_its_name():
    assert _force_torch.op_names() == [
        "add_rms_norm",
        "cross_entropy",
        "gated_activation",
        "jsd",
        "kl_div",
        "layer_norm",
        "linear_cross_entropy",
        "linear_jsd",
        "linear_log_probs",
        "rms_norm",
        "rotary",
    ]


def test_an_unknown_name_is_refused():
    with (
        pytest.raises(ValueError, match="expected 'all' or names among add_rms_norm.*got 'rmsnorm'"),
        use_torch("rmsnorm"),
    ):
        pass
    assert _force_torch.forced_ops() == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [("rms_norm, swiglu", "['gated_activation', 'rms_norm']"), ("", "[]"), ("rmsnorm", "got 'rmsnorm'")],
)
def test_the_environment(value, expected):
    script = "from liger_trainer.kernels._force_torch import forced_ops; print(forced_ops())"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LIGER_TRAINER_TORCH": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in run.stdout + run.stderr
    assert (run.returncode == 0) == (value != "rmsnorm")


def test_rotary_is_served_both_ways(calls):
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4)
    angles = torch.randn(1, 3, 4)
    kernel = rotary(q, k, angles.cos(), angles.sin())
    with use_torch():
        reference = rotary(q, k, angles.cos(), angles.sin())
    assert calls == ["triton rotary_forward", "torch rotary_forward"]
    for ours, theirs in zip(kernel, reference, strict=True):
        torch.testing.assert_close(ours, theirs)
