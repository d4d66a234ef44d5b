"""``apply_liger_kernel_to_llama`` and its siblings, and the Auto classes."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, MistralForCausalLM

import liger_trainer
from liger_trainer import is_patched, revert
from liger_trainer.patching.by_type import function_names, registered_types


@pytest.fixture(autouse=True)
def registered():
    before = {cls: vars(cls).get("__init__") for cls in (LlamaForCausalLM, LlamaModel, MistralForCausalLM)}
    yield
    for model_type in registered_types():
        revert(model_type)
    assert {cls: vars(cls).get("__init__") for cls in before} == before


def test_there_is_one_for_every_type():
    names = function_names()
    assert len(names) > 400
    for name in ("llama", "llama4_text", "qwen2_5_vl", "gemma3", "blip_2", "xlm_roberta", "gpt_oss"):
        assert f"apply_liger_kernel_to_{name}" in names
        assert callable(getattr(liger_trainer, f"apply_liger_kernel_to_{name}"))
    with pytest.raises(AttributeError, match="no model type 'lama'"):
        _ = liger_trainer.apply_liger_kernel_to_lama


def test_a_model_that_exists(tiny):
    model = tiny("Llama")
    report = liger_trainer.apply_liger_kernel_to_llama(model, swiglu=False, rope=False)
    assert report.counts() == {"rms_norm": 5, "fused_add_rms_norm": 2, "fused_linear_cross_entropy": 1}
    with pytest.raises(ValueError, match="of type 'mistral', got LlamaForCausalLM of \\['llama'\\]"):
        liger_trainer.apply_liger_kernel_to_mistral(model)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        liger_trainer.apply_liger_kernel_to_llama("llama")
    with pytest.raises(ValueError, match="swiglu=False and mlp=True contradict"):
        liger_trainer.apply_liger_kernel_to_llama(model, swiglu=False, mlp=True)


def test_models_that_are_made_later(tiny, tmp_path):
    earlier, other = tiny("Llama"), tiny("Mistral")
    assert liger_trainer.apply_liger_kernel_to_llama(rope=False) is None
    assert registered_types() == ["llama"]
    later = tiny("Llama")
    assert is_patched(later)
    assert type(later.model.layers[0].self_attn).__mro__[1] is torch.nn.Module  # rope=False
    assert is_patched(LlamaModel(later.config))
    assert is_patched(AutoModelForCausalLM.from_config(later.config))
    assert not any(map(is_patched, (earlier, other, tiny("Mistral"))))
    later.save_pretrained(tmp_path)
    assert is_patched(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert revert("llama") is None
    assert not is_patched(tiny("Llama"))
    assert not is_patched(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert is_patched(later)


def test_a_model_is_patched_once_as_a_whole(tiny, monkeypatch):
    patched = []
    monkeypatch.setattr("liger_trainer.patching.by_type.apply_liger_kernel", lambda model: patched.append(model))
    liger_trainer.apply_liger_kernel_to_llama()
    model = tiny("Llama")
    assert patched == [model]  # and not the LlamaModel in it


def test_a_loaded_model_gives_what_the_stock_one_gives(tiny, batch, gradients, error, tmp_path):
    model = tiny("Llama")
    theirs = gradients(model, batch)
    model.save_pretrained(tmp_path)
    liger_trainer.apply_liger_kernel_to_llama()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert error(gradients(loaded, batch), theirs) < 5e-6


def test_registering_again_takes_the_new_options(tiny):
    liger_trainer.apply_liger_kernel_to_llama(mlp=False)
    liger_trainer.apply_liger_kernel_to_llama(rope=False)
    model = tiny("Llama")
    assert not hasattr(type(model.model.layers[0].self_attn), "_liger_trainer_stock_class")
    assert hasattr(type(model.model.layers[0].mlp), "_liger_trainer_stock_class")
    revert("llama")
    revert("llama")
    assert not is_patched(tiny("Llama"))


def test_wrong_options_register_nothing():
    with pytest.raises(TypeError, match="unknown option 'rmsnorm'"):
        liger_trainer.apply_liger_kernel_to_llama(rmsnorm=True)
    assert registered_types() == []


def test_a_type_without_a_class_of_its_own():
    with pytest.raises(ValueError, match="no model class for 'internlm3' of its own"):
        liger_trainer.apply_liger_kernel_to_internlm3()
    assert registered_types() == []


class TestAutoClasses:
    def test_from_pretrained_and_from_config(self, tiny, tmp_path):
        model = tiny("Llama")
        model.save_pretrained(tmp_path)
        auto = liger_trainer.AutoLigerKernelForCausalLM
        loaded = auto.from_pretrained(tmp_path, rope=False, dtype=torch.bfloat16)
        assert isinstance(loaded, LlamaForCausalLM)
        assert loaded.dtype == torch.bfloat16
        assert is_patched(loaded)
        assert not is_patched(loaded.model.layers[0].self_attn)
        assert is_patched(auto.from_config(model.config))
        assert not is_patched(AutoModelForCausalLM.from_pretrained(tmp_path))
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert is_patched(loaded)
        assert not info["missing_keys"]

    def test_every_auto_class_has_one(self):
        auto = liger_trainer.AutoLigerKernelForImageTextToText
        assert issubclass(auto, transformers.AutoModelForImageTextToText)
        assert auto is liger_trainer.AutoLigerKernelForImageTextToText
        with pytest.raises(AttributeError, match="no AutoModelForTelepathy"):
            _ = liger_trainer.AutoLigerKernelForTelepathy

    def test_a_model_without_a_known_part_is_loaded_with_a_warning(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("liger_trainer"), "propagate", True)
        config = transformers.RwkvConfig(
            vocab_size=97, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, intermediate_size=16
        )
        options = {"layer_norm": False, "fused_linear_cross_entropy": False}
        model = liger_trainer.AutoLigerKernelForCausalLM.from_config(config, **options)
        assert not is_patched(model)
        assert "is left as it is: RwkvForCausalLM has no part" in caplog.text

    def test_wrong_options_load_nothing(self):
        with pytest.raises(TypeError, match="option rope must be True or False, got 3"):
            liger_trainer.AutoLigerKernelForCausalLM.from_pretrained("/nowhere", rope=3)
