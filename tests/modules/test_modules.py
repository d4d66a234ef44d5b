"""The modules against the formulas they stand for."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from liger_trainer.modules import (
    LigerCrossEntropyLoss,
    LigerFusedAddRMSNorm,
    LigerFusedLinearCrossEntropyLoss,
    LigerGEGLUMLP,
    LigerLayerNorm,
    LigerRMSNorm,
    LigerSwiGLUMLP,
    liger_rotary_pos_emb,
)


def config(**changes):
    return SimpleNamespace(**({"hidden_size": 6, "intermediate_size": 10, "hidden_act": "silu"} | changes))


def assert_same_with_gradients(module, function, x):
    """The module and a function of (x, its parameters by name) agree, in results and in every gradient."""
    inputs = x, *module.parameters()
    ours = module(x)
    expected = function(x, **{name.replace(".", "_"): p for name, p in module.named_parameters()})
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(expected, inputs, dy))


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return module


def test_rms_norm():
    x = torch.randn(2, 3, 8, requires_grad=True)
    assert torch.equal(LigerRMSNorm(8).weight, torch.ones(8))
    assert torch.equal(LigerRMSNorm(8, init_fn="zeros").weight, torch.zeros(8))
    assert_same_with_gradients(shaken(LigerRMSNorm(8, 1e-3)), lambda x, weight: F.rms_norm(x, (8,), weight, 1e-3), x)
    gemma = shaken(LigerRMSNorm(8, 1e-3, 1.0, "gemma", "zeros", False, None))
    assert_same_with_gradients(gemma, lambda x, weight: F.rms_norm(x, (8,), 1 + weight, 1e-3), x)
    bare = LigerRMSNorm(8, elementwise_affine=False)
    assert bare.weight is None
    assert not bare.state_dict()
    assert_same_with_gradients(bare, lambda x: F.rms_norm(x, (8,), None, 1e-6), x)
    assert "eps=1e-06" in repr(bare)
    with pytest.raises(ValueError, match="init_fn must be one of"):
        LigerRMSNorm(8, init_fn="ons")
    with pytest.raises(ValueError, match="casting must be one of"):
        LigerRMSNorm(8, casting_mode="lama")(x)


def test_add_rms_norm():
    x, residual = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    module = shaken(LigerFusedAddRMSNorm(8, 1e-3, 1.0, "gemma", "zeros", False))
    assert set(module.state_dict()) == {"weight"}
    assert "eps=0.001" in repr(module)
    hidden_states, total = module(x, residual)
    expected = F.rms_norm(x + residual, (8,), 1 + module.weight, 1e-3)
    torch.testing.assert_close((hidden_states, total), (expected, x + residual))
    inputs = x, residual, module.weight
    upstream = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(
        torch.autograd.grad((hidden_states, total), inputs, upstream),
        torch.autograd.grad((expected, x + residual), inputs, upstream),
    )
    assert torch.equal(LigerFusedAddRMSNorm(8).weight, torch.ones(8))
    with pytest.raises(ValueError, match="init_fn must be one of"):
        LigerFusedAddRMSNorm(8, init_fn="ons")


def test_layer_norm():
    x = torch.randn(2, 3, 8, requires_grad=True)
    module = LigerLayerNorm(8, eps=1e-3, bias=True, impl="triton")
    assert set(module.state_dict()) == {"weight", "bias"}
    assert_same_with_gradients(shaken(module), lambda x, weight, bias: F.layer_norm(x, (8,), weight, bias, 1e-3), x)
    with pytest.raises(ValueError, match="init_fn must be one of"):
        LigerLayerNorm(8, init_fn="ons")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("cls", "act", "function"),
    [
        (LigerSwiGLUMLP, "silu", F.silu),
        (LigerSwiGLUMLP, "swish", F.silu),
        (LigerGEGLUMLP, "gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh")),
        (LigerGEGLUMLP, "gelu", F.gelu),
    ],
)
def test_gated_mlp(cls, act, function, bias):
    x = torch.randn(2, 3, 6, requires_grad=True)
    module = cls(config(hidden_act=act, mlp_bias=bias), intermediate_size=14)
    assert module.gate_proj.weight.shape == (14, 6)

    def expected(x, gate_proj_weight, up_proj_weight, down_proj_weight, **biases):
        gate = F.linear(x, gate_proj_weight, biases.get("gate_proj_bias"))
        up = F.linear(x, up_proj_weight, biases.get("up_proj_bias"))
        return F.linear(function(gate) * up, down_proj_weight, biases.get("down_proj_bias"))

    assert_same_with_gradients(module, expected, x)


def test_activation_that_the_module_does_not_have():
    with pytest.raises(ValueError, match=r"config.hidden_act must be one of .* got 'gelu'"):
        LigerSwiGLUMLP(config(hidden_act="gelu"))
    with pytest.raises(ValueError, match=r"config.hidden_activation must be one of .* got 'relu'"):
        LigerGEGLUMLP(config(hidden_activation="relu"))
    assert LigerGEGLUMLP(config(hidden_activation="gelu_pytorch_tanh")).approximate == "tanh"
    assert LigerGEGLUMLP(config(hidden_act=None)).approximate == "tanh"


def test_projections_are_called_not_read():
    """Quantised and adapted layers replace what a projection does; its weight alone would not tell."""
    module = LigerSwiGLUMLP(config())
    module.gate_proj = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
    x = torch.randn(4, 6)
    expected = module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x))
    torch.testing.assert_close(module(x), expected)


def test_rotary():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    half = torch.randn(1, 5, 4)
    cos, sin = (torch.cat((t, t), -1) for t in (half.cos(), half.sin()))

    def rotate(x):
        turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return x * cos[:, None] + turned * sin[:, None]

    token_major = liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for pair in (
        liger_rotary_pos_emb(q, k, cos, sin),
        liger_rotary_pos_emb(q, k, cos, sin, torch.arange(5)[None], 1),
        liger_rotary_pos_emb(q, k, half.cos(), half.sin(), rotary_dim=8),
        [t.transpose(1, 2) for t in token_major],
    ):
        torch.testing.assert_close(pair[0], rotate(q))
        torch.testing.assert_close(pair[1], rotate(k))
    with pytest.raises(ValueError, match="rotary_dim must be the width of cos, 8, or twice it; got 6"):
        liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=6)


def test_kernels_modules_and_losses_import_neither_transformers_nor_trl():
    code = (
        "import sys, liger_trainer.kernels, liger_trainer.modules, liger_trainer.alignment_losses;"
        "sys.exit(' '.join({'transformers', 'trl', 'accelerate', 'peft'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOSS_OPTIONS = {"ignore_index": 3, "label_smoothing": 0.1, "lse_square_scale": 1e-2, "softcap": 5.0, "reduction": "sum"}


def expected_loss(logits, labels, class_weights):
    z = 5.0 * torch.tanh(logits / 5.0)
    loss = F.cross_entropy(z, labels, class_weights, ignore_index=3, label_smoothing=0.1, reduction="sum")
    z_loss = 1e-2 * z.logsumexp(-1)[labels != 3].square().sum()
    return loss + z_loss, z_loss


def losses_of(kind, hidden, weight, bias, labels, class_weights, **switches):
    if kind == "logits":
        module = LigerCrossEntropyLoss(class_weights, **LOSS_OPTIONS, **switches)
        return module(F.linear(hidden, weight, bias), labels)
    module = LigerFusedLinearCrossEntropyLoss(class_weights, **LOSS_OPTIONS, accum_dtype=torch.float32, **switches)
    return module(weight, hidden, labels, bias)


@pytest.mark.parametrize("kind", ["logits", "hidden states"])
def test_cross_entropy(kind):
    torch.manual_seed(0)
    labels = torch.randint(11, (7,))
    labels[2] = 3
    class_weights = torch.rand(11)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((7, 6), (11, 6), (11,))]
    loss = losses_of(kind, *inputs, labels, class_weights)
    logits = F.linear(*inputs)
    expected, z_loss = expected_loss(logits, labels, class_weights)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    switches = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    out = losses_of(kind, *inputs, labels, class_weights, **switches)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.z_loss, z_loss)
    assert torch.equal(out.predicted_tokens, torch.where(labels == 3, -1, logits.argmax(-1)))
    torch.testing.assert_close(out.token_accuracy, (logits.argmax(-1) == labels)[labels != 3].float().mean())


def test_token_scaling_and_what_the_fused_loss_refuses():
    hidden, weight = torch.randn(7, 6), torch.randn(11, 6)
    labels = torch.randint(11, (7,))
    probability = F.linear(hidden, weight).softmax(-1).gather(1, labels[:, None])[:, 0]
    loss = LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)(weight, hidden, labels)
    torch.testing.assert_close(loss, -(probability * probability.log()).mean())
    with pytest.raises(ValueError, match="accum_dtype must be None or torch.float32"):
        LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.bfloat16)
