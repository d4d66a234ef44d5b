"""A head as a product: what every kind of it computes, and where its gradients go, beside its own forward."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, TaskType, get_peft_model
from quantised_heads import Int8Activations, Int8Head
from tiny_models import HIDDEN, VOCAB, tiny_llama
from torch import nn
from torch.nn import functional as F

from liger_trainer.patching.adapters import serving_module
from liger_trainer.trl.affine_head import product, reason_against

TOKENS = {"lm_head": [5, 17, 200]}


def lora(**options):
    defaults = {"r": 4, "lora_alpha": 8, "task_type": TaskType.CAUSAL_LM, "target_modules": ["lm_head"]}
    return LoraConfig(**{**defaults, **options})


HEADS = {
    "plain": None,
    "lora": lora(),
    "lora, dropout": lora(lora_dropout=0.3),
    "rslora": lora(use_rslora=True),
    "lora with a bias": lora(lora_bias=True),
    "dora": lora(use_dora=True),
    "dora, dropout": lora(use_dora=True, lora_dropout=0.3),
    "saved": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": lora(target_modules=["q_proj"], trainable_token_indices=TOKENS),
    "ia3": IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type=TaskType.CAUSAL_LM),
}


def make_head(name: str, bias: bool = False) -> nn.Module:
    model = tiny_llama()
    if bias:
        model.lm_head = nn.Linear(HIDDEN, VOCAB)
    config = HEADS[name]
    model.train()
    if config is not None:
        model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # adapters begin as nothing
            for parameter in model.get_output_embeddings().parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.get_output_embeddings()


def results(logits, leaves):
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    gradients = torch.autograd.grad((logits * upstream).sum(), leaves, allow_unused=True)
    return logits, *(torch.zeros_like(leaf) if each is None else each for each, leaf in zip(gradients, leaves))


def check(head: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    assert reason_against(serving_module(head), dtype) is None
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 7, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    leaves = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    torch.manual_seed(4)  # of the dropout
    expected = results(head(hidden), leaves)
    torch.manual_seed(4)
    layer, inputs, low_rank = product(serving_module(head), hidden)
    logits = F.linear(inputs, layer.weight, layer.bias)
    found = results(logits if low_rank is None else logits + F.linear(*low_rank), leaves)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_heads(name, training):
    check(make_head(name).train(training))


@pytest.mark.parametrize("name", ["lora", "lora with a bias", "dora", "dora, dropout", "ia3"])
def test_heads_with_a_bias(name):
    check(make_head(name, bias=True))


@pytest.mark.parametrize("name", ["lora", "dora", "tokens"])
def test_adapters_switched_off_and_merged(name):
    head = make_head(name)
    head.enable_adapters(False)
    check(head)
    if name != "tokens":
        head.enable_adapters(True)
        head.merge()
        check(head)


@pytest.mark.parametrize("bias", [False, True])
def test_quantised_heads(bias):
    linear = nn.Linear(HIDDEN, VOCAB)
    check(Int8Head(linear, bias))
    adapted = make_head("lora")
    adapted.base_layer = Int8Head(linear, bias)
    check(adapted)


def test_two_adapters_in_force():
    model = get_peft_model(tiny_llama(), lora(), adapter_name="one")
    model.add_adapter("two", lora(r=3))
    head = model.get_output_embeddings()
    head.set_adapter(["one", "two"])
    with torch.no_grad():
        for name in ("one", "two"):
            head.lora_B[name].weight.normal_(generator=torch.Generator().manual_seed(1))
    check(head.double(), torch.float64)


def test_one_adapter_is_no_copy():
    head = make_head("lora")
    layer, _, low_rank = product(head, torch.zeros(2, HIDDEN))
    assert low_rank is not None
    assert layer is head.base_layer and low_rank[1] is head.lora_B["default"].weight


def test_what_is_no_product_says_so():
    linear = nn.Linear(HIDDEN, VOCAB, bias=False)
    reason = reason_against(Int8Activations(linear), torch.float32)
    assert reason is not None and "Int8Activations, whose outputs differ from the product with any one weight" in reason
    random = Int8Head(linear)
    random.dropout = nn.Dropout(0.1)
    assert "whose dropout makes another weight for every token" in str(reason_against(random, torch.float32))
    assert "which has no in_features" in str(reason_against(nn.Identity(), torch.float32))
    head = make_head("lora")
    head.lora_variant["default"] = type("ALoraLinearVariant", (), {})()
    assert "adapter 'default' is a ALoraLinearVariant, neither" in str(reason_against(head, torch.float32))
    head = make_head("lora")
    head.base_layer = Int8Activations(linear)
    assert "under its adapters it is a " in str(reason_against(head, torch.float32))
