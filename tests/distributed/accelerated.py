"""Trainers whose model accelerate itself gives to FSDP2, on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import state
from accelerate.utils import DistributedType
from tiny_models import sequences, tiny_llama
from torch.distributed.fsdp import FSDPModule

import liger_trainer


@contextmanager
def fsdp2_on_a_cpu(casts: bool) -> Iterator[None]:
    """accelerate takes FSDP for DDP on a CPU: inside, it doesn't, under bf16 with its policy.

    Args:
        casts: whether that policy's ``output_dtype`` stays, or is None.
    """
    made = state.AcceleratorState.__init__

    def make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        first = not state.is_initialized()
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first:
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
            policy = fsdp_plugin.mixed_precision_policy
            assert policy.output_dtype == torch.bfloat16
            if not casts:
                fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)

    environment = dict(os.environ)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.AcceleratorState, "__init__", make)
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            state.AcceleratorState._reset_state(reset_partial_state=True)


STEPS = 2
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": True,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def _trainer(kind: str, folder: Path) -> Any:
    if kind == "trainer":
        args = liger_trainer.TrainingArguments(str(folder), use_liger=True, **COMMON)
        return liger_trainer.LigerTrainer(tiny_llama(), args, train_dataset=sequences(12), eval_dataset=sequences(4))
    sys.path.insert(0, str(Path(__file__).parents[1] / "trl"))
    import beside_trl as data

    from liger_trainer import trl as ours

    name, _, variant = kind.partition("-")
    options: dict[str, Any] = {}
    rows = {"kto": data.unpaired, "sft": data.chats, "gkd": data.chats}.get(name, data.pairs)(12)
    if name == "gkd":
        options["teacher_model"] = tiny_llama(seed=5)
    elif name in ("dpo", "kto") and variant != "lora":
        options["ref_model"] = tiny_llama()
    if variant == "lora":
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    config = {each.lower(): each for each in ("SFT", "DPO", "KTO", "ORPO", "CPO", "GKD")}[name]
    if variant == "stock":  # TRL's own, whose loss is replaced when it exists
        import trl

        made, args = getattr(trl, f"{config}Trainer"), getattr(trl, f"{config}Config")(str(folder), **COMMON)
    else:
        made = getattr(ours, f"Liger{config}Trainer")
        args = getattr(ours, f"Liger{config}Config")(str(folder), use_liger=True, **COMMON)
    trainer = made(
        model=tiny_llama(), args=args, train_dataset=rows, eval_dataset=rows,
        processing_class=data.tokenizer(chat=name in ("sft", "gkd")), **options,
    )  # fmt: skip
    return ours.apply_liger_loss(trainer) if variant == "stock" else trainer


def log(kind: str, casts: bool, folder: Path) -> list[dict[str, float]]:
    """What a trainer of this ``kind`` logs of two steps, and of an evaluation."""
    with fsdp2_on_a_cpu(casts):
        torch.manual_seed(0)
        trainer = _trainer(kind, folder)
        trainer.train()
        trainer.evaluate()
        assert isinstance(trainer.model, FSDPModule)
    timed = ("runtime", "per_second", "step_time", "total_flos")
    return [{k: v for k, v in each.items() if not k.endswith(timed)} for each in trainer.state.log_history]
