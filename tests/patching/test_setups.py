"""Patched models in what users put them into: adapters, attention implementations, generation, offloading."""

from __future__ import annotations

import copy

import pytest
import torch

from liger_trainer import apply_liger_kernel, is_patched, revert
from tests.census.examine import build as build_type
from tests.census.inputs import text_batch

EIGHT = ["llama", "qwen3", "gemma3_text", "phi3", "mistral", "olmo2", "granite", "qwen3_moe"]


@pytest.mark.parametrize("model_type", EIGHT)
def test_generation_is_the_same(model_type):
    model = build_type("causal", model_type).eval()
    prompt = torch.randint(5, 150, (2, 7), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": 32, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    theirs = model.generate(prompt, **arguments)
    state, config = list(model.state_dict()), model.config.to_json_string()
    assert apply_liger_kernel(model).counts().keys() >= {"rms_norm", "rope", "fused_linear_cross_entropy"}
    assert torch.equal(model.generate(prompt, **arguments), theirs)
    assert theirs.shape == (2, 39)
    assert (list(model.state_dict()), model.config.to_json_string()) == (state, config)


def targets(model):
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if name.endswith("_proj")})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
@pytest.mark.parametrize("patched_first", [True, False])
def test_adapters_on_every_projection(tiny, batch, gradients, error, family, dora, patched_first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=targets(tiny(family)), use_dora=dora, init_lora_weights=False, lora_dropout=0.0
    )

    def wrapped(patch):
        model = tiny(family)
        if patch and patched_first:
            apply_liger_kernel(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        if patch and not patched_first:
            apply_liger_kernel(model)
        return model

    reference, model = wrapped(False), wrapped(True)
    theirs = gradients(reference, batch)
    assert any("lora_A" in name for name in theirs)
    assert any(is_patched(m) for m in model.modules())
    assert error(gradients(model, batch), theirs) < 1e-5
    for each in (reference, model):
        each.merge_adapter()
    with torch.no_grad():
        assert model(**batch).loss == pytest.approx(float(reference(**batch).loss), rel=1e-5)
    for each in (reference, model):
        each.unmerge_adapter()
    reference, model = (each.merge_and_unload().requires_grad_(True) for each in (reference, model))
    assert is_patched(model)
    assert error(gradients(model, batch), gradients(reference, batch)) < 1e-5


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("Llama", "eager"), ("Llama", "sdpa"), ("Qwen3", "eager"), ("Qwen3", "sdpa"), ("Gemma2", "eager")],
)
def test_attention_implementations(tiny, batch, gradients, error, family, implementation):
    """The others have no backward on the CPU; tests/gpu has them."""
    reference = tiny(family, attn_implementation=implementation)
    model = copy.deepcopy(reference)
    apply_liger_kernel(model)
    assert error(gradients(model, batch), gradients(reference, batch)) < 1e-5


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_moe", "deepseek_v3", "llama4_text", "granite"])
def test_compiled_with_every_part_replaced(model_type, gradients, error):
    torch.compiler.reset()
    model = build_type("causal", model_type)
    batch = text_batch(model)
    theirs = gradients(model, batch)
    apply_liger_kernel(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in gradients(compiled, batch).items()}
    assert error(ours, theirs) < 1e-5


class TestOffloading:
    def test_a_patched_model_may_be_offloaded(self, tiny, batch):
        accelerate = pytest.importorskip("accelerate")
        reference = tiny("Llama").eval()
        model = copy.deepcopy(reference)
        apply_liger_kernel(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with torch.no_grad():
            ours, theirs = model(**batch), reference(**batch)
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(model(batch["input_ids"]).logits, theirs.logits, rtol=1e-4, atol=1e-4)

    def test_parts_of_an_offloaded_model_are_refused_by_name(self, tiny, batch):
        accelerate = pytest.importorskip("accelerate")
        reference = tiny("Llama").eval()
        model = copy.deepcopy(reference)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        report = apply_liger_kernel(model)
        # What has weights of its own has a hook that fetches them; an MLP calls its projections, which have.
        assert {entry.kind for entry in report.skipped} == {"rms_norm", "fused_linear_cross_entropy"}
        assert all("on the instance" in entry.reason for entry in report.skipped)
        assert report.counts() == {"mlp": 2, "rope": 2}
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).loss, reference(**batch).loss)

    def test_a_device_map_of_one_device(self, tiny, batch, gradients, error, tmp_path):
        pytest.importorskip("accelerate")
        model = tiny("Llama")
        theirs = gradients(model, batch)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, device_map="cpu").train()
        apply_liger_kernel(loaded)
        assert error(gradients(loaded, batch), theirs) < 5e-6


def test_a_patched_reference_model_beside_a_patched_policy(tiny, batch, gradients, error):
    """As in preference training: the reference is a copy that is frozen and run without gradients."""
    policy = tiny("Llama")
    theirs = gradients(policy, batch)
    expected = policy(**batch).logits.detach()
    apply_liger_kernel(policy)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    assert is_patched(reference)
    with torch.no_grad():
        torch.testing.assert_close(reference(**batch).logits + 0, expected, rtol=1e-4, atol=1e-4)
    assert error(gradients(policy, batch), theirs) < 5e-6
    revert(reference)
    assert is_patched(policy)
    assert torch.equal(reference(**batch).logits, expected)
