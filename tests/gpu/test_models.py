"""Models of every kind in bf16 on the GPU: patched, they are as near to fp32 as untouched, and compile as well."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from liger_trainer import apply_liger_kernel, plan
from liger_trainer.patching import deferred_logits
from tests.census.examine import build
from tests.census.inputs import image_batch, text_batch

CAUSAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "glm4",
    "cohere2", "mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v2", "llama4_text", "gpt_oss", "nanochat", "gpt2",
    "falcon_h1", "hunyuan_v1_moe", "smollm3", "beam",
]  # fmt: skip
VISION = ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "internvl", "llama4", "idefics3", "mllama"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}}


def mean_error(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    largest = max(float(t.norm()) for name, t in truth.items() if name != "loss")
    pairs = [(ours[name].double(), t.double()) for name, t in truth.items()]
    return sum(float((a - b).norm() / max(float(b.norm()), 1e-3 * largest)) for a, b in pairs) / len(pairs)


def moved(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(DEVICE, dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in batch.items()}


@pytest.mark.parametrize(("task", "model_type"), [*(("causal", t) for t in CAUSAL), *(("vision", t) for t in VISION)])
def test_bf16(task, model_type, monkeypatch):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    exact = build(task, model_type)
    batch: dict[str, Any] | None = text_batch(exact)
    if task == "vision":
        batch, reason = image_batch(exact)
        if batch is None:
            pytest.skip(f"untouched, the model takes no images: {reason}")
    exact = exact.to(DEVICE)
    model = copy.deepcopy(exact).bfloat16()
    truth = step(exact, moved(batch, torch.float32))
    theirs = mean_error(step(model, moved(batch, torch.bfloat16)), truth)
    report = apply_liger_kernel(model)
    assert len(report.counts()) > 1, report
    calls, fused = [], deferred_logits.linear_cross_entropy

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        return fused(*args, **kwargs)

    monkeypatch.setattr(deferred_logits, "linear_cross_entropy", counted)
    ours = mean_error(step(model, moved(batch, torch.bfloat16)), truth)
    assert calls
    # Fewer roundings than the untouched model's, up to chance; an expert that is chosen otherwise counts much.
    assert ours < 1.3 * theirs + 0.01


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_compiled(model_type):
    torch.compiler.reset()
    model = build("causal", model_type).to(DEVICE)
    batch = moved(text_batch(model), torch.float32)
    theirs = step(model, batch)
    try:
        step(torch.compile(model, fullgraph=True), batch)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"untouched, the model does not compile: {str(error).splitlines()[0]}")
    torch.compiler.reset()
    apply_liger_kernel(model)
    compiled = torch.compile(model, fullgraph=True)
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in step(compiled, batch).items()}
    assert mean_error(ours, theirs) < 2e-3  # matrix products of fp32 may use TF32


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_attention_implementations(model_type, implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = build("causal", model_type).to(DEVICE, torch.bfloat16)
    model.set_attn_implementation(implementation)
    batch = moved(text_batch(model), torch.bfloat16)
    theirs = step(model, batch)
    apply_liger_kernel(model)
    assert mean_error(step(model, batch), theirs) < 0.05


def test_an_8b_model_is_checked_within_two_seconds():
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    plan(build("causal", "llama").to(DEVICE, torch.bfloat16))  # kernels are compiled once, for all models
    started = time.perf_counter()
    report = plan(model)
    torch.accelerator.synchronize() if DEVICE.type != "cpu" else None
    seconds = time.perf_counter() - started
    assert report.counts() == {
        "rms_norm": 65, "fused_add_rms_norm": 32, "mlp": 32, "rope": 32, "fused_linear_cross_entropy": 1
    }  # fmt: skip
    assert seconds < 2


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    build("causal", "llama").bfloat16().save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    results = []
    for patched in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantization, device_map=DEVICE, dtype=torch.bfloat16
        ).train()
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        if patched:
            assert apply_liger_kernel(model).counts().keys() >= {"rms_norm", "mlp", "rope"}
        results.append(step(model, moved(text_batch(model.base_model.model), torch.bfloat16)))
    assert results[0].keys() == results[1].keys()
    assert mean_error(results[1], results[0]) < 0.05
