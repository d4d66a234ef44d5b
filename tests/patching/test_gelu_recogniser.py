"""GELUs that are written out, recognised by what they compute."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from liger_trainer import apply_liger_kernel, plan, revert
from liger_trainer.patching import gelu

HALF = math.sqrt(2 / math.pi)


class Written(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, states):
        return self.function(states)


def as_function(state, x):
    return 0.5 * x * (1 + torch.tanh(HALF * (x + 0.044715 * x * x * x)))


KNOWN = {
    "gelu_new": (lambda: ACT2FN["gelu_new"], "tanh"),
    "gelu_fast": (lambda: ACT2FN["gelu_fast"], "tanh"),
    "gelu_accurate": (lambda: ACT2FN["gelu_accurate"], "tanh"),
    "gelu_python": (lambda: Written(lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))), "none"),
    "with its own backward": (BloomGelu, "tanh"),
    "in fp32": (lambda: Written(lambda x: F.gelu(x.float()).to(x.dtype)), "none"),
    "normal distribution": (lambda: Written(lambda x: x * torch.special.ndtr(x.float()).to(x.dtype)), "none"),
}

OTHERS = {
    "PyTorch's": lambda: nn.GELU(),
    "PyTorch's, tanh": lambda: ACT2FN["gelu_pytorch_tanh"],
    "quick": lambda: ACT2FN["quick_gelu"],
    "clipped": lambda: Written(lambda x: torch.clip(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), -10, 10)),
    "scaled": lambda: Written(lambda x: 1.01 * F.gelu(x)),
    "another constant": lambda: Written(
        lambda x: 0.5 * x * (1 + torch.tanh(HALF * (x + 0.0455 * x.pow(3)))),
    ),
    "detached": lambda: Written(lambda x: x.detach() * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    "only in training": lambda: OnlyInTraining(),
    "with a parameter": lambda: WithParameter(),
    "of two": lambda: OfTwo(),
    "silu": lambda: nn.SiLU(),
    "dropout": lambda: nn.Dropout(0.5),
    "failing": lambda: Written(lambda x: x @ x),
}


class OnlyInTraining(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) if self.training else F.relu(x)


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * self.share * (1 + torch.erf(x / math.sqrt(2)))


class OfTwo(nn.Module):
    def forward(self, x, y=None):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(activation, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 80), activation, nn.Linear(80, 24)).to(dtype)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_replaced_it_is_as_near_to_float64(name, dtype):
    make, form = KNOWN[name]
    model = mlp(make(), dtype)
    reference, exact = copy.deepcopy(model), mlp(nn.GELU(form)).to(dtype).double()
    report = apply_liger_kernel(model)
    assert [(entry.kind, entry.path, entry.kernel) for entry in report.replaced] == [("gelu", "1", f"gelu({form})")]
    x = (3 * torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))).to(dtype)
    upstream = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))

    def run(each, wide):
        leaf = x.to(wide).requires_grad_()
        output = each(leaf)
        assert output.dtype == wide
        return [output, *torch.autograd.grad(output, [leaf, *each.parameters()], upstream.to(wide))]

    for ours, theirs, truth in zip(run(model, dtype), run(reference, dtype), run(exact, torch.float64), strict=True):
        errors = [float((each.detach().double() - truth.detach()).norm()) for each in (ours, theirs)]
        assert errors[0] <= 1.1 * errors[1] + 1e-6 * float(truth.detach().norm())
    revert(model)
    assert type(model[1]) is type(reference[1])
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_are_passed_over_in_silence(name):
    state = torch.get_rng_state()
    report = plan(nn.ModuleDict({"part": OTHERS[name]()}))
    assert not report.replaced and not report.skipped
    assert torch.equal(torch.get_rng_state(), state)


def test_without_the_check_the_form_is_told_apart_all_the_same():
    for form, name in (("tanh", "gelu_new"), ("none", "gelu_python")):
        (entry,) = plan(mlp(KNOWN[name][0]()), check=False).replaced
        assert (entry.kernel, entry.checked) == (f"gelu({form})", ())


def test_it_can_be_switched_off():
    assert not plan(mlp(ACT2FN["gelu_new"]), gelu=False).replaced


def test_a_wrong_kernel_is_found_out(monkeypatch):
    wrong = functools.cache(lambda form: lambda self, x: F.gelu(x, approximate=form) * 1.02)
    monkeypatch.setattr(gelu, "_forward", wrong)
    assert not plan(mlp(ACT2FN["gelu_new"])).replaced


def test_an_object_in_several_places_may_belong_to_other_models():
    """As OpenAI GPT's layers take one from a dict of their module."""
    shared = ACT2FN["gelu_new"]
    report = plan(nn.ModuleList([mlp(shared), mlp(shared)]))
    assert not report.replaced
    assert [entry.reason for entry in report.skipped] == [
        "it is one object in 2 places, and may have some in other models"
    ]


def test_a_forward_on_the_instance_stays():
    activation = ACT2FN["gelu_new"]
    activation.forward = functools.partial(as_function, None)
    assert not plan(mlp(activation)).replaced


@pytest.fixture
def gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64, use_cache=False,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # without, the model warns, which Dynamo does not trace
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", [None, "cheap"])
def test_in_a_model(gpt2, batch, gradients, error, compiled, recompute):
    torch._dynamo.reset()
    model = copy.deepcopy(gpt2)
    report = apply_liger_kernel(model, recompute=recompute)
    assert report.counts() == {"layer_norm": 5, "gelu": 2, "fused_linear_cross_entropy": 1} | (
        {"recompute": 1} if recompute else {}
    )
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled and not recompute else model
    ours = gradients(run, batch)
    assert error({name.removeprefix("_orig_mod."): g for name, g in ours.items()}, gradients(gpt2, batch)) < 1e-4


def test_what_it_saves_is_what_is_kept_no_longer(gpt2):
    saves = {entry.path: entry.saves for entry in plan(gpt2, batch=2, length=9).replaced if entry.kind == "gelu"}
    model = copy.deepcopy(gpt2).bfloat16()
    apply_liger_kernel(model, layer_norm=False, fused_linear_cross_entropy=False)

    def kept(activation):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        x = torch.randn(2, 9, 4 * 48, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = activation(x)
        del output
        return sum(storage.nbytes() for storage in storages.values())

    stock, ours = (kept(each.transformer.h[0].mlp.act) for each in (gpt2, model))
    assert ours == 2 * 9 * 4 * 48 * 2
    assert saves == dict.fromkeys(saves, stock - ours) and len(saves) == 2
    assert stock >= 4 * ours
