"""What the processes of test_checkpoints.py run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_models import sequences, tiny_llama
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers import TrainerCallback

from liger_trainer import LigerTrainer, TrainingArguments, apply_liger_kernel
from tests.distributed.training import ROWS, batch, labels_in
from tests.distributed.wrappings import Wrapping, wrapped

SAVED_AFTER, STEPS = 2, 3


def sharded_steps(wrapping: Wrapping, folder: str, resume: bool) -> list[float]:
    """Losses of the steps; saves after ``SAVED_AFTER`` of them, or goes on from there.

    The folder ``plain`` in it is then a checkpoint of plain transformers.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    model: Any = tiny_llama(seed=7 if resume else 0)
    apply_liger_kernel(model)
    spread = wrapped(model, wrapping)
    if resume:
        state = dict(zip(("model", "optimizer"), get_state_dict(spread.model, spread.optimizer)))
        dcp.load(state, checkpoint_id=f"{folder}/sharded")
        set_state_dict(
            spread.model, spread.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    losses, share = [], ROWS // size
    for step in range(SAVED_AFTER if resume else 0, STEPS):
        whole = batch(step)
        mine = {name: each[rank * share : (rank + 1) * share] for name, each in whole.items()}
        loss = spread.model(**mine, num_items_in_batch=labels_in(whole)).loss
        spread.backward(loss * size)
        spread.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(float(loss))
        if step + 1 == SAVED_AFTER and not resume:
            state = dict(zip(("model", "optimizer"), get_state_dict(spread.model, spread.optimizer)))
            dcp.save(state, checkpoint_id=f"{folder}/sharded")
    if not resume:
        options = StateDictOptions(full_state_dict=True)
        whole_state = get_model_state_dict(spread.model, options=options)
        if rank == 0:
            model.save_pretrained(f"{folder}/plain", state_dict=whole_state)
    dist.barrier()
    return losses


class _Killer(TrainerCallback):
    """Kills the last process between a step's forward and its end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_steps(
    folder: str, resume: str | None = None, kill_at: int = 0, deepspeed: Any = None, model: nn.Module | None = None
) -> dict[int, float]:
    """Losses by step of a ``LigerTrainer`` that takes 8 rows a step in any number of processes."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for each in (AcceleratorState, GradientState, PartialState):
        each._reset_state()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        folder,
        use_cpu=True,
        use_liger=True,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // size,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        deepspeed=deepspeed,
    )
    trainer = LigerTrainer(
        tiny_llama() if model is None else model,
        args,
        train_dataset=sequences(40),
        callbacks=[_Killer(kill_at)] if kill_at else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.accelerator.num_processes == size
    trainer.save_model(f"{folder}/final")
    return {each["step"]: each["loss"] for each in trainer.state.log_history if "loss" in each}


if __name__ == "__main__":
    trainer_steps(sys.argv[1], kill_at=int(sys.argv[2]))
    (Path(sys.argv[1]) / f"finished-{os.environ['RANK']}").touch()
