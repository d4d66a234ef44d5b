from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCAB, sequences, tiny_llama
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from liger_trainer import LigerArguments, LigerCallback, TrainingArguments, apply_liger_kernel, is_patched, revert
from liger_trainer._environment import disabled
from liger_trainer.callback import ArgumentsCallback


def settings(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    } | more


class Witness(TrainerCallback):
    """Notes at every step whether the model that trains is patched."""

    def __init__(self) -> None:
        self.seen: list[bool] = []
        self.models: list[nn.Module] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(is_patched(kwargs["model"]))
        self.models.append(kwargs["model"])


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("liger_trainer")]


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGER_TRAINER_DISABLE", raising=False)


def test_use_liger_patches_in_the_stock_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    witness = Witness()
    args = TrainingArguments(**settings(tmp_path), use_liger=True)
    trainer = Trainer(tiny_llama(), args, train_dataset=sequences(), callbacks=[witness])
    assert is_patched(trainer.model)
    assert lines(caplog) == []
    trainer.train()
    assert witness.seen == [True, True]
    (line,) = lines(caplog)
    assert line.startswith("liger_trainer replaced") and "5 rms_norm" in line and "2 mlp" in line


def test_without_use_liger_nothing_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for args in (
        TrainingArguments(**settings(tmp_path), liger_config={"rope": False}),
        transformers.TrainingArguments(**settings(tmp_path)),
    ):
        trainer = Trainer(tiny_llama(), args, train_dataset=sequences())
        trainer.train()
        assert not is_patched(trainer.model)
    assert lines(caplog) == []


def test_a_field_of_the_same_name_elsewhere_means_nothing(tmp_path: Path) -> None:
    @dataclass
    class Other(transformers.TrainingArguments):
        use_liger: bool = True

    assert not is_patched(Trainer(tiny_llama(), Other(**settings(tmp_path))).model)


def test_use_liger_set_after_construction(tmp_path: Path) -> None:
    args = TrainingArguments(**settings(tmp_path))
    args.use_liger = True
    assert is_patched(Trainer(tiny_llama(), args).model)


