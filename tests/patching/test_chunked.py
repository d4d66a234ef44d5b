"""``mlp_chunk_tokens``: the same numbers from an MLP that never has all tokens' inner activations at once."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from liger_trainer import apply_liger_kernel, plan, revert
from liger_trainer.patching.chunked import chunked
from tests.patching.test_recompute import Made

H, WIDE = 8, 512


class Peak(Made):
    """The most bytes at once of what operations made inside."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return result


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(H, WIDE, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(WIDE, H, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def peak(model, tokens):
    """Bytes of a forward and a backward, weights' gradients aside."""
    x = torch.randn(1, tokens, H, requires_grad=True)
    gc.collect()
    with Peak() as measured:
        loss = model(x).sum()
        torch.autograd.grad(loss, [x, *model.parameters()])
    return measured.most


def test_the_peak_is_flat_over_the_length():
    """But for the MLP's own input, output and their gradients, all of which are narrow."""
    whole = MLP()
    parts = copy.deepcopy(whole)
    apply_liger_kernel(whole)
    apply_liger_kernel(parts, mlp_chunk_tokens=32)
    growth = {name: (peak(m, 512) - peak(m, 128)) / 384 for name, m in (("whole", whole), ("parts", parts))}
    assert growth["whole"] >= 3 * WIDE * 4  # bytes a token: gate, up and what they become
    assert growth["parts"] <= 8 * H * 4 + 5056 / 32 + 64  # and a state of the random numbers for each chunk


def test_what_is_kept_is_the_input():
    """The example of the settings' page, in the report."""
    saves = {}
    for tokens in (None, 32):
        report = plan(MLP(), batch=2, length=64, mlp_chunk_tokens=tokens)
        (entry,) = report.replaced
        saves[tokens] = entry.saves
    assert entry.kernel == "swiglu(32 tokens at a time)"
    assert "silu(gate) * up (32 tokens at a time)" in str(report)
    # Unpatched: the input, gate, up, the activation, the product. A chunk's checkpoint keeps nothing of these but x.
    numbers = 2 * 64 * WIDE
    assert saves[None] == numbers * 4
    assert saves[32] >= 4 * numbers * 4 - 4096


@pytest.mark.parametrize("shape", [(2, 9, H), (18, H), (1, 1, 18, H)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 9, 17, 18])
def test_any_shape_in_chunks_of_any_size(shape, tokens):
    torch.manual_seed(0)
    whole = MLP()
    parts = copy.deepcopy(whole)
    apply_liger_kernel(whole)
    apply_liger_kernel(parts, mlp_chunk_tokens=tokens)
    x = torch.randn(*shape).requires_grad_()
    calls = []
    parts.down_proj.register_forward_hook(lambda module, args, output: calls.append(output.shape[:-1].numel()))
    results = []
    for model in (whole, parts):
        y = model(x)
        assert y.shape == shape
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    forward = [min(tokens, 18 - start) for start in range(0, 18, tokens)]
    assert calls == forward  # the backward makes again what precedes the last projection, and not its product
    with torch.no_grad():
        torch.testing.assert_close(parts(x), results[0][0], rtol=1e-5, atol=1e-5)
    revert(parts)
    assert "forward" not in vars(parts) and type(parts) is MLP


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("recompute", [None, "cheap"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
def test_models(tiny, batch, gradients, error, family, recompute, reentrant):
    reference = tiny(family)
    model = copy.deepcopy(reference)
    report = apply_liger_kernel(model, mlp_chunk_tokens=4, recompute=recompute)
    assert all("4 tokens at a time" in entry.kernel for entry in report.replaced if entry.kind == "mlp")
    if reentrant is not None:
        for each in (reference, model):
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert error(gradients(model, batch), gradients(reference, batch)) < 1e-5


def test_adapters(tiny, batch, gradients, error):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0)
    torch.manual_seed(0)
    reference = peft.get_peft_model(tiny("Llama"), config)
    model = copy.deepcopy(reference)
    apply_liger_kernel(model, mlp_chunk_tokens=4)
    assert error(gradients(model, batch), gradients(reference, batch)) < 1e-5


class Dropping(nn.Linear):
    """As an adapter's projection does."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


def test_the_backward_draws_the_random_numbers_of_the_forward_again():
    torch.manual_seed(0)
    model = MLP()
    model.up_proj, model.down_proj = Dropping(H, WIDE, bias=False), Dropping(WIDE, H, bias=False)
    model.double()
    apply_liger_kernel(model, mlp_chunk_tokens=2)

    def function(x):
        torch.manual_seed(1)
        return model(x)

    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    assert not torch.equal(model(x), model(x))
    assert torch.autograd.gradcheck(function, x, atol=1e-4, rtol=1e-3)


def test_half_precision_and_autocast(tiny, batch, gradients, mean_error):
    for dtype in (torch.bfloat16, torch.float32):
        whole = tiny("Llama").to(dtype)
        parts = copy.deepcopy(whole)
        apply_liger_kernel(whole)
        apply_liger_kernel(parts, mlp_chunk_tokens=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            assert mean_error(gradients(parts, batch), gradients(whole, batch)) < 0.02


def test_compiled(tiny, batch, gradients, error):
    torch.compiler.reset()
    reference = tiny("Llama")
    model = copy.deepcopy(reference)
    apply_liger_kernel(model, mlp_chunk_tokens=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in gradients(compiled, batch).items()}
    assert error(ours, gradients(reference, batch)) < 1e-5


def test_one_function_for_all_layers():
    """A class is shared by the layers whose members are the same objects."""

    def forward(self, x):
        return x

    assert chunked(forward, 4) is chunked(forward, 4)
    assert chunked(forward, 4) is not chunked(forward, 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mlp_chunk_tokens": 0}, ValueError, "mlp_chunk_tokens must be at least 1, got 0"),
        ({"mlp_chunk_tokens": 1.5}, TypeError, "mlp_chunk_tokens must be an int or None, got 1.5"),
        ({"mlp_chunk_tokens": True}, TypeError, "mlp_chunk_tokens must be an int or None, got True"),
        ({"mlp_chunk_tokens": 4, "mlp": False}, ValueError, "mlp_chunk_tokens=4 needs mlp=True"),
    ],
)
def test_what_it_may_be(options, error, message):
    with pytest.raises(error, match=message):
        apply_liger_kernel(MLP(), **options)
