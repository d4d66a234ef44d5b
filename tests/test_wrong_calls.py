"""Wrong calls of the public API, and the errors that they give: each names what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor

import liger_trainer
from liger_trainer import alignment_losses as losses
from liger_trainer import kernels, modules

X = torch.randn


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


hidden, weight, labels = X(6, 8), X(11, 8), torch.arange(6)
model = tiny_llama()


def second_derivative() -> Any:
    x = hidden.clone().requires_grad_()
    return torch.autograd.grad(kernels.linear_cross_entropy(x, weight, labels), x, create_graph=True)


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "rms_norm of integers",
        lambda: kernels.rms_norm(ints(3, 4), None),
        TypeError,
        "x must have a floating point dtype, got torch.int64",
    ),
    (
        "rms_norm: weight of another width",
        lambda: kernels.rms_norm(X(3, 4), X(5)),
        ValueError,
        "weight must have shape (4,), x's last dimension; got (5,)",
    ),
    (
        "rms_norm: weight of two dimensions",
        lambda: kernels.rms_norm(X(3, 4), X(1, 4)),
        ValueError,
        "weight must have shape (4,), x's last dimension; got (1, 4)",
    ),
    (
        "rms_norm: integer weight",
        lambda: kernels.rms_norm(X(3, 4), ints(4)),
        TypeError,
        "weight must have a floating point dtype, got torch.int64",
    ),
    (
        "rms_norm: unknown casting",
        lambda: kernels.rms_norm(X(3, 4), None, casting="qwen"),
        ValueError,
        "casting must be one of ('llama', 'gemma', 'none'), got 'qwen'",
    ),
    (
        "rms_norm of a scalar",
        lambda: kernels.rms_norm(torch.tensor(1.0), None),
        ValueError,
        "x must have at least one dimension, got a scalar",
    ),
    (
        "rms_norm: weight on another device",
        lambda: kernels.rms_norm(X(3, 4), X(4, device="meta")),
        ValueError,
        "weight is on meta, the other arguments are on cpu",
    ),
    (
        "add_rms_norm: residual of another shape",
        lambda: kernels.add_rms_norm(X(3, 4), X(2, 4), None),
        ValueError,
        "residual must have x's shape (3, 4), got (2, 4)",
    ),
    (
        "add_rms_norm: integer residual",
        lambda: kernels.add_rms_norm(X(3, 4), ints(3, 4), None),
        TypeError,
        "residual must have a floating point dtype, got torch.int64",
    ),
    (
        "add_rms_norm: unknown casting",
        lambda: kernels.add_rms_norm(X(3, 4), X(3, 4), None, casting=""),
        ValueError,
        "casting must be one of ('llama', 'gemma', 'none'), got ''",
    ),
    (
        "layer_norm: bias of another width",
        lambda: kernels.layer_norm(X(3, 4), X(4), X(3)),
        ValueError,
        "bias must have shape (4,), x's last dimension; got (3,)",
    ),
    (
        "layer_norm of integers",
        lambda: kernels.layer_norm(ints(3, 4), None),
        TypeError,
        "x must have a floating point dtype, got torch.int64",
    ),
    (
        "rotary: queries of three dimensions",
        lambda: kernels.rotary(X(2, 3, 4), X(2, 3, 4), X(1, 3, 4), X(1, 3, 4)),
        ValueError,
        "q must have 4 dimensions, got shape (2, 3, 4)",
    ),
    (
        "rotary: keys of another length",
        lambda: kernels.rotary(X(1, 2, 3, 4), X(1, 2, 5, 4), X(1, 3, 4), X(1, 3, 4)),
        ValueError,
        "q and k may differ in their number of heads, and in nothing else of their shapes; got",
    ),
    (
        "rotary: cos and sin differ in shape",
        lambda: kernels.rotary(X(1, 2, 3, 4), X(1, 2, 3, 4), X(1, 3, 4), X(1, 3, 2)),
        ValueError,
        "cos and sin must have the same shape, got (1, 3, 4) and (1, 3, 2)",
    ),
    (
        "rotary: table wider than a head",
        lambda: kernels.rotary(X(1, 2, 3, 4), X(1, 2, 3, 4), X(1, 3, 8), X(1, 3, 8)),
        ValueError,
        "cos and sin must rotate an even number of elements of a head, at most its 4; they have",
    ),
    (
        "rotary: table of odd width",
        lambda: kernels.rotary(X(1, 2, 3, 4), X(1, 2, 3, 4), X(1, 3, 3), X(1, 3, 3)),
        ValueError,
        "cos and sin must rotate an even number of elements of a head, at most its 4; they have",
    ),
    (
        "rotary: unknown dimension of the heads",
        lambda: kernels.rotary(X(1, 2, 3, 4), X(1, 2, 3, 4), X(1, 3, 4), X(1, 3, 4), unsqueeze_dim=3),
        ValueError,
        "unsqueeze_dim must be 1, for (B, H, S, D), or 2, for (B, S, H, D), got 3",
    ),
    (
        "swiglu: shapes differ",
        lambda: kernels.swiglu(X(3, 4), X(3, 5)),
        ValueError,
        "gate and up must have the same shape, got (3, 4) and (3, 5)",
    ),
    (
        "swiglu of integers",
        lambda: kernels.swiglu(ints(3, 4), X(3, 4)),
        TypeError,
        "gate must have a floating point dtype, got torch.int64",
    ),
    (
        "geglu of nothing",
        lambda: kernels.geglu(None, None),
        TypeError,
        "gate must be a tensor, got None",
    ),
    (
        "swiglu of scalars",
        lambda: kernels.swiglu(torch.tensor(1.0), torch.tensor(1.0)),
        ValueError,
        "gate and up must have at least one dimension, got scalars",
    ),
    (
        "geglu: unknown approximation",
        lambda: kernels.geglu(X(3, 4), X(3, 4), approximate="sigmoid"),
        ValueError,
        "approximate must be one of ('tanh', 'none'), got 'sigmoid'",
    ),
    (
        "cross_entropy: labels of another shape",
        lambda: kernels.cross_entropy(X(3, 5), ints(4)),
        ValueError,
        "labels must have logits' shape without its last dimension, (3,); got (4,)",
    ),
    (
        "cross_entropy: floating labels",
        lambda: kernels.cross_entropy(X(3, 5), X(3)),
        TypeError,
        "labels must be integers, class indices; got torch.float32",
    ),
    (
        "cross_entropy: label out of range",
        lambda: kernels.cross_entropy(X(3, 5), torch.tensor([0, 5, 1])),
        ValueError,
        "labels must lie in [0, 5) or be ignore_index=-100; 1 of 3 do not, the first of them is 5",
    ),
    (
        "cross_entropy: negative label",
        lambda: kernels.cross_entropy(X(3, 5), torch.tensor([0, -1, 1])),
        ValueError,
        "labels must lie in [0, 5) or be ignore_index=-100; 1 of 3 do not, the first of them is",
    ),
    (
        "cross_entropy: unknown reduction",
        lambda: kernels.cross_entropy(X(3, 5), ints(3), reduction="batchmean"),
        ValueError,
        "reduction must be one of ('none', 'sum', 'mean'), got 'batchmean'",
    ),
    (
        "cross_entropy: smoothing above 1",
        lambda: kernels.cross_entropy(X(3, 5), ints(3), label_smoothing=1.5),
        ValueError,
        "label_smoothing must lie in [0, 1), got 1.5",
    ),
    (
        "cross_entropy: negative soft-cap",
        lambda: kernels.cross_entropy(X(3, 5), ints(3), softcap=-1.0),
        ValueError,
        "softcap must be above 0 or None, got -1.0",
    ),
    (
        "cross_entropy: negative z-loss",
        lambda: kernels.cross_entropy(X(3, 5), ints(3), z_loss=-0.1),
        ValueError,
        "z_loss must be at least 0, got -0.1",
    ),
    (
        "cross_entropy: unknown output",
        lambda: kernels.cross_entropy(X(3, 5), ints(3), outputs=("perplexity",)),
        ValueError,
        "outputs must be among ('token_loss', 'token_accuracy', 'predicted_tokens', 'z_loss'),",
    ),
    (
        "cross_entropy: class weights of another size",
        lambda: kernels.cross_entropy(X(3, 5), ints(3), weight=X(4)),
        ValueError,
        "weight must have shape (5,), a weight a class; got (4,)",
    ),
    (
        "cross_entropy: integer logits",
        lambda: kernels.cross_entropy(ints(3, 5), ints(3)),
        TypeError,
        "logits must have a floating point dtype, got torch.int64",
    ),
    (
        "linear_cross_entropy: widths differ",
        lambda: kernels.linear_cross_entropy(X(6, 7), weight, labels),
        ValueError,
        "weight must have shape (V, 7) to match hidden's (6, 7); got (11, 8)",
    ),
    (
        "linear_cross_entropy: dtypes differ",
        lambda: kernels.linear_cross_entropy(hidden.bfloat16(), weight, labels),
        TypeError,
        "weight must have hidden's dtype torch.bfloat16 outside of autocast, got torch.float32",
    ),
    (
        "linear_cross_entropy: weight of one dimension",
        lambda: kernels.linear_cross_entropy(hidden, X(8), labels),
        ValueError,
        "weight must have shape (V, 8) to match hidden's (6, 8); got (8,)",
    ),
    (
        "linear_cross_entropy: labels of another length",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels[:5]),
        ValueError,
        "labels must have hidden's shape without its last dimension, (6,); got (5,)",
    ),
    (
        "linear_cross_entropy: bias of another size",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels, bias=X(10)),
        ValueError,
        "bias must have shape (11,), a number a row of weight; got (10,)",
    ),
    (
        "linear_cross_entropy: num_items with a sum",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels, reduction="sum", num_items=3),
        ValueError,
        "num_items divides the sum of the losses and goes with reduction='mean', got 'sum'",
    ),
    (
        "linear_cross_entropy: num_items of 0",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels, num_items=0),
        ValueError,
        "num_items must be above 0, got 0",
    ),
    (
        "linear_cross_entropy: tiles of no bytes",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels, tile_bytes=0),
        ValueError,
        "tile_bytes must be above 0, got 0",
    ),
    (
        "linear_cross_entropy: temperature of 0",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels, temperature=0.0),
        ValueError,
        "temperature must be above 0, got 0.0",
    ),
    (
        "linear_cross_entropy: token weights of another shape",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels, token_weights=X(5)),
        ValueError,
        "token_weights must have labels' shape (6,), got (5,)",
    ),
    (
        "linear_cross_entropy: label out of range",
        lambda: kernels.linear_cross_entropy(hidden, weight, labels + 9),
        ValueError,
        "labels must lie in [0, 11) or be ignore_index=-100; 4 of 6 do not, the first of them is",
    ),
    (
        "linear_cross_entropy: second derivative",
        lambda: second_derivative(),
        RuntimeError,
        "has no second derivative: its backward was called with create_graph=True",
    ),
    (
        "linear_log_probs: unknown output",
        lambda: kernels.linear_log_probs(hidden, weight, labels, outputs=("logits",)),
        ValueError,
        "outputs must be among ('entropy', 'mean_logits', 'log_sum_sq_probs', 'top1'), got",
    ),
    (
        "linear_log_probs: negative cache",
        lambda: kernels.linear_log_probs(hidden, weight, labels, cache_bytes=-1),
        ValueError,
        "cache_bytes must be at least 0, got -1",
    ),
    (
        "linear_log_probs: widths differ",
        lambda: kernels.linear_log_probs(X(6, 7), weight, labels),
        ValueError,
        "weight must have shape (V, 7) to match hidden's (6, 7); got (11, 8)",
    ),
    (
        "linear_jsd: beta above 1",
        lambda: kernels.linear_jsd(hidden, weight, hidden, weight, beta=1.5),
        ValueError,
        "beta must lie in [0, 1], got 1.5",
    ),
    (
        "linear_jsd: another number of rows",
        lambda: kernels.linear_jsd(hidden, weight, X(5, 8), weight),
        ValueError,
        "teacher_hidden must have student_hidden's shape but for its last dimension, (6,); got",
    ),
    (
        "jsd: shapes differ",
        lambda: kernels.jsd(X(3, 5), X(3, 6)),
        ValueError,
        "teacher_logits must have student_logits' shape (3, 5), got (3, 6)",
    ),
    (
        "jsd: temperature of 0",
        lambda: kernels.jsd(X(3, 5), X(3, 5), temperature=0),
        ValueError,
        "temperature must be above 0, got 0",
    ),
    (
        "jsd: labels of another shape",
        lambda: kernels.jsd(X(3, 5), X(3, 5), labels=ints(4)),
        ValueError,
        "labels must have the logits' shape without its last dimension, (3,); got (4,)",
    ),
    (
        "kl_div: shapes differ",
        lambda: kernels.kl_div(X(3, 5), X(3, 6)),
        ValueError,
        "target must have input's shape (3, 5), got (3, 6)",
    ),
    (
        "kl_div: unknown reduction",
        lambda: kernels.kl_div(X(3, 5), X(3, 5), reduction="median"),
        ValueError,
        "reduction must be one of ('none', 'batchmean', 'sum', 'mean'), got 'median'",
    ),
    (
        "use_torch: unknown op",
        lambda: kernels.use_torch("rmsnorm").__enter__(),
        ValueError,
        "use_torch: expected 'all' or names among add_rms_norm, cross_entropy, gated_activation,",
    ),
    (
        "LigerRMSNorm: unknown start",
        lambda: modules.LigerRMSNorm(8, init_fn="random"),
        ValueError,
        "init_fn must be one of ('ones', 'zeros'), got 'random'",
    ),
    (
        "LigerFusedLinearCrossEntropyLoss: accumulation in bf16",
        lambda: modules.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.bfloat16),
        ValueError,
        "accum_dtype must be None or torch.float32, which is what is used; got torch.bfloat16",
    ),
    (
        "dpo_loss: unknown type",
        lambda: losses.dpo_loss(X(2), X(2), X(2), X(2), loss_type="dpo"),
        ValueError,
        "loss_type must be among ('sigmoid', 'hinge', 'ipo', 'exo_pair', 'nca_pair', 'robust',",
    ),
    (
        "GRPOOptions: unknown type",
        lambda: losses.GRPOOptions(loss_type="ppo"),
        ValueError,
        "loss_type must be among ('grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo', 'sapo', 'luspo', 'vespo'), got 'ppo'",
    ),
    (
        "GRPOOptions: unknown level",
        lambda: losses.GRPOOptions(importance_sampling_level="word"),
        ValueError,
        "importance_sampling_level must be among ('token', 'sequence'), got 'word'",
    ),
    (
        "cpo_loss: unknown type",
        lambda: losses.cpo_loss(X(2), X(2), loss_type="dpo"),
        ValueError,
        "loss_type must be among ('sigmoid', 'hinge', 'ipo', 'simpo', 'alphapo'), got 'dpo'",
    ),
    (
        "kto_loss: unknown type",
        lambda: losses.kto_loss(X(2), X(2), torch.tensor([True, False]), loss_type="dpo"),
        ValueError,
        "loss_type must be among ('kto', 'apo_zero_unpaired'), got 'dpo'",
    ),
    (
        "apply_liger_kernel: no model",
        lambda: liger_trainer.apply_liger_kernel("llama"),
        TypeError,
        "model must be a torch.nn.Module, got str",
    ),
    (
        "apply_liger_kernel: unknown option",
        lambda: liger_trainer.apply_liger_kernel(model, swiglu=True),
        TypeError,
        "unknown option 'swiglu'; the known options are rope, rms_norm, layer_norm, mlp,",
    ),
    (
        "apply_liger_kernel: an option that is no switch",
        lambda: liger_trainer.apply_liger_kernel(model, rope="yes"),
        TypeError,
        "option rope must be True or False, got 'yes'",
    ),
    (
        "apply_liger_kernel: tile_bytes of 0",
        lambda: liger_trainer.apply_liger_kernel(model, tile_bytes=0),
        ValueError,
        "tile_bytes must be at least 1, got 0",
    ),
    (
        "apply_liger_kernel: tile_bytes of a float",
        lambda: liger_trainer.apply_liger_kernel(model, tile_bytes=1e6),
        TypeError,
        "tile_bytes must be an int or None, got 1000000.0",
    ),
    (
        "apply_liger_kernel: both losses",
        lambda: liger_trainer.apply_liger_kernel(model, cross_entropy=True),
        ValueError,
        "cross_entropy=True and fused_linear_cross_entropy=True exclude each other: the fused",
    ),
    (
        "apply_liger_kernel: nothing to replace",
        lambda: liger_trainer.apply_liger_kernel(torch.nn.Linear(2, 2)),
        ValueError,
        "Linear has no part that liger_trainer can replace with the given options",
    ),
    (
        "plan: batch without length",
        lambda: liger_trainer.plan(model, batch=2),
        ValueError,
        "batch and length are given together or not at all, got batch=2, length=None",
    ),
    (
        "plan: no rows",
        lambda: liger_trainer.plan(model, batch=0, length=3),
        ValueError,
        "batch must be an int of at least 1, got 0",
    ),
    (
        "plan: batch is a float",
        lambda: liger_trainer.plan(model, batch=2.0, length=3),
        ValueError,
        "batch must be an int of at least 1, got 2.0",
    ),
    ("revert: no model", lambda: liger_trainer.revert(3), TypeError, "model must be a torch.nn.Module, got int"),
    (
        "revert: unknown type",
        lambda: liger_trainer.revert("lama"),
        ValueError,
        "model type must be one that transformers has, got 'lama'",
    ),
    (
        "is_patched: no model",
        lambda: liger_trainer.is_patched(None),
        TypeError,
        "model must be a torch.nn.Module, got NoneType",
    ),
    (
        "function of an unknown type",
        lambda: liger_trainer.apply_liger_kernel_to_lama,
        AttributeError,
        "'apply_liger_kernel_to_lama': transformers has no model type 'lama'",
    ),
    (
        "function of another type",
        lambda: liger_trainer.apply_liger_kernel_to_gemma(model),
        ValueError,
        "model must be of type 'gemma', got LlamaForCausalLM of ['llama']",
    ),
    (
        "function of a type: no module",
        lambda: liger_trainer.apply_liger_kernel_to_llama(3),
        TypeError,
        "model must be a torch.nn.Module, got int",
    ),
    (
        "function of a type: contradicting options",
        lambda: liger_trainer.apply_liger_kernel_to_llama(model, swiglu=True, mlp=False),
        ValueError,
        "swiglu=True and mlp=False contradict each other",
    ),
    (
        "Auto class that transformers has not",
        lambda: liger_trainer.AutoLigerKernelForPoetry,
        AttributeError,
        "transformers has no AutoModelForPoetry",
    ),
    (
        "Auto class: unknown type of option",
        lambda: liger_trainer.AutoLigerKernelForCausalLM.from_pretrained("x", rope=1),
        TypeError,
        "option rope must be True or False, got 1",
    ),
    (
        "TrainingArguments: unknown option",
        lambda: liger_trainer.TrainingArguments("out", use_liger=True, liger_config={"swiglu": True}),
        TypeError,
        "liger_config={'swiglu': True}: unknown option 'swiglu'; the known options are rope,",
    ),
    (
        "TrainingArguments: text that does not parse",
        lambda: liger_trainer.TrainingArguments("out", liger_config="{rope}"),
        ValueError,
        "liger_config='{rope}' does not parse: Expecting property name enclosed in double",
    ),
    (
        "TrainingArguments: a file that is not there",
        lambda: liger_trainer.TrainingArguments("out", liger_config="liger.yaml"),
        ValueError,
        "liger_config='liger.yaml' is neither a JSON object, such as '{\"rope\": false}', nor the",
    ),
    (
        "TrainingArguments: a list",
        lambda: liger_trainer.TrainingArguments("out", liger_config=["rope"]),
        TypeError,
        "liger_config: expected a mapping from option to value, got ['rope'] (list)",
    ),
    (
        "LigerCallback: unknown option",
        lambda: liger_trainer.LigerCallback({"rotary": True}),
        TypeError,
        "liger_config={'rotary': True}: unknown option 'rotary'; the known options are rope,",
    ),
    (
        "LigerCallback: wrong type",
        lambda: liger_trainer.LigerCallback({"rope": 0}),
        TypeError,
        "liger_config={'rope': 0}: option rope must be True or False, got 0",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_wrong_call(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        call()
    assert raised.type is error
    assert not liger_trainer.is_patched(model)  # nothing is left half-done


def test_there_are_sixty() -> None:
    assert len({row[0] for row in CALLS}) == len(CALLS) >= 60
