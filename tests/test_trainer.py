from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_models import HIDDEN, VOCAB, logits_rows, sequences, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, EvalPrediction, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from liger_trainer import LigerCallback, LigerTrainer, TrainingArguments, apply_liger_kernel, is_patched

ROW_BYTES = VOCAB * 4
TILE = {"tile_bytes": 8 * ROW_BYTES}  # eight rows of fp32 logits: several tiles in every step


def arguments(path: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(path),
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        | more
    )


def curve(trainer: Trainer, key: str = "loss") -> list[float]:
    return [each[key] for each in trainer.state.log_history if key in each]


def trained(cls: type[Trainer], path: Path, *, model: nn.Module | None = None, **more: Any) -> Trainer:
    trainer = cls(model or tiny_llama(), arguments(path, **more), train_dataset=sequences(32))
    trainer.train()
    return trainer


def assert_same_course(trainer: Trainer, reference: Trainer, steps: int = 4) -> None:
    assert len(curve(reference)) == steps
    assert curve(trainer) == pytest.approx(curve(reference), rel=1e-5)
    assert curve(trainer, "grad_norm") == pytest.approx(curve(reference, "grad_norm"), rel=1e-4)


@pytest.fixture(autouse=True)
def _enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGER_TRAINER_DISABLE", raising=False)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trained(Trainer, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("cls", [Trainer, LigerTrainer])
def test_the_course_of_training_is_the_same(cls: type[Trainer], tmp_path: Path, stock: Trainer) -> None:
    trainer = trained(cls, tmp_path, use_liger=True, liger_config=TILE)
    assert is_patched(trainer.model)
    assert_same_course(trainer, stock)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_adapter_on_the_head(smoothing: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        model = tiny_llama()
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.2, init_lora_weights=False)
        return peft.get_peft_model(model, config)

    options: dict[str, Any] = {"label_smoothing_factor": smoothing, "label_names": ["labels"]}
    reference = trained(Trainer, tmp_path, model=adapted(), **options)
    with logits_rows() as met:
        trainer = trained(LigerTrainer, tmp_path, model=adapted(), use_liger=True, liger_config=TILE, **options)
    assert met.rows <= 8
    assert_same_course(trainer, reference)


def test_use_liger_decides_where_there_is_the_field(tmp_path: Path) -> None:
    assert not is_patched(LigerTrainer(tiny_llama(), arguments(tmp_path)).model)
    assert is_patched(LigerTrainer(tiny_llama(), arguments(tmp_path, use_liger=True)).model)


def test_arguments_without_the_field(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    assert is_patched(LigerTrainer(tiny_llama(), args).model)
    callback = LigerCallback({"mlp": False})
    trainer = LigerTrainer(tiny_llama(), args, callbacks=[callback])
    assert [each for each in trainer.callback_handler.callbacks if isinstance(each, LigerCallback)] == [callback]
    assert callback.report is not None and "mlp" not in callback.report.counts()


def test_model_init_is_patched_before_it_is_wrapped(tmp_path: Path) -> None:
    patched_when_prepared: list[bool] = []

    class Trainer_(LigerTrainer):
        def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            patched_when_prepared.append(is_patched(model))
            return super()._wrap_model(model, *args, **kwargs)

    stock = Trainer(model_init=lambda: tiny_llama(), args=arguments(tmp_path), train_dataset=sequences(32))
    stock.train()
    args = arguments(tmp_path, use_liger=True, liger_config=TILE)
    trainer = Trainer_(model_init=lambda: tiny_llama(), args=args, train_dataset=sequences(32))
    assert is_patched(trainer.model)
    trainer.train()
    assert patched_when_prepared == [True]
    assert_same_course(trainer, stock)


def test_the_signature_still_selects_columns_and_loss_arguments(tmp_path: Path) -> None:
    data = [{**each, "comment": torch.zeros(1)} for each in sequences(8)]
    model = tiny_llama()
    apply_liger_kernel(model)
    trainer = LigerTrainer(model, arguments(tmp_path, use_liger=True), train_dataset=data)
    assert trainer.model_accepts_loss_kwargs
    assert trainer.label_names == ["labels"]
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)
    assert "comment" not in trainer._signature_columns
    trainer.train()


# ---- evaluation ----


def evaluator(cls: type[Trainer], path: Path, *, use_liger: bool, more: dict[str, Any] | None = None, **kwargs: Any):
    args = arguments(path, use_liger=use_liger, liger_config=TILE, **(more or {}))
    return cls(tiny_llama(), args, eval_dataset=sequences(10), **kwargs)


