from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from liger_trainer import kernels
from liger_trainer.patching import apply_liger_kernel, plan

HIDDEN, INNER = 24, 37


class Mlp(nn.Module):
    def __init__(self, act=F.silu, hidden=HIDDEN, inner=INNER, bias=False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = act

    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


class OtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w2, self.w3, self.w1 = nn.Linear(INNER, HIDDEN), nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)

    def forward(self, states):
        return self.w2(self.w3(states) * F.silu(self.w1(states)))


class Fused(nn.Module):
    gate_first = True

    def __init__(self) -> None:
        super().__init__()
        self.down, self.both = nn.Linear(INNER, HIDDEN), nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.activation = nn.GELU()

    def forward(self, states):
        gate, up = self.both(states).chunk(2, dim=-1)
        if not self.gate_first:
            gate, up = up, gate
        return self.down(self.activation(gate) * up)


class FusedUpFirst(Fused):
    gate_first = False

    def forward(self, states):
        return super().forward(states)


class ActivationInFloat(Mlp):
    """Rounds once, as the kernel does."""

    def forward(self, states):
        activated = self.act_fn(self.gate_proj(states).float()) * self.up_proj(states).float()
        return self.down_proj(activated.to(states.dtype))


class DropoutBeforeDown(Mlp):
    def __init__(self, p=0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, states):
        return self.down_proj(self.drop(self.act_fn(self.gate_proj(states)) * self.up_proj(states)))


KNOWN = [
    (DropoutBeforeDown, "swiglu"),
    (Mlp, "swiglu"),
    (lambda: Mlp(nn.SiLU()), "swiglu"),
    (lambda: Mlp(nn.GELU()), "geglu(none)"),
    (lambda: Mlp(nn.GELU("tanh"), bias=True), "geglu(tanh)"),
    (lambda: Mlp(hidden=INNER), "swiglu"),
    (OtherNames, "swiglu"),
    (Fused, "geglu(none)"),
    (FusedUpFirst, "geglu(none)"),
]


def run(mlp, x):
    x = x.detach().requires_grad_()
    y = mlp(x)
    upstream = torch.linspace(0, 99, y.numel()).cos().bfloat16().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *mlp.parameters()], upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("make", "kernel"), KNOWN)
