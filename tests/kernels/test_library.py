"""Who computes an op: what is registered here, without the dispatcher where it has no choice, or a kernel of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liger_trainer.kernels import _library, rms_norm


class Passing(TorchDispatchMode):
    """A mode that sees every op and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> _library.Op:
    """rms_norm's forward as on a device with Triton, that device being the CPU."""
    from liger_trainer.kernels.rms_norm import _forward

    monkeypatch.setattr(_library, "TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(_library, "HAS_TRITON", True)
    monkeypatch.setattr(_forward, "_direct", {})
    return _forward


@pytest.fixture
def calls(op: _library.Op, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where calls of the op went: straight to the kernel, or to the dispatcher."""
    found: list[str] = []

    def noting(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            found.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(op, "overload", noting("dispatcher", op.overload))
    monkeypatch.setattr(op, "kernel", noting("kernel", op.reference))
    return found


def arguments(x: Tensor) -> tuple[Tensor, None, float, float, str]:
    return x, None, 1e-6, 0.0, "llama"


def test_plain_tensors_skip_the_dispatcher(op, calls):
    x = torch.randn(3, 5)
    for each in (x, torch.nn.Parameter(x)):
        y, _ = op(*arguments(each))
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (5,), eps=1e-6))
    assert calls == ["kernel", "kernel"]


@pytest.mark.parametrize("observer", [Passing, torch.profiler.profile], ids=lambda each: each.__name__)
def test_who_wants_to_see_ops_sees_them(op, calls, observer):
    with observer():
        op(*arguments(torch.randn(3, 5)))
    assert calls[0] == "dispatcher"


def test_a_transform_has_its_say(op, calls):
    x = torch.randn(3, 5)
    y = torch.func.vmap(lambda row: op(*arguments(row))[0])(x)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (5,), eps=1e-6))
    assert calls[0] == "dispatcher"


def test_a_subclass_has_its_say(op, calls):
    op(*arguments(torch.randn(3, 5).as_subclass(Subclass)))
    assert calls[0] == "dispatcher"


def test_a_profile_names_the_op(op):
    with torch.profiler.profile() as profile:
        op(*arguments(torch.randn(3, 5)))
    assert "liger_trainer::rms_norm_forward" in {event.key for event in profile.key_averages()}


def test_a_kernel_registered_for_the_device_goes_before_ours(op):
    """Also where ours would have been called without the dispatcher, and without any permission to override."""
    x = torch.randn(3, 5)

    def vendor(x, weight, eps, offset, casting):
        return torch.full_like(x, 7.0), x.new_zeros(x.shape[:-1])

    with torch.library._scoped_library("liger_trainer", "IMPL") as library:
        library.impl("rms_norm_forward", vendor, "CPU")
        assert (rms_norm(x, None) == 7).all()
        assert (torch.ops.liger_trainer.rms_norm_forward(*arguments(x))[0] == 7).all()
