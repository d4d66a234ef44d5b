"""Experts: their gate, under every implementation of their products, against the untouched module."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import use_experts_implementation

from liger_trainer import kernels
from liger_trainer.patching import apply_liger_kernel, plan, revert

EXPERTS, HIDDEN, INNER = 4, 24, 40


class Experts(nn.Module):
    act_fn = staticmethod(F.silu)

    def __init__(self, config) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.2)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            total.index_add_(0, token, (inner * top_k_weights[token, place, None]).to(total.dtype))
        return total


def experts(implementation="grouped_mm", seed=0, **members):
    torch.manual_seed(seed)
    made = type("SomeExperts", (Experts,), {"forward": copy.copy(Experts.forward), **members})
    cls = use_experts_implementation(made)
    return cls(SimpleNamespace(_experts_implementation=implementation))


def clamped(self, joint):
    gate, up = joint.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=7)) * up.clamp(-7, 7)


def up_first(self, joint):
    up, gate = joint.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved(self, joint):
    return F.silu(joint[..., ::2]) * joint[..., 1::2]


def in_float(self, joint):
    gate, up = joint.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def run(module, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, HIDDEN, generator=generator).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator).to(dtype).requires_grad_()
    y = module(x, index, weights)
    upstream = torch.linspace(0, 99, y.numel()).cos().view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, weights, *module.parameters()], upstream)]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    ("members", "kernel"),
    [
        ({}, "swiglu"),
        ({"act_fn": staticmethod(F.gelu)}, "geglu(none)"),
        ({"act_fn": nn.GELU("tanh")}, "geglu(tanh)"),
        ({"_apply_gate": up_first}, "swiglu"),
        ({"_apply_gate": in_float}, "swiglu"),
    ],
)
def test_known_gates(members, kernel, implementation):
    module, plain = experts(implementation, **members), experts(implementation, **members)
    report = apply_liger_kernel(nn.ModuleDict({"part": module}))
    assert [(entry.kind, entry.path, entry.kernel) for entry in report.replaced] == [("experts", "part", kernel)]
    for ours, theirs in zip(run(module), run(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    revert(module)
    assert type(module)._apply_gate.__name__ == type(plain)._apply_gate.__name__
    for ours, theirs in zip(run(module), run(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_is_nearer_to_the_truth_than_the_original():
    plain = experts().bfloat16()
    module = copy.deepcopy(plain)
    apply_liger_kernel(nn.ModuleDict({"part": module}))
    truth = run(copy.deepcopy(plain).float())
    for ours, theirs, true in zip(run(module, torch.bfloat16), run(plain, torch.bfloat16), truth, strict=True):
        assert (ours - true).norm() <= 1.3 * (theirs - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: experts(_apply_gate=clamped), "_apply_gate computes something else"),
        (lambda: experts(_apply_gate=interleaved), "_apply_gate computes something else"),
        (lambda: experts(act_fn=staticmethod(F.relu)), "_apply_gate computes something else"),
        (lambda: experts("eager"), "experts_implementation='eager' applies the gate by itself"),
        (lambda: experts("sonicmoe"), "experts_implementation='sonicmoe' applies the gate by itself"),
        (lambda: Experts(None), "does not run through transformers' experts interface"),
    ],
)
def test_what_only_looks_like_it_is_left_alone(make, reason):
    (entry,) = plan(nn.ModuleDict({"part": make()})).skipped
    assert entry.kind == "experts"
    assert reason in entry.reason


def test_a_loop_that_calls_the_gate_is_served():
    def loop(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            inner = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            total = total.index_add(
                0, token, F.linear(inner, self.down_proj[expert]) * top_k_weights[token, place, None]
            )
        return total

    assert plan(nn.ModuleDict({"part": experts("eager", forward=loop)})).counts() == {"experts": 1}


def wrong_order(gate, up):
    return F.silu(up) * gate


def no_gradient(gate, up):
    return F.silu(gate.detach()) * up


@pytest.mark.parametrize("wrong", [wrong_order, no_gradient])
def test_a_wrong_kernel_is_found_out(monkeypatch, wrong):
    monkeypatch.setattr(kernels, "swiglu", wrong)
    report = plan(nn.ModuleDict({"part": experts()}))
    assert report.replaced == ()
    assert [entry.kind for entry in report.skipped] == ["experts"]


def test_the_option_and_the_config():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    before = model.config.to_json_string(), model.get_experts_implementation()
    assert apply_liger_kernel(model).counts()["experts"] == 2
    assert (model.config.to_json_string(), model.get_experts_implementation()) == before
    assert "experts" not in apply_liger_kernel(model, experts=False).counts()