def test_arguments_that_were_pickled_patch_in_a_fresh_process(tmp_path: Path) -> None:
    pickled = tmp_path / "args.pkl"
    pickled.write_bytes(pickle.dumps(TrainingArguments(**settings(tmp_path), use_liger=True)))
    code = f"""
import pickle, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from transformers import Trainer
args = pickle.load(open({str(pickled)!r}, "rb"))
from tiny_models import tiny_llama
model = Trainer(tiny_llama(), args).model
from liger_trainer import is_patched
sys.exit(not is_patched(model))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_callback_in_the_stock_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = LigerCallback(liger_config={"rms_norm": False})
    args = transformers.TrainingArguments(**settings(tmp_path))
    trainer = Trainer(tiny_llama(), args, train_dataset=sequences(), callbacks=[callback])
    assert is_patched(trainer.model)
    assert callback.report is not None and "rms_norm" not in callback.report.counts()
    trainer.train()
    assert lines(caplog) == [callback.report.line()]


def test_callback_reads_the_config_of_the_arguments(tmp_path: Path) -> None:
    callback = LigerCallback
    args = TrainingArguments(**settings(tmp_path), liger_config={"mlp": False})
    trainer = Trainer(tiny_llama(), args, callbacks=[callback])
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, LigerCallback)]
    assert callback.report is not None and set(callback.report.counts()) >= {"rms_norm"}
    assert "mlp" not in callback.report.counts()


def test_use_liger_and_callback_patch_once_and_say_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = LigerCallback()
    args = TrainingArguments(**settings(tmp_path), use_liger=True, liger_config={"rope": False})
    trainer = Trainer(tiny_llama(), args, train_dataset=sequences(), callbacks=[callback])
    classes = [type(each) for each in trainer.model.modules()]
    trainer.train()
    assert [type(each) for each in trainer.model.modules()] == classes
    assert callback.report is not None and "rope" not in callback.report.counts()
    assert lines(caplog) == [callback.report.line()]
    assert not [each for each in caplog.records if "already one" in each.getMessage()]


def test_two_configs_are_a_conflict(tmp_path: Path) -> None:
    args = TrainingArguments(**settings(tmp_path), use_liger=True, liger_config={"rope": False})
    Trainer(tiny_llama(), args, callbacks=[LigerCallback({"rope": False})])
    with pytest.raises(ValueError, match=r"given twice.*'mlp': False.*'rope': False"):
        Trainer(tiny_llama(), args, callbacks=[LigerCallback({"mlp": False})])


def test_a_bad_config_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(TypeError, match="'ropes'"):
        LigerCallback(liger_config={"ropes": True})


def test_removing_the_callback(tmp_path: Path) -> None:
    args = TrainingArguments(**settings(tmp_path), use_liger=True)
    mine = LigerCallback()
    trainer = Trainer(model_init=lambda: tiny_llama(), args=args, train_dataset=sequences(), callbacks=[mine])
    assert trainer.pop_callback(LigerCallback) is mine
    trainer.remove_callback(LigerCallback)
    trainer.train()
    assert is_patched(trainer.model)  # the arguments still say so


def test_a_callback_added_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for patched_before in (False, True):
        model = tiny_llama()
        if patched_before:
            apply_liger_kernel(model)
        trainer = Trainer(model, transformers.TrainingArguments(**settings(tmp_path)), train_dataset=sequences())
        trainer.add_callback(LigerCallback)
        trainer.train()
        assert is_patched(trainer.model)
        assert lines(caplog).pop().startswith("liger_trainer replaced")


def test_a_fresh_model_is_reported_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args = TrainingArguments(**settings(tmp_path), use_liger=True)
    trainer = Trainer(model_init=lambda: tiny_llama(), args=args, train_dataset=sequences())
    monkeypatch.setenv("LIGER_TRAINER_DISABLE", "1")
    trainer.train()
    assert not is_patched(trainer.model)
    (line,) = lines(caplog)
    assert "switched off by LIGER_TRAINER_DISABLE=1" in line


@pytest.mark.parametrize("by", ["arguments", "callback"])
def test_model_init_keeps_the_patch(tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture) -> None:
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(tiny_llama())
        return made[-1]

    witness = Witness()
    args = TrainingArguments(**settings(tmp_path), use_liger=by == "arguments")
    callbacks = [witness] if by == "arguments" else [witness, LigerCallback()]
    trainer = Trainer(
        model_init=model_init, args=args, train_dataset=sequences(), eval_dataset=sequences(4), callbacks=callbacks
    )
    assert is_patched(trainer.model)
    for _ in range(2):  # every trial of a hyperparameter search is such a call
        trainer.train()
        trainer.evaluate()
        assert is_patched(trainer.model)
    assert witness.seen == [True] * 4
    assert witness.models[0] is made[1] and witness.models[2] is made[2]
    assert len(lines(caplog)) == 2


def test_evaluation_and_prediction_without_training(tmp_path: Path) -> None:
    data = sequences(6)
    plain = Trainer(tiny_llama(), transformers.TrainingArguments(**settings(tmp_path)), eval_dataset=data)
    for trainer in (
        Trainer(tiny_llama(), TrainingArguments(**settings(tmp_path), use_liger=True), eval_dataset=data),
        Trainer(
            model_init=lambda: tiny_llama(),
            args=TrainingArguments(**settings(tmp_path), use_liger=True),
            eval_dataset=data,
        ),
        Trainer(
            tiny_llama(),
            transformers.TrainingArguments(**settings(tmp_path)),
            eval_dataset=data,
            callbacks=[LigerCallback()],
        ),
    ):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
        predictions = trainer.predict(data).predictions
        assert is_patched(trainer.model)
        assert predictions.shape == (6, 13, VOCAB)
        torch.testing.assert_close(
            torch.from_numpy(predictions), torch.from_numpy(plain.predict(data).predictions), atol=1e-5, rtol=1e-5
        )


def test_the_environment_switches_everything_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LIGER_TRAINER_DISABLE", "1")
    witness = Witness()
    args = TrainingArguments(**settings(tmp_path), use_liger=True)
    trainer = Trainer(tiny_llama(), args, train_dataset=sequences(), callbacks=[LigerCallback(), witness])
    trainer.train()
    assert witness.seen == [False, False]
    assert lines(caplog) == ["liger_trainer is switched off by LIGER_TRAINER_DISABLE=1: the model is left as it is"]


@pytest.mark.parametrize(
    ("value", "off"),
    [(yes, True) for yes in ("1", "true", "YES", "on")] + [(no, False) for no in ("0", "false", "No", "off", "")],
)
def test_the_environment_says_yes_or_no(value: str, off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_TRAINER_DISABLE", value)
    assert disabled() is off


def test_the_environment_is_read_when_patching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TrainingArguments(**settings(tmp_path), use_liger=True)
    model = Trainer(tiny_llama(), args).model
    monkeypatch.setenv("LIGER_TRAINER_DISABLE", "1")
    assert not is_patched(Trainer(model, args).model)  # and a patch from before comes off
    monkeypatch.setenv("LIGER_TRAINER_DISABLE", "perhaps")
    with pytest.raises(ValueError, match="LIGER_TRAINER_DISABLE='perhaps'"):
        Trainer(model, args)


def test_only_the_main_process_speaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args, model = TrainingArguments(**settings(tmp_path), use_liger=True), tiny_llama()
    for main in (False, True):
        state = TrainerState(is_world_process_zero=main)
        callback = ArgumentsCallback()
        callback.on_init_end(args, state, TrainerControl(), model=model)
        callback.on_train_begin(args, state, TrainerControl(), model=model)
        assert len(lines(caplog)) == int(main)


def test_the_line_is_seen_by_default_and_can_be_silenced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # an application that has not set logging up
    args = TrainingArguments(**settings(tmp_path), use_liger=True)
    trainer = Trainer(tiny_llama(), args, train_dataset=sequences())
    trainer.train()
    assert capsys.readouterr().err.count("liger_trainer replaced") == 1
    monkeypatch.setattr(logging.getLogger("liger_trainer"), "level", logging.WARNING)
    logging.getLogger("liger_trainer").manager._clear_cache()
    trainer.train()
    assert "liger_trainer replaced" not in capsys.readouterr().err


def test_not_together_with_transformers_own_option(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(**settings(tmp_path), use_liger_kernel=True)
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        Trainer(tiny_llama(), args, callbacks=[LigerCallback()])


def test_a_model_without_a_recognisable_part(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    with pytest.raises(ValueError, match="Plain"):
        Trainer(Plain(), TrainingArguments(**settings(tmp_path), use_liger=True))
    with pytest.raises(ValueError, match="Plain"):
        Trainer(Plain(), transformers.TrainingArguments(**settings(tmp_path)), callbacks=[LigerCallback()])


def test_a_fresh_model_that_was_sharded_already_is_patched(tmp_path: Path) -> None:
    """tests/distributed trains such models."""
    args, state, control = TrainingArguments(**settings(tmp_path), use_liger=True), TrainerState(), TrainerControl()
    model = tiny_llama()
    next(model.parameters()).ds_id = 0  # what DeepSpeed's ZeRO-3 leaves on a parameter
    ArgumentsCallback().on_train_begin(args, state, control, model=model)
    assert is_patched(model)


def test_revert_after_training_gives_the_stock_model(tmp_path: Path) -> None:
    args = TrainingArguments(**settings(tmp_path), use_liger=True)
    trainer = Trainer(tiny_llama(), args, train_dataset=sequences())
    trainer.train()
    revert(trainer.model)
    assert not is_patched(trainer.model)
    assert [type(each) for each in trainer.model.modules()] == [type(each) for each in tiny_llama().modules()]


def test_sft_trainer_with_the_mixin(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{index}": index for index in range(VOCAB - 2)} | {"<pad>": VOCAB - 2, "<eos>": VOCAB - 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

    @dataclass
    class LigerSFTConfig(LigerArguments, trl.SFTConfig):
        pass

    data = Dataset.from_list(
        [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences()]
    )
    curves = []
    for use_liger in (False, True):
        args = LigerSFTConfig(**settings(tmp_path, max_steps=3, logging_steps=1, bf16=False), use_liger=use_liger)
        trainer = trl.SFTTrainer(tiny_llama(), args, train_dataset=data, processing_class=copy.deepcopy(tokenizer))
        assert is_patched(trainer.model) is use_liger
        trainer.train()
        curves.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
