from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_trainer import kernels
from liger_trainer.patching import apply_liger_kernel, plan


def rms(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Weighted(nn.Module):
    """A norm under names that say nothing: what it computes is all there is to go by."""

    def __init__(self, size: int = 40, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.tiny_number = eps


class CastBefore(Weighted):
    def forward(self, states):
        return self.weight * rms(states.float(), self.tiny_number).to(states.dtype)


class CastAfter(Weighted):
    def forward(self, states):
        return (self.weight.float() * rms(states.float(), self.tiny_number)).to(states.dtype)


class OnePlusAfter(Weighted):
    def forward(self, states):
        return (rms(states.float(), self.tiny_number) * (1 + self.weight.float())).to(states.dtype)


class OnePlusBefore(Weighted):
    def forward(self, states):
        return (1 + self.weight) * rms(states.float(), self.tiny_number).to(states.dtype)


class KeepsFloat(Weighted):
    """Like T5's: with a weight in fp32 the result is not rounded to the input's dtype."""

    def forward(self, states):
        normalised = rms(states.float(), self.tiny_number)
        return self.weight * (normalised if self.weight.dtype == torch.float32 else normalised.to(self.weight.dtype))


class Weightless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5

    def forward(self, states):
        return rms(states.float(), self.eps).to(states.dtype)


class RoundedRoot(Weightless):
    def forward(self, states):
        return states * torch.rsqrt(states.float().square().mean(-1, keepdim=True) + self.eps).to(states.dtype)


class ConstantEps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(40))

    def forward(self, states):
        return self.weight * rms(states.float(), 1e-5).to(states.dtype)


class HandWrittenLayerNorm(Weighted):
    def forward(self, states):
        x = states.float()
        x = x - x.mean(-1, keepdim=True)
        return (self.weight.float() * rms(x, self.tiny_number)).to(states.dtype)


class OnePlusLayerNorm(nn.LayerNorm):
    def forward(self, states):
        return F.layer_norm(states, self.normalized_shape, self.weight + 1, self.bias, self.eps)


KNOWN = [
    (CastBefore, "rms_norm(llama)"),
    (CastAfter, "rms_norm(gemma)"),
    (OnePlusAfter, "rms_norm(gemma, weight + 1)"),
    (OnePlusBefore, "rms_norm(llama, weight + 1)"),
    (KeepsFloat, "rms_norm(llama)"),
    (Weightless, "rms_norm(llama)"),
    (RoundedRoot, "rms_norm(llama)"),
    (ConstantEps, "rms_norm(llama)"),
    (lambda: nn.RMSNorm(40), "rms_norm(none)"),
    (lambda: nn.RMSNorm(40, eps=1e-5), "rms_norm(none)"),
    (lambda: nn.RMSNorm(40, elementwise_affine=False), "rms_norm(none)"),
    (lambda: nn.LayerNorm(40), "layer_norm"),
    (lambda: nn.LayerNorm(40, bias=False), "layer_norm"),
    (lambda: nn.LayerNorm(40, elementwise_affine=False), "layer_norm"),
    (HandWrittenLayerNorm, "layer_norm"),
    (lambda: OnePlusLayerNorm(40), "layer_norm, weight + 1"),
]


def run(norm, x):
    x = x.detach().requires_grad_()
    y = norm(x)
    upstream = torch.linspace(0, 999, y.numel()).cos().bfloat16().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *getattr(norm, "parameters", list)()], upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("make", "kernel"), KNOWN)
