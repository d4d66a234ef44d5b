"""How often a model runs for a loss, its metrics and its outputs, and what of its logits is built."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from beside_trl import TILE_ROWS, arguments, chats, pairs, run_beside, tokenizer, unpaired
from datasets import Dataset
from peft import LoraConfig, TaskType
from tiny_models import HIDDEN, VOCAB, sequences, tiny_llama
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer
from wide_tensors import wide_tensors

from liger_trainer import trl

pytestmark = pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning", "ignore::FutureWarning")


def answers():
    rows = [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences(20)]
    return Dataset.from_list(rows)


DATA = {"SFT": answers, "DPO": pairs, "KTO": unpaired, "GKD": chats}


def make(name, tmp_path, model=None, **options):
    other = {"DPO": "ref_model", "KTO": "ref_model", "GKD": "teacher_model"}.get(name)
    extra = {} if other is None or "peft_config" in options else {other: tiny_llama(1)}
    config = {key: options.pop(key) for key in ("label_smoothing_factor",) if key in options}
    return getattr(trl, f"Liger{name}Trainer")(
        model=tiny_llama(),
        args=arguments(getattr(trl, f"Liger{name}Config"), tmp_path, **config),
        train_dataset=DATA[name](),
        processing_class=tokenizer(chat=name == "GKD"),
        **extra,
        **options,
    )


@contextmanager
def layers_run(trainer):
    """Count how often the policy's first layer runs."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    runs = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    yield runs
    hook.remove()


def batch_of(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def cross_entropy(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


@pytest.mark.parametrize(
    ("name", "runs", "options"),
    [
        ("SFT", 1, {}),
        ("SFT", 1, {"compute_loss_func": cross_entropy}),
        ("SFT", 1, {"label_smoothing_factor": 0.1}),
        ("DPO", 1, {}),
        ("KTO", 2, {}),  # the other is over the answers of the divergence
        ("GKD", 1, {}),
        ("DPO", 2, {"peft_config": LoraConfig(r=4, target_modules=["lm_head"], task_type=TaskType.CAUSAL_LM)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_one_forward_serves_loss_metrics_and_outputs(tmp_path, name, runs, options, training):
    """With an adapter, the policy without it is the reference, and runs for that."""
    trainer = make(name, tmp_path, **options)
    trainer.model.train(training)
    batch = batch_of(trainer)
    with torch.set_grad_enabled(training), layers_run(trainer) as counted:
        with wide_tensors(VOCAB, rows=TILE_ROWS, hidden_size=HIDDEN) as found:
            loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
            assert outputs.logits.shape == (*batch["input_ids"].shape, VOCAB)
            classes = outputs.logits.argmax(-1) if not outputs.logits.requires_grad else None
        assert len(counted) == runs
        assert not [shape for _, shape in found if shape[-2:] not in {(36, VOCAB), (HIDDEN, VOCAB)}]
        logits = outputs.logits.detach() + 0
    with torch.no_grad():
        expected = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    if classes is not None:
        assert torch.equal(classes, expected.argmax(-1))
    if training:
        loss.backward()


def test_a_loss_of_cross_entropy_needs_no_logits(tmp_path):
    run_beside(
        (trl.LigerSFTTrainer, SFTTrainer),
        (trl.LigerSFTConfig, SFTConfig),
        answers(),
        tmp_path,
        trainer_options=lambda: {"compute_loss_func": cross_entropy},
    )
