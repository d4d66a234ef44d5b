"""Patched models of every family against their untouched selves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from liger_trainer.patching import apply_liger_kernel, is_patched, plan, revert

OPTIONS = {"fused_linear_cross_entropy": False}
LAYERS = {"Llama": 2, "Mistral": 2, "Qwen2": 2, "Qwen3": 2, "Gemma": 2, "Gemma2": 2, "Phi3": 3}
NORMS = {"Llama": 5, "Mistral": 5, "Qwen2": 5, "Qwen3": 9, "Gemma": 5, "Gemma2": 9, "Phi3": 7}

families = pytest.mark.parametrize("family", LAYERS)


@families
def test_every_part_is_replaced(tiny, family):
    model = tiny(family)
    report = apply_liger_kernel(model, **OPTIONS)
    layers = dict.fromkeys(("fused_add_rms_norm", "mlp", "rope"), LAYERS[family])
    assert report.counts() == {"rms_norm": NORMS[family], **layers}
    assert report.skipped == ()
    kernels = {entry.kind: entry.kernel for entry in report.replaced}
    gemma = family.startswith("Gemma")
    assert kernels["mlp"] == ("geglu(tanh)" if gemma else "swiglu")
    assert kernels["rms_norm"] == ("rms_norm(gemma, weight + 1)" if gemma else "rms_norm(llama)")


@families
def test_fp32_loss_and_gradients(tiny, batch, gradients, error, family):
    model = tiny(family)
    theirs = gradients(model, batch)
    apply_liger_kernel(model, **OPTIONS)
    assert error(gradients(model, batch), theirs) < 5e-6


@families
def test_bf16_loss_and_gradients(tiny, batch, gradients, mean_error, family):
    model = tiny(family).bfloat16()
    truth = gradients(copy.deepcopy(model).float(), batch)
    theirs = gradients(model, batch)
    apply_liger_kernel(model, **OPTIONS)
    ours = gradients(model, batch)
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    # Fewer roundings than the untouched model's, so no further from the exact result, up to chance.
    assert mean_error(ours, truth) < 1.3 * mean_error(theirs, truth)


@families
def test_autocast(tiny, batch, gradients, mean_error, family):
    model = tiny(family)
    truth = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(model, batch)
        apply_liger_kernel(model, **OPTIONS)
        ours = gradients(model, batch)
    assert mean_error(ours, truth) < 1.3 * mean_error(theirs, truth)


@families
def test_revert_restores_the_model(tiny, batch, untouched, family):
    model = tiny(family)
    check = untouched(model)
    forwards = [m.forward.__func__ for m in model.modules()]
    before = model(**batch).logits
    apply_liger_kernel(model, **OPTIONS)
    assert is_patched(model)
    assert revert(model) is model
    assert not is_patched(model)
    check()
    assert [m.forward.__func__ for m in model.modules()] == forwards
    assert torch.equal(model(**batch).logits, before)


@families
def test_plan_touches_nothing(tiny, untouched, family):
    model = tiny(family)
    check, state = untouched(model), torch.get_rng_state()
    planned = plan(model, **OPTIONS)
    check()
    assert torch.equal(torch.get_rng_state(), state)
    assert not is_patched(model)
    assert apply_liger_kernel(model, **OPTIONS) == planned
    assert plan(model, **OPTIONS) == planned  # of a patched model: what it would be from scratch


def test_what_others_see_of_a_patched_model_stays(tiny, untouched):
    model = tiny("Qwen3")
    model.model.norm.register_forward_hook(lambda *_: None)
    classes = {name: type(m) for name, m in model.named_modules()}
    check = untouched(model)
    state = torch.get_rng_state()
    apply_liger_kernel(model, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    for name, module in model.named_modules():
        stock = classes[name]
        assert isinstance(module, stock)
        assert (type(module).__name__, type(module).__qualname__) == (stock.__name__, stock.__qualname__)
        assert type(module).__module__ == stock.__module__
    assert len({type(m) for m in model.modules() if type(m).__name__ == "Qwen3RMSNorm"}) == 1
    assert type(model.model.layers[0]) is classes["model.layers.0"]  # its checkpointing looks at its class
    revert(model)
    check()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
def test_gradient_checkpointing(tiny, batch, gradients, error, family, reentrant):
    model = tiny(family)
    theirs = gradients(model, batch)
    apply_liger_kernel(model, **OPTIONS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(0))
    assert error(gradients(model, batch), theirs) < 5e-6
    assert len(calls) == 2  # once more in the backward


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi3"])
def test_compiled_without_a_graph_break(tiny, batch, gradients, error, family):
    torch.compiler.reset()
    model = tiny(family)
    theirs = gradients(model, batch)
    apply_liger_kernel(model, **OPTIONS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in gradients(compiled, batch).items()}
    assert error(ours, theirs) < 5e-6


def test_attentions_and_hidden_states_are_still_recorded(tiny, batch):
    model = tiny("Llama", attn_implementation="eager").eval()
    theirs = model(**batch, output_attentions=True, output_hidden_states=True)
    apply_liger_kernel(model, **OPTIONS)
    ours = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(ours.attentions) == len(ours.hidden_states) - 1 == 2
    for a, b in zip(ours.attentions + ours.hidden_states, theirs.attentions + theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_generation_is_the_same(tiny, batch):
    model = tiny("Qwen3").eval()
    arguments = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    theirs = model.generate(batch["input_ids"], **arguments)
    apply_liger_kernel(model, **OPTIONS)
    assert torch.equal(model.generate(batch["input_ids"], **arguments), theirs)


def test_two_models_of_one_class_side_by_side(tiny, batch):
    patched, other = tiny("Llama").bfloat16(), tiny("Llama").bfloat16()
    expected = other(**batch).logits
    apply_liger_kernel(patched, **OPTIONS)
    assert not is_patched(other)
    assert torch.equal(other(**batch).logits, expected)
    assert not torch.equal(patched(**batch).logits, expected)  # other roundings: the kernels did run


def test_deepcopy_is_patched_and_pickle_is_not(tiny, batch):
    model = tiny("Gemma2")
    original = {type(m).__name__: type(m) for m in model.modules()}
    before = model(**batch).logits
    apply_liger_kernel(model, **OPTIONS)
    after = model(**batch).logits

    copied = copy.deepcopy(model)
    assert is_patched(copied)
    assert torch.equal(copied(**batch).logits, after)
    assert copied.model.norm.weight is not model.model.norm.weight
    revert(copied)
    assert not is_patched(copied)
    assert is_patched(model)
    assert torch.equal(copied(**batch).logits, before)

    loaded = pickle.loads(pickle.dumps(model))
    assert not is_patched(loaded)
    assert all(type(m) is original[type(m).__name__] for m in loaded.modules())
    assert torch.equal(loaded(**batch).logits, before)


def test_a_copy_is_patched_anew_with_other_options(tiny):
    model = tiny("Llama")
    apply_liger_kernel(model, **OPTIONS)
    copied = copy.deepcopy(model)
    assert apply_liger_kernel(copied, rms_norm=False, rope=False, **OPTIONS).counts() == {"mlp": 2}
    assert type(copied.model.norm) is not type(model.model.norm)
    assert is_patched(model)


def test_save_pretrained_and_torch_save(tiny, batch, tmp_path):
    model = tiny("Llama")
    keys = list(model.state_dict())
    apply_liger_kernel(model, **OPTIONS)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert not is_patched(loaded)
    revert(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    apply_liger_kernel(model, **OPTIONS)
    torch.save(model, tmp_path / "model.pt")
    assert not is_patched(torch.load(tmp_path / "model.pt", weights_only=False))


def test_model_on_the_meta_device_is_recognised(tiny):
    with torch.device("meta"):
        model = tiny("Gemma2")
        report = apply_liger_kernel(model, **OPTIONS)
    assert report.counts() == {"rms_norm": 9, "fused_add_rms_norm": 2, "mlp": 2, "rope": 2}


class TestAdapters:
    def wrap(self, model):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            target_modules=["q_proj", "gate_proj", "down_proj"], modules_to_save=["model.norm"], init_lora_weights=False
        )
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)

    @pytest.mark.parametrize("patched_first", [True, False])
    def test_lora(self, tiny, batch, gradients, error, patched_first):
        theirs = gradients(self.wrap(tiny("Llama")), batch)
        model = tiny("Llama")
        if patched_first:
            apply_liger_kernel(model, **OPTIONS)
        model = self.wrap(model)
        if not patched_first:
            report = apply_liger_kernel(model, **OPTIONS)
            # The final norm counts twice: the original, and the copy that is trained and saved.
            assert report.counts() == {"rms_norm": 6, "fused_add_rms_norm": 2, "mlp": 2, "rope": 2}
        ours = gradients(model, batch)
        assert any("lora" in name for name in ours)
        assert error(ours, theirs) < 5e-6
        revert(model)
        assert not is_patched(model)
        assert error(gradients(model, batch), theirs) == 0

    def test_patched_again_through_the_wrapper(self, tiny):
        model = tiny("Llama")
        apply_liger_kernel(model, **OPTIONS)
        wrapped = self.wrap(model)
        apply_liger_kernel(wrapped, mlp=False, **OPTIONS)
        assert type(wrapped.base_model.model.model.layers[0].mlp).__mro__[1] is torch.nn.Module
        revert(model)
        # Only what lies outside of model is still patched, if anything: applying again makes it whole.
        counts = apply_liger_kernel(wrapped, mlp=False, **OPTIONS).counts()
        assert counts == {"rms_norm": 6, "fused_add_rms_norm": 2, "rope": 2}
        assert is_patched(model)