def test_known_norms(make, kernel, dtype):
    norm = make().to(dtype)
    model = nn.ModuleDict({"part": norm})
    report = apply_liger_kernel(model)
    assert [(entry.path, entry.kernel) for entry in report.replaced] == [("part", kernel)]

    # The original in float64 is the reference: its own gradients in half precision are worse than the kernel's.
    plain = make().double()
    if getattr(plain, "eps", 0.0) is None:
        plain.eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    with torch.no_grad():
        for parameter, other in zip(norm.parameters(), plain.parameters(), strict=True):
            parameter.copy_(torch.linspace(-2, 1, 40))
            other.copy_(parameter)
    x = (torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(0)) * 0.01).to(dtype)
    tolerance = {torch.float32: 2e-6, torch.float64: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for ours, truth in zip(run(norm, x), run(plain, x.double()), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32,) * 2]
)
@pytest.mark.parametrize(("make", "kernel"), KNOWN)
def test_mixed_dtypes_and_autocast_give_what_the_original_gives(make, kernel, dtypes, autocast):
    x_dtype, weight_dtype = dtypes
    norm, plain = make().to(weight_dtype), make().to(weight_dtype)
    apply_liger_kernel(nn.ModuleDict({"part": norm}))
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            theirs = run(plain, x)
        except RuntimeError:
            pytest.skip("PyTorch refuses this combination")
        ours = run(norm, x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()


def test_weight_and_eps_are_read_when_it_runs():
    norm, plain = CastBefore(), CastBefore()
    apply_liger_kernel(nn.ModuleDict({"part": norm}))
    for part in (norm, plain):
        part.tiny_number = 0.5
        part.weight = nn.Parameter(torch.arange(40.0))
    x = torch.randn(2, 40)
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(norm(states=x), norm(x))
    assert inspect.signature(norm.forward) == inspect.signature(plain.forward)


def test_the_right_attribute_is_the_eps():
    class TwoNumbers(CastBefore):
        def __init__(self) -> None:
            super().__init__()
            del self.tiny_number
            self.dropout, self.tiny_number = 1e-5, 1e-5

    norm = TwoNumbers()
    apply_liger_kernel(nn.ModuleDict({"part": norm}))
    norm.dropout = 0.9
    x = torch.randn(2, 40)
    torch.testing.assert_close(norm(x), rms(x, 1e-5), rtol=1e-5, atol=1e-6)


def test_sharded_weight():
    norm = CastBefore()
    norm.weight.data = torch.empty(0)
    norm.weight.ds_shape = torch.Size([40])
    assert plan(nn.ModuleDict({"part": norm})).counts() == {"rms_norm": 1}


class Scaled(CastBefore):
    def forward(self, states):
        return 1.5 * super().forward(states)


class Clamped(CastBefore):
    def forward(self, states):
        return super().forward(states).clamp(-2, 2)


class GatedRMSNorm(CastBefore):
    def forward(self, states, gate=None):
        return super().forward(states)


class PerHead(Weighted):
    def forward(self, states):
        heads = states.unflatten(-1, (4, -1)).float()
        return self.weight * rms(heads, self.tiny_number).flatten(-2).to(states.dtype)


class RoundedInHalf(Weighted):
    """All in the input's dtype: equal in fp32 only."""

    def forward(self, states):
        return self.weight * rms(states, self.tiny_number)


class OnlyInEvaluation(CastBefore):
    def forward(self, states):
        return states if self.training else super().forward(states)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None, dy


class WrongGradient(CastBefore):
    def forward(self, states):
        return StraightThrough.apply(super().forward(states), states)


def renamed(cls):
    return type(cls.__name__ + "RMSNorm", (cls,), {})()


@pytest.mark.parametrize("cls", [Scaled, Clamped, PerHead, RoundedInHalf, OnlyInEvaluation])
def test_what_only_looks_like_a_norm_is_left_alone(cls):
    # "super" in a forward of a subclass keeps its cell, so the subclass alone is renamed.
    report = plan(nn.ModuleDict({"part": renamed(cls)}))
    assert report.replaced == ()
    assert [(e.path, e.reason) for e in report.skipped] == [("part", "computes none of the known norm formulas")]


def test_wrong_gradient_is_left_alone():
    report = plan(nn.ModuleDict({"part": WrongGradient()}))
    assert report.replaced == ()
    assert "gradient" in report.skipped[0].reason


def test_other_modules_are_passed_over_in_silence():
    model = nn.Sequential(
        nn.SiLU(), nn.Dropout(0.3), nn.PReLU(40), nn.LeakyReLU(), nn.BatchNorm1d(40), nn.Embedding(3, 40),
        nn.Conv1d(4, 4, 3), nn.Linear(40, 3), nn.Identity(), GatedRMSNorm(), nn.LayerNorm((3, 40)),
    )  # fmt: skip
    state = torch.get_rng_state()
    assert plan(model).replaced == ()
    assert {entry.class_name for entry in plan(model).skipped} <= {"BatchNorm1d", "GatedRMSNorm", "LayerNorm"}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_input_is_named():
    (entry,) = plan(nn.ModuleDict({"part": GatedRMSNorm()})).skipped
    assert (entry.kind, entry.path, entry.reason) == ("rms_norm", "part", "takes more than one input")


def test_what_is_normalised_may_be_changed_in_place():
    """As XLM does: autograd forbids that of a view made by a function, which a kernel's result may be."""
    norm, plain = nn.LayerNorm(40), nn.LayerNorm(40)
    apply_liger_kernel(nn.ModuleDict({"part": norm}))
    x = torch.randn(3, 7, 40)
    ours, theirs = (run(lambda x, each=each: each(x).mul_(2), x) for each in (norm, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_forward_set_on_the_instance_is_left_alone():
    norm = nn.RMSNorm(40)
    norm.forward = lambda x: x
    (entry,) = plan(nn.ModuleDict({"part": norm})).skipped
    assert "set on the instance" in entry.reason


def wrong_offset(x, weight, eps=1e-6, *, offset=0.0, casting="llama"):
    return kernels_rms_norm(x, weight, eps, offset=0.0, casting=casting)


def wrong_eps(x, weight, eps=1e-6, *, offset=0.0, casting="llama"):
    return kernels_rms_norm(x, weight, 1e-6, offset=offset, casting=casting)


def wrong_gradient(x, weight, eps=1e-6, *, offset=0.0, casting="llama"):
    rstd = torch.rsqrt(x.detach().float().pow(2).mean(-1, keepdim=True) + eps)
    return ((x.float() * rstd) * (offset + weight.float())).to(x.dtype)


def wrong_weight_gradient(x, weight, eps=1e-6, *, offset=0.0, casting="llama"):
    return kernels_rms_norm(x, weight.detach() * 2 - weight.detach() + 0 * weight, eps, offset=offset, casting=casting)


def refusing(x, weight, eps=1e-6, *, offset=0.0, casting="llama"):
    raise NotImplementedError("no kernel for this device")


kernels_rms_norm = kernels.rms_norm


@pytest.mark.parametrize("wrong", [wrong_offset, wrong_eps, wrong_gradient, wrong_weight_gradient, refusing])
def test_a_wrong_kernel_is_found_out(tiny, monkeypatch, wrong):
    monkeypatch.setattr(kernels, "rms_norm", wrong)
    model = tiny("Gemma", rms_norm_eps=1e-4)
    report = apply_liger_kernel(model, fused_linear_cross_entropy=False)
    assert report.counts() == {"mlp": 2, "rope": 2}
    assert {entry.kind for entry in report.skipped} == {"rms_norm"}
    assert len(report.skipped) == 5


def test_an_unchecked_norm_leaves_what_could_differ_to_the_original(monkeypatch):
    norm, x = KeepsFloat(), torch.randn(3, 40)
    assert apply_liger_kernel(nn.ModuleDict({"part": norm}), check=False).replaced[0].checked == ()
    monkeypatch.setattr(kernels, "rms_norm", refusing)
    assert norm(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    with pytest.raises(NotImplementedError):
        norm(x)
