"""Tiny random models of the families, and what the tests of patching compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 97

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 12},
    "Gemma": {"head_dim": 20},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5},
    "Phi3": {
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


def build(family: str, **changes: Any) -> nn.Module:
    """A causal model with odd sizes, no weight of which has a value that a fresh model would have."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 67,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **CONFIGS[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


@pytest.fixture
def linear_of_zero3(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """DeepSpeed puts its own function in the place of torch's for ZeRO-3, and leaves it there for the process."""
    torch_linear = F.linear

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return torch_linear(x, weight, bias)

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            rows = gradient.flatten(0, -2)
            of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
            return gradient @ weight, rows.T @ x.flatten(0, -2), of_bias

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return Linear.apply(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    return linear


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    return build


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = -100
    return {"input_ids": input_ids, "labels": labels}


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor], **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch, **inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **gradients}


def errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """The relative error of every tensor, in its norm."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs])


@pytest.fixture
def gradients() -> Callable[..., dict[str, Tensor]]:
    return loss_and_gradients


@pytest.fixture
def error() -> Callable[..., float]:
    """The largest relative error of a tensor."""
    return lambda ours, theirs: float(errors(ours, theirs).max())


@pytest.fixture
def mean_error() -> Callable[..., float]:
    """The mean relative error of the tensors: for comparing two roundings, where the largest is chance."""
    return lambda ours, theirs: float(errors(ours, theirs).mean())


@pytest.fixture
def untouched() -> Callable[[nn.Module], Callable[[], None]]:
    """Photograph a model; the function returned asserts that everything about it is as it was."""

    def photograph(model: nn.Module) -> Callable[[], None]:
        def state() -> dict[str, Any]:
            return {
                "classes": {name: type(m) for name, m in model.named_modules()},
                "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
                "training": {name: m.training for name, m in model.named_modules()},
                "hooks": {name: [len(m._forward_hooks), len(m._backward_hooks)] for name, m in model.named_modules()},
                "parameters": {name: id(p) for name, p in model.named_parameters()},
                "buffers": {name: id(b) for name, b in model.named_buffers()},
                "gradients": [p.grad is None for p in model.parameters()],
                "keys": list(model.state_dict()),
            }

        before, values = state(), copy.deepcopy(model.state_dict())

        def check() -> None:
            assert state() == before
            assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())

        return check

    return photograph