def test_known_mlps(make, kernel, dtype):
    mlp, plain = make().to(dtype), make().double()
    plain.load_state_dict(mlp.state_dict())
    report = apply_liger_kernel(nn.ModuleDict({"part": mlp}))
    assert [(entry.path, entry.kernel) for entry in report.replaced] == [("part", kernel)]
    hidden = HIDDEN if hasattr(mlp, "both") or hasattr(mlp, "w1") else mlp.gate_proj.in_features
    x = (torch.randn(2, 5, hidden, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for ours, truth in zip(run(mlp, x), run(plain, x.double()), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()
    assert torch.equal(mlp(states=x), mlp(x))
    assert inspect.signature(mlp.forward) == inspect.signature(plain.forward)


class CastForDown(Mlp):
    """T5 1.1: GELU written out, dropout, and the last projection perhaps in fp32."""

    def __init__(self, act=None, p=0.0) -> None:
        super().__init__(act or ACT2FN["gelu_new"])
        self.drop = nn.Dropout(p)

    def forward(self, states):
        states = self.drop(self.act_fn(self.gate_proj(states)) * self.up_proj(states))
        weight = self.down_proj.weight
        if isinstance(weight, torch.Tensor) and states.dtype != weight.dtype and weight.dtype != torch.int8:
            states = states.to(weight.dtype)
        return self.down_proj(states)


class CastForGate(Mlp):
    def forward(self, states):
        return super().forward(states.to(self.gate_proj.weight.dtype))


class CastAndScale(CastForDown):
    """Something else where the cast does something."""

    def forward(self, states):
        states = self.act_fn(self.gate_proj(states)) * self.up_proj(states)
        if states.dtype != self.down_proj.weight.dtype:
            states = states.to(self.down_proj.weight.dtype) * 1.1
        return self.down_proj(states)


class CastToFloat(CastForDown):
    def forward(self, states):
        assert self.down_proj.weight.dtype
        states = self.act_fn(self.gate_proj(states)) * self.up_proj(states)
        return self.down_proj(states.float()).to(states.dtype)


@pytest.mark.parametrize("act", ["gelu_new", "silu", "gelu"])
@pytest.mark.parametrize("down_dtype", [torch.float32, torch.bfloat16])
def test_an_input_of_down_that_is_cast_to_its_weights_dtype(act, down_dtype):
    torch.manual_seed(0)
    mlp = CastForDown(ACT2FN[act]).bfloat16()
    mlp.down_proj.to(down_dtype)
    plain, exact = copy.deepcopy(mlp), copy.deepcopy(mlp).double()
    report = apply_liger_kernel(nn.ModuleDict({"part": mlp}), gelu=False)
    kernel = {"gelu_new": "geglu(tanh)", "silu": "swiglu", "gelu": "geglu(none)"}[act]
    assert [(entry.path, entry.kernel) for entry in report.replaced] == [("part", kernel)]
    x = (torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    for ours, theirs, truth in zip(run(mlp, x), run(plain, x), run(exact, x.double()), strict=True):
        assert ours.dtype == theirs.dtype
        errors = [float((each.double() - truth).norm() / truth.norm()) for each in (ours, theirs)]
        assert errors[0] < (min(1.5e-2, 1.1 * errors[1]) if act == "gelu_new" else 6e-3)
    mlp.down_proj.double()  # what the weight has by then counts
    mlp.down_proj.bias = None
    assert mlp(x).dtype == torch.float64


def test_a_model_in_fp32_whose_gelu_is_written_out():
    mlp = CastForDown()
    plain = copy.deepcopy(mlp)
    assert apply_liger_kernel(nn.ModuleDict({"part": mlp})).counts()["mlp"] == 1
    x = torch.randn(3, HIDDEN)
    for ours, theirs in zip(run(mlp, x), run(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_gelu_saves_is_not_counted_twice():
    entries = {e.kind: e.saves for e in plan(nn.ModuleDict({"part": CastForDown()}), batch=2, length=5).replaced}
    assert entries["mlp"] > 0 and not entries["gelu"]


def test_one_rounding_or_two():
    """In float64 both are one formula; the kernel serves both, and is nearer to it than two roundings."""
    mlp = ActivationInFloat().bfloat16()
    assert apply_liger_kernel(nn.ModuleDict({"part": mlp})).counts() == {"mlp": 1}
    x = torch.randn(3, HIDDEN).bfloat16()
    assert torch.equal(mlp(x), ActivationInFloat.forward(mlp, x))


def test_dropout_drops_what_it_did():
    mlp = DropoutBeforeDown(0.3)
    plain = copy.deepcopy(mlp)
    assert apply_liger_kernel(nn.ModuleDict({"part": mlp})).counts() == {"mlp": 1}
    x = torch.randn(3, HIDDEN)
    results = []
    for each in (mlp, plain):
        torch.manual_seed(5)
        results.append(run(each, x))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(mlp.eval()(x), plain.eval()(x))


def test_projections_are_called_as_modules_and_never_read():
    class Adapter(nn.Module):
        """A projection without a weight of its own, as a quantised layer or an adapter."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = inner.in_features, inner.out_features
            self.register_buffer("codes", torch.zeros(3, dtype=torch.uint8))
            self.inner = [inner]

        def forward(self, x):
            return self.inner[0](x) + 1

    mlp = Mlp()
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, Adapter(getattr(mlp, name)))
    calls = []
    mlp.gate_proj.register_forward_hook(lambda *_: calls.append("gate"))
    x = torch.randn(3, HIDDEN)
    expected = mlp(x)
    assert apply_liger_kernel(nn.ModuleDict({"part": mlp})).counts() == {"mlp": 1}
    assert calls == ["gate"]  # the probe ran on projections of its own
    torch.testing.assert_close(mlp(x), expected)
    assert calls == ["gate", "gate"]
    mlp.gate_proj = nn.Linear(HIDDEN, INNER)  # an adapter that is added after patching
    torch.testing.assert_close(mlp(x), Mlp.forward(mlp, x))


def test_large_and_meta_projections_cost_nothing():
    with torch.device("meta"):
        mlp = Mlp(hidden=8192, inner=28672).bfloat16()
    assert plan(nn.ModuleDict({"part": mlp})).counts() == {"mlp": 1}


class Clamped(Mlp):
    def forward(self, states):
        gate, up = self.gate_proj(states).clamp(max=7.0), self.up_proj(states).clamp(-7.0, 7.0)
        return self.down_proj(self.act_fn(gate) * up)


class Multiplied(Mlp):
    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states) * 0.9) * self.up_proj(states)) * 1.1


class InnerNorm(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(INNER)

    def forward(self, states):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(states)) * self.up_proj(states)))


class WithDropout(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, states):
        return self.drop(super().forward(states))


class FunctionalDropout(Mlp):
    def forward(self, states):
        return F.dropout(super().forward(states), 0.2, self.training)


class ReadsItsWeight(Mlp):
    def forward(self, states):
        hidden = self.act_fn(F.linear(states, self.gate_proj.weight)) * self.up_proj(states)
        return self.down_proj(hidden)


class Scaled(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, states):
        return self.scale * super().forward(states)


class Detached(Mlp):
    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states).detach()) * self.up_proj(states))


class Interleaved(Fused):
    def forward(self, states):
        both = self.both(states)
        return self.down(self.activation(both[..., ::2]) * both[..., 1::2])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Clamped, "computes something else"),
        (Multiplied, "computes something else"),
        (InnerNorm, "has a child with parameters (norm: RMSNorm)"),
        (WithDropout, "computes something else than down(silu or gelu(gate(x)) * up(x)), which shows in bfloat16"),
        (FunctionalDropout, "computes something else"),
        (ReadsItsWeight, "its forward raises AttributeError"),
        (CastForGate, "computes something else"),
        (lambda: CastAndScale(nn.SiLU()), "differs by"),
        (lambda: CastToFloat(nn.SiLU()), "its forward raises RuntimeError"),
        (Scaled, "has parameters or buffers of its own"),
        (Detached, "gradient"),
        (Interleaved, "computes something else"),
        (lambda: Mlp(F.relu), "computes something else"),
        (lambda: Mlp(lambda x: x * torch.sigmoid(1.702 * x)), "computes something else"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_looks_like_a_gated_mlp_is_left_alone(make, reason, dtype):
    model = nn.ModuleDict({"part": make().to(dtype)})
    state = torch.get_rng_state()
    report = plan(model, rms_norm=False)
    assert report.replaced == ()
    assert [entry.path for entry in report.skipped] == ["part"]
    assert reason in report.skipped[0].reason
    assert torch.equal(torch.get_rng_state(), state)


def test_every_instance_is_checked():
    class Limited(Mlp):
        def forward(self, states):
            gate, up = self.gate_proj(states), self.up_proj(states)
            if self.limit is not None:
                up = up.clamp(-self.limit, self.limit)
            return self.down_proj(self.act_fn(gate) * up)

    parts = nn.ModuleList([Limited() for _ in range(3)])
    for part, limit in zip(parts, (None, 5.0, None), strict=True):
        part.limit = limit
    report = plan(parts)
    assert [entry.path for entry in report.replaced] == ["0", "2"]
    assert [entry.path for entry in report.skipped] == ["1"]


def test_other_modules_are_passed_over_in_silence():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

        def forward(self, x, mask=None):
            return self.q(x) + self.k(x) + self.v(x)

    assert not plan(nn.ModuleList([Plain(), Attention(), nn.Linear(3, 3)])).skipped


def halved(gate, up):
    return 0.5 * swiglu(gate, up)


def swapped(gate, up):
    return swiglu(up, gate)


def no_gradient_for_up(gate, up):
    return swiglu(gate, up.detach())


def sigmoid_gradient(gate, up):
    return F.silu(gate).detach() * up + (gate * torch.sigmoid(gate).detach() - F.silu(gate).detach()) * up.detach()


swiglu = kernels.swiglu


@pytest.mark.parametrize("wrong", [halved, swapped, no_gradient_for_up, sigmoid_gradient])
def test_a_wrong_kernel_is_found_out(monkeypatch, wrong):
    monkeypatch.setattr(kernels, "swiglu", wrong)
    for dtype in (torch.float32, torch.bfloat16):
        (entry,) = plan(nn.ModuleDict({"part": Mlp().to(dtype)})).skipped
        assert "differs by" in entry.reason or "only one of the two has a gradient" in entry.reason