@pytest.mark.parametrize("cls", [Trainer, LigerTrainer])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_for_the_loss_alone_builds_no_logits(cls: type[Trainer], smoothing: float, tmp_path: Path) -> None:
    if smoothing and cls is Trainer:
        pytest.skip("the stock Trainer smooths on logits")
    more = {"label_smoothing_factor": smoothing}
    plain = evaluator(Trainer, tmp_path, use_liger=False, more=more)
    trainer = evaluator(cls, tmp_path, use_liger=True, more=more)
    with logits_rows() as watch:
        loss = trainer.evaluate()["eval_loss"]
    assert watch.rows <= HIDDEN
    with logits_rows() as watch:
        assert loss == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert watch.rows >= 4 * 12 > HIDDEN  # logits are seen where there are any
    trainer.args.prediction_loss_only = True
    trainer.compute_metrics = lambda prediction: {}
    with logits_rows() as watch:
        trainer.evaluate()
    assert watch.rows <= HIDDEN


@pytest.mark.parametrize("cls", [Trainer, LigerTrainer])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compute_metrics_gets_the_real_predictions(cls: type[Trainer], smoothing: float, tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits[prediction.label_ids[:, 1:] != -100].mean())}

    more = {"label_smoothing_factor": smoothing}
    metrics = [
        evaluator(kind, tmp_path, use_liger=liger, compute_metrics=compute_metrics, more=more).evaluate()
        for kind, liger in ((Trainer, False), (cls, True))
    ]
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-5)
    assert metrics[1]["eval_accuracy"] == metrics[0]["eval_accuracy"]
    assert type(seen[1].predictions) is np.ndarray and seen[1].predictions.shape == (10, 13, VOCAB)
    np.testing.assert_allclose(seen[1].predictions, seen[0].predictions, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(seen[1].label_ids, seen[0].label_ids)


@pytest.mark.parametrize("cls", [Trainer, LigerTrainer])
def test_preprocess_logits_for_metrics(cls: type[Trainer], tmp_path: Path) -> None:
    def argmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert isinstance(logits, torch.Tensor) and logits.shape == (*labels.shape, VOCAB)
        return logits.argmax(-1)

    predictions = [
        evaluator(kind, tmp_path, use_liger=liger, preprocess_logits_for_metrics=argmax)
        .predict(sequences(10))
        .predictions
        for kind, liger in ((Trainer, False), (cls, True))
    ]
    np.testing.assert_array_equal(*predictions)


def test_prediction_without_labels(tmp_path: Path) -> None:
    data = [{key: value for key, value in each.items() if key != "labels"} for each in sequences(6)]
    plain, liger = (
        evaluator(kind, tmp_path, use_liger=on).predict(data).predictions
        for kind, on in ((Trainer, False), (LigerTrainer, True))
    )
    np.testing.assert_allclose(liger, plain, atol=1e-5, rtol=1e-5)


# ---- label smoothing ----


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("cls", [Trainer, LigerTrainer])
def test_label_smoothing_follows_the_stock_trainer(cls: type[Trainer], accumulate: int, tmp_path: Path) -> None:
    more = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": accumulate}
    plain = trained(Trainer, tmp_path, **more)
    liger = trained(cls, tmp_path, use_liger=True, liger_config=TILE, **more)
    assert_same_course(liger, plain)
    assert liger.label_smoother is not None


@pytest.mark.parametrize("cls", [Trainer, LigerTrainer])
def test_label_smoothing_without_logits(cls: type[Trainer], tmp_path: Path) -> None:
    more = {"label_smoothing_factor": 0.1, "max_steps": 1, "gradient_accumulation_steps": 1}
    with logits_rows() as watch:
        trained(cls, tmp_path, use_liger=True, liger_config=TILE, **more)
    assert (watch.rows <= HIDDEN) is (cls is LigerTrainer)


def test_label_smoothing_of_an_adapted_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        model.enable_input_require_grads()
        return model

    more = {
        "label_smoothing_factor": 0.1,
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
    }
    plain = trained(Trainer, tmp_path, model=adapted(), **more)
    with logits_rows() as watch:
        liger = trained(LigerTrainer, tmp_path, model=adapted(), use_liger=True, liger_config=TILE, **more)
    assert_same_course(liger, plain, steps=2)
    assert watch.rows <= HIDDEN


def test_label_smoothing_without_a_fused_head(tmp_path: Path) -> None:
    plain = trained(Trainer, tmp_path, label_smoothing_factor=0.1)
    config = {"fused_linear_cross_entropy": False}
    assert_same_course(
        trained(LigerTrainer, tmp_path, label_smoothing_factor=0.1, use_liger=True, liger_config=config), plain
    )
    assert_same_course(trained(LigerTrainer, tmp_path, label_smoothing_factor=0.1, use_liger=False), plain)


def one_loss(cls: type[Trainer], path: Path, batch: dict[str, torch.Tensor], use_liger: bool, **kwargs: Any) -> float:
    args = arguments(path, use_liger=use_liger, liger_config=TILE, label_smoothing_factor=0.2)
    trainer = cls(kwargs.pop("model", None) or tiny_llama(), args, **kwargs)
    return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(17)).item()


