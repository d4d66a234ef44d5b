"""Heads with dropped-out adapters and in int8, trainers that exist already, and what can't work says so."""

from __future__ import annotations

import copy

import pytest
import torch
from beside_trl import arguments, assert_same_run, chats, pairs, run_beside, slow, tokenizer
from on_logits import on_logits
from peft import LoraConfig, TaskType
from quantised_heads import Int8Head
from tiny_models import HIDDEN, VOCAB, tiny_llama
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from liger_trainer.trl import (
    LigerDistillationConfig,
    LigerDistillationTrainer,
    LigerDPOConfig,
    LigerDPOTrainer,
    LigerGKDConfig,
    LigerGKDTrainer,
    LigerGRPOConfig,
    LigerGRPOTrainer,
    LigerORPOConfig,
    LigerORPOTrainer,
    apply_liger_loss,
)

DPO = (LigerDPOTrainer, DPOTrainer), (LigerDPOConfig, DPOConfig)
ORPO = (LigerORPOTrainer, ORPOTrainer), (LigerORPOConfig, ORPOConfig)


def adapter(options):
    return {"peft_config": LoraConfig(r=4, lora_alpha=8, task_type=TaskType.CAUSAL_LM, **options)}


def test_orpo_with_a_dropped_out_adapter_on_the_head(tmp_path):
    run_beside(
        *ORPO,
        pairs(),
        tmp_path,
        trainer_options=lambda: adapter({"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.3}),
        transposed_width=32 + 4,
        max_length=16,
    )


def quantised():
    model = tiny_llama()
    model.lm_head = Int8Head(model.lm_head)
    return model


def test_orpo_with_a_quantised_head(tmp_path):
    run_beside(*ORPO, pairs(), tmp_path, model=quantised, max_length=16)


@slow
def test_dpo_with_a_quantised_head(tmp_path):
    trainers = LigerDPOTrainer, on_logits(DPOTrainer)
    run_beside(trainers, DPO[1], pairs(), tmp_path, model=quantised, trainer_options=lambda: {"ref_model": quantised()})


def test_without_our_loss_an_adapter_on_the_head_is_refused_as_by_trl(tmp_path):
    for trainer, config in zip(*DPO, strict=True):
        options = {"use_liger": False} if config is LigerDPOConfig else {}
        with pytest.raises(ValueError, match=r"(?i)adapter.*head"):
            trainer(
                model=tiny_llama(),
                args=arguments(config, tmp_path, **options),
                train_dataset=pairs(),
                processing_class=tokenizer(),
                **adapter({"target_modules": ["lm_head"]}),
            )


def test_a_trainer_that_exists_already(tmp_path):
    class OfTheUser(DPOTrainer):
        pass

    trainers = []
    for applied in (True, False):
        torch.manual_seed(0)
        trainer = OfTheUser(
            model=tiny_llama(),
            ref_model=tiny_llama(1),
            args=arguments(DPOConfig, tmp_path),
            train_dataset=copy.deepcopy(pairs()),
            processing_class=tokenizer(),
        )
        if applied:
            assert apply_liger_loss(trainer) is trainer
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers)


def test_switched_off_it_is_trls(tmp_path, monkeypatch):
    for name in ("argument", "environment"):
        if name == "environment":
            monkeypatch.setenv("LIGER_TRAINER_DISABLE", "1")
        trainer = LigerDPOTrainer(
            model=tiny_llama(),
            ref_model=tiny_llama(1),
            args=arguments(LigerDPOConfig, tmp_path, use_liger=name == "environment"),
            train_dataset=pairs(),
            processing_class=tokenizer(),
        )
        assert trainer.model.forward.__func__.__code__.co_name == "_fused_forward"


def test_stock_arguments_will_do(tmp_path):
    trainer = LigerDPOTrainer(
        model=tiny_llama(),
        ref_model=tiny_llama(1),
        args=arguments(DPOConfig, tmp_path),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )
    assert trainer.uses_liger_loss
    assert trainer.model.forward.__func__.__code__.co_name == "forward"


class Rounding(nn.Linear):
    """A head that rounds its inputs."""

    def forward(self, x):
        return super().forward(x.round())


def test_what_cannot_work_says_so_at_construction(tmp_path):
    alora = LoraConfig(
        r=4,
        target_modules=["lm_head"],
        task_type=TaskType.CAUSAL_LM,
        alora_invocation_tokens=[5],
        init_lora_weights=True,
    )
    with pytest.raises(ValueError, match=r"the LM head of LlamaForCausalLM can't do without its logits: .*ALora"):
        LigerDPOTrainer(
            model=tiny_llama(),
            args=arguments(LigerDPOConfig, tmp_path),
            train_dataset=pairs(),
            processing_class=tokenizer(),
            peft_config=alora,
        )
    model = tiny_llama()
    model.lm_head = Rounding(HIDDEN, VOCAB)
    for trainer, config, data in (
        (LigerDPOTrainer, LigerDPOConfig, pairs()),
        (LigerDistillationTrainer, LigerDistillationConfig, pairs().select_columns(["prompt"])),
    ):
        with pytest.raises(ValueError, match=r"can't do without its logits: .*Rounding, whose outputs differ"):
            trainer(
                model=model,
                args=arguments(config, tmp_path),
                train_dataset=data,
                processing_class=tokenizer(),
                **{"ref_model" if trainer is LigerDPOTrainer else "teacher_model": tiny_llama(1)},
            )
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True replaces the forward of the LM head"):
        LigerGRPOTrainer(
            model=tiny_llama(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments(LigerGRPOConfig, tmp_path, cast_lm_head_to_fp32=True, num_generations=2),
            train_dataset=pairs().select_columns(["prompt"]),
            processing_class=tokenizer(),
            **adapter({"target_modules": ["lm_head"]}),
        )
    with pytest.raises(ValueError, match="logits_cache_bytes must be at least 0, got -1"):
        LigerDPOConfig(str(tmp_path), logits_cache_bytes=-1)
    with pytest.raises(ValueError, match="LigerGKDTrainer has no least-memory mode"):
        LigerGKDTrainer(
            model=tiny_llama(),
            teacher_model=tiny_llama(1),
            args=arguments(LigerGKDConfig, tmp_path, least_memory=True, logits_cache_bytes=None),
            train_dataset=chats(),
            processing_class=tokenizer(chat=True),
        )


def test_a_trainer_without_a_fused_head_says_so(tmp_path):
    trainer = ORPOTrainer(
        model=tiny_llama(),
        args=arguments(ORPOConfig, tmp_path),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )
    with pytest.raises(ValueError, match="ORPOTrainer gave its LlamaForCausalLM no fused LM head"):
        apply_liger_loss(trainer)
    assert "forward" not in vars(trainer.model)
