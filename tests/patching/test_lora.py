"""LoRA layers whose product is added in place, beside peft's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from liger_trainer import apply_liger_kernel, plan, revert
from liger_trainer.patching import lora

peft = pytest.importorskip("peft")
KIND = "lora"
ONLY = {"rope": False, "rms_norm": False, "mlp": False, "fused_add_rms_norm": False, "lora": True}


class Block(nn.Module):
    def __init__(self, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(33, 70, bias=bias, dtype=dtype)
        self.down = nn.Linear(70, 33, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(
    bias: bool = False, dtype: torch.dtype = torch.float32, adapter_dtype: bool = False, **options
) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=5, lora_alpha=15, target_modules=["up", "down"], init_lora_weights=False, **options)
    return peft.get_peft_model(Block(bias, dtype), config, autocast_adapter_dtype=adapter_dtype).train()


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def patched(model: nn.Module) -> nn.Module:
    report = apply_liger_kernel(model, **ONLY, fused_linear_cross_entropy=False)
    assert report.counts() == {KIND: 2}, str(report)
    return model


def outcome(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of a dropout
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    model.zero_grad()
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        gap = (ours[name].double() - expected.double()).norm() / expected.double().norm()
        assert gap <= tolerance, (name, float(gap))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("options", "autocast"),
    [
        ({"dtype": torch.float64}, None),
        ({"dtype": torch.float32}, None),
        ({"dtype": torch.float32, "lora_dropout": 0.3}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.bfloat16, "adapter_dtype": True}, None),  # adapters in fp32
        ({"dtype": torch.float32}, torch.bfloat16),
        ({"dtype": torch.bfloat16, "adapter_dtype": True}, torch.bfloat16),
        ({"dtype": torch.bfloat16, "adapter_dtype": True, "lora_dropout": 0.3}, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(33,), (7, 33), (2, 3, 33)], ids=str)
def test_equals_peft(bias, options, autocast, shape):
    model = adapted(bias, **options)
    x = torch.randn(shape, dtype=options["dtype"])
    theirs = outcome(model, x, autocast)
    half = autocast is not None or options["dtype"] == torch.bfloat16
    tolerance = 2e-2 if half else 1e-14 if options["dtype"] == torch.float64 else 1e-6
    compare(outcome(patched(model), x, autocast), theirs, tolerance)
    compare(outcome(revert(model), x, autocast), theirs, 0)


def test_it_is_nearer_to_exact_numbers_in_bf16():
    model = adapted(dtype=torch.bfloat16)
    x = torch.randn(64, 33, dtype=torch.bfloat16)
    exact = outcome(copy.deepcopy(model).double(), x.double())["y"]
    stock = outcome(model, x)["y"]
    ours = outcome(patched(model), x)["y"]
    assert (ours - exact).norm() < (stock - exact).norm()


def test_nothing_as_wide_as_the_output_is_made_beside_it():
    model = adapted()
    counts = []
    for each in (model, patched(copy.deepcopy(model))):
        with torch.profiler.profile(record_shapes=True) as profile:
            each(torch.randn(4, 33, requires_grad=True)).sum().backward()
        counts.append(sum(event.name in ("aten::mul", "aten::add") for event in profile.events()))
    assert counts[1] < counts[0]
    layer = layers(patched(model))[0]
    made = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: made.append(output.data_ptr()))
    x = torch.randn(4, 33)
    assert layer(x).data_ptr() != made[0], "an output that a hook has seen is not written to"
    layer.base_layer._forward_hooks.clear()
    assert isinstance(layer(x.requires_grad_()).grad_fn, lora._AddLowRank._backward_cls)


def test_what_is_not_one_plain_adapter_goes_through_peft():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False))
    x = torch.randn(6, 33)
    stock = copy.deepcopy(model)
    patched(model)
    for change in (
        lambda each: each.set_adapter("other"),
        lambda each: each.base_model.set_adapter(["default", "other"]),
        lambda each: each.set_adapter("default"),
        lambda each: each.merge_adapter(),
        lambda each: each.unmerge_adapter(),
    ):
        change(model), change(stock)
        compare(outcome(model, x), outcome(stock, x), 1e-6)
    with model.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(model(x), stock(x))


def test_dora_and_other_layers_are_left_alone():
    for options, reason in (({"use_dora": True}, "not a plain LoRA"), ({"lora_bias": True}, None)):
        report = plan(adapted(**options), **ONLY)
        if reason is None:
            compare(outcome(apply_and_return(adapted(**options)), X), outcome(adapted(**options), X), 1e-6)
        else:
            assert all(reason in entry.reason for entry in report.skipped if entry.kind == KIND)
            assert report.counts() == {}


X = torch.linspace(-1, 1, 66).view(2, 33)


def apply_and_return(model: nn.Module) -> nn.Module:
    apply_liger_kernel(model, **ONLY)
    return model


def test_off_by_default():
    assert KIND not in plan(adapted()).counts()


def test_copies_pickles_and_a_second_backward():
    model = patched(adapted())
    x = torch.randn(5, 33)
    expected = outcome(model, x)
    compare(outcome(copy.deepcopy(model), x), expected, 0)
    compare(outcome(pickle.loads(pickle.dumps(model)), x), expected, 1e-6)
    y = model(x.requires_grad_()).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_a_layer_that_computes_something_else_is_left_alone(monkeypatch):
    model = adapted()
    wrong = lambda y, a, b, scaling, own: y + a @ b.t()  # noqa: E731  without the factor
    monkeypatch.setattr(lora, "_add_low_rank", wrong)
    report = plan(model, **ONLY)
    assert report.counts() == {} and all("differs by" in entry.reason for entry in report.skipped)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model(checkpointing):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"],
                               init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    model = peft.get_peft_model(model, adapters).train()
    ids = torch.randint(97, (2, 11))

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    expected = step()
    counts = apply_liger_kernel(model, lora=True).counts()
    assert counts[KIND] == 8 and counts["fused_linear_cross_entropy"] == 1, "the head's adapter is the loss's"
    compare(step(), expected, 1e-5)
    compare(step(), expected, 1e-5)
    revert(model)
    compare(step(), expected, 0)