def batch_of(data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([each[key] for each in data]) for key in data[0]}


def test_label_smoothing_where_the_stock_path_must_serve(tmp_path: Path) -> None:
    batch = batch_of(sequences(4))
    shifted = batch | {"shift_labels": torch.roll(batch["labels"], -3, dims=1)}  # not what LabelSmoother would shift to
    assert one_loss(LigerTrainer, tmp_path, shifted, True) == pytest.approx(
        one_loss(Trainer, tmp_path, shifted, False), rel=1e-5
    )

    def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        return LabelSmoother(0.5)(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)

    assert one_loss(LigerTrainer, tmp_path, batch, True, compute_loss_func=own_loss) == pytest.approx(
        one_loss(Trainer, tmp_path, batch, False, compute_loss_func=own_loss), rel=1e-5
    )

    def mixture() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
        return transformers.MixtralForCausalLM(config)

    assert one_loss(LigerTrainer, tmp_path, batch, True, model=mixture()) == pytest.approx(
        one_loss(Trainer, tmp_path, batch, False, model=mixture()), rel=1e-5
    )


# ---- saving, resuming, batch size ----


def test_saved_files_and_resuming_are_those_of_the_stock_trainer(tmp_path: Path) -> None:
    checkpoints = {}
    for name, cls, more in (
        ("stock", Trainer, {}),
        ("liger", LigerTrainer, {"use_liger": True, "liger_config": TILE}),
    ):
        path = tmp_path / name
        trainer = trained(cls, path, save_strategy="steps", save_steps=2, **more)
        checkpoints[name] = path / "checkpoint-4"
        resumed = cls(tiny_llama(seed=5), arguments(path, **more), train_dataset=sequences(32))
        resumed.train(resume_from_checkpoint=str(path / "checkpoint-2"))
        assert is_patched(resumed.model) is (name == "liger")
        assert curve(resumed)[-2:] == pytest.approx(curve(trainer)[-2:], rel=1e-6)

    configs = [json.loads((each / "config.json").read_text()) for each in checkpoints.values()]
    assert configs[0] == configs[1]
    assert configs[1]["architectures"] == ["LlamaForCausalLM"]
    with (
        safe_open(checkpoints["stock"] / "model.safetensors", "pt") as stock,
        safe_open(checkpoints["liger"] / "model.safetensors", "pt") as liger,
    ):
        assert sorted(stock.keys()) == sorted(liger.keys())
        for key in stock.keys():  # noqa: SIM118  a safe_open is no mapping
            torch.testing.assert_close(liger.get_tensor(key), stock.get_tensor(key), atol=2e-4, rtol=2e-4)

    reloaded = AutoModelForCausalLM.from_pretrained(checkpoints["liger"])
    assert not is_patched(reloaded)
    assert [type(each) for each in reloaded.modules()] == [type(each) for each in tiny_llama().modules()]
    ids = sequences(2)[1]["input_ids"][None]
    torch.testing.assert_close(reloaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)

    saved_args = torch.load(checkpoints["liger"] / "training_args.bin", weights_only=False)
    assert (saved_args.use_liger, saved_args.liger_config) == (True, TILE)


def test_auto_find_batch_size(tmp_path: Path) -> None:
    def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if len(features) > 2:
            raise RuntimeError("CUDA out of memory.")
        return batch_of(features)

    args = arguments(tmp_path, use_liger=True, auto_find_batch_size=True, gradient_accumulation_steps=1, max_steps=2)
    trainer = LigerTrainer(tiny_llama(), args, train_dataset=sequences(32), data_collator=collate)
    trainer.train()
    assert trainer._train_batch_size <= 2
    assert is_patched(trainer.model) and len(curve(trainer)) == 2


def test_evaluation_and_best_model_during_training(tmp_path: Path) -> None:
    losses = []
    for cls, use_liger in ((Trainer, False), (LigerTrainer, True)):
        args = arguments(
            tmp_path / str(use_liger),
            use_liger=use_liger,
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )
        trainer = cls(tiny_llama(), args, train_dataset=sequences(32), eval_dataset=sequences(6, seed=2))
        trainer.train()
        assert is_patched(trainer.model) is use_liger
        losses.append([*curve(trainer, "eval_loss"), trainer.evaluate()["eval_loss"]])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
