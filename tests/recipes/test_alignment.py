"""The recipes on TRL's trainers: the scripts over a tiny random Llama, and the data that they make."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_chat import HIDDEN, VOCAB
from transformers import AutoModelForCausalLM
from wide_tensors import wide_tensors

import grpo
from support import alignment, preferences
from support.chats import load_chats
from support.students import fewer_layers

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("dpo", "orpo", "simpo", "kto", "distill", "cpo", "grpo")
TRAIN = "recipes/data/dialogues-train.jsonl"
TILE_ROWS = 16
TILE_BYTES = TILE_ROWS * VOCAB * 4


@pytest.fixture
def command_line(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a recipe's own config, cut down to two steps of the tiny model, and gives back the line that uses it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def line(recipe: str, **changes: Any) -> list[str]:
        config = yaml.safe_load((ROOT / f"configs/{recipe}_smollm2.yaml").read_text()) | {
            "output_dir": str(tmp_path / recipe),
            "max_steps": 2,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "heldout_examples": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "liger_config": {"tile_bytes": TILE_BYTES},
            "logits_cache_bytes": TILE_BYTES,
            "use_cpu": True,
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
        }
        model = "teacher_model_name_or_path" if recipe == "distill" else "model_name_or_path"
        config[model] = str(tiny_llama)
        if recipe == "distill":
            config["student_layers"] = 1
        if recipe == "grpo":  # 4 answers to one question a step; sampling has a row of logits for each
            config |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
        file = tmp_path / f"{recipe}.yaml"
        file.write_text(yaml.safe_dump(config | changes))
        return ["--config", str(file)]

    return line


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_without_logits_and_shows_held_out_figures(
    recipe: str,
    command_line: Any,
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keywords(completions: Any, **_: Any) -> list[float]:  # a random model says none, and rewards must differ
        return [float(len(completion[-1]["content"])) for completion in completions]

    monkeypatch.setattr(grpo, "keywords", keywords)
    threads = torch.get_num_threads()
    try:
        with wide_tensors(VOCAB, rows=TILE_ROWS, hidden_size=HIDDEN) as found:
            trainer = importlib.import_module(recipe).main(command_line(recipe))
    finally:
        torch.set_num_threads(threads)
    assert trainer.uses_liger_loss
    assert found == []
    assert trainer.state.global_step == 2

    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 2]
    figure = "eval_reward" if recipe == "grpo" else "eval_loss"
    assert evaluated[0][figure] != evaluated[1][figure]
    shown = capsys.readouterr().out
    assert all(f"{entry[figure]:.4f}" in shown for entry in evaluated)
    expected = {"distill": "loss", "grpo": "rewards/keywords/mean"}.get(recipe, "rewards/margins")
    assert expected in shown

    saved = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert saved.config.num_hidden_layers == (1 if recipe == "distill" else 2)
    start = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not torch.equal(saved.get_output_embeddings().weight, start.get_output_embeddings().weight)


def test_without_liger_the_same_recipe_is_trls_and_agrees(command_line: Any) -> None:
    recipe = importlib.import_module("orpo")
    ours, stock = (recipe.main(command_line("orpo", use_liger=liger, learning_rate=1e-3)) for liger in (True, False))
    assert ours.uses_liger_loss and not stock.uses_liger_loss
    for a, b in zip(ours.state.log_history, stock.state.log_history, strict=True):
        for name in ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)


def test_a_recipe_trains_adapters(command_line: Any, tmp_path: Path) -> None:
    trainer = importlib.import_module("dpo").main(command_line("dpo", use_peft=True, lora_r=2))
    assert trainer.uses_liger_loss
    assert (tmp_path / "dpo" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("size", ["smollm2", "llama3_8b"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_in_the_configs_is_known(recipe: str, size: str, tmp_path: Path) -> None:
    module = importlib.import_module(recipe)
    types = [alignment.DataOptions, alignment.ModelConfig]
    types += [module.StudentOptions] if recipe == "distill" else []
    types += [next(value for name, value in vars(module).items() if name.startswith("Liger") and "Config" in name)]
    overrides = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    *_, args = alignment.read_options(types, ROOT / f"configs/{recipe}_{size}.yaml", overrides)
    assert args.use_liger and args.eval_on_start and args.output_dir == str(tmp_path)
    assert f"configs/{recipe}_llama3_8b.yaml" in module.__doc__


def test_an_unknown_option_is_an_error(command_line: Any) -> None:
    with pytest.raises(ValueError, match="learing_rate"):
        importlib.import_module("dpo").main(command_line("dpo", learing_rate=1e-3))


# --- data ------------------------------------------------------------------------------------------------------------


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("source", [TRAIN, "recipes/data/dialogues-heldout.jsonl"])
def test_pairs_prefer_the_reply_that_was_given(source: str) -> None:
    chats = load_chats(source, ROOT)
    pairs = preferences.load_pairs(source, ROOT, seed=3)
    assert len(pairs) == len(chats)
    answers: dict[str, set[str]] = {}
    topics: dict[str, set[str]] = {}
    questions: dict[str, set[str]] = {}
    for chat in chats:
        question, answer = (message["content"] for message in chat["messages"][-2:])
        answers.setdefault(question.strip().lower(), set()).add(answer)
        topics.setdefault(answer, set()).add(chat["topic"])
        questions.setdefault(chat["topic"], set()).add(question.strip().lower())
    for chat, pair in zip(chats, pairs, strict=True):
        assert pair["prompt"] + pair["chosen"] == chat["messages"]
        (rejected,) = pair["rejected"]
        assert rejected["role"] == "assistant"
        assert rejected["content"] not in answers[pair["prompt"][-1]["content"].strip().lower()]
        if len(questions[chat["topic"]]) > 5:  # few answers of a small topic may all fit the question
            assert chat["topic"] in topics[rejected["content"]]


def test_pairs_depend_on_the_seed_alone() -> None:
    first, again, other = (preferences.load_pairs(TRAIN, ROOT, seed)["rejected"] for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_the_rejected_replies_are_spread_over_the_dialogues() -> None:
    rejected = Counter(pair["rejected"][0]["content"] for pair in preferences.load_pairs(TRAIN, ROOT, seed=0))
    replies = Counter(chat["messages"][-1]["content"] for chat in load_chats(TRAIN, ROOT))
    assert len(rejected) > len(replies) / 2
    assert max(rejected[reply] / replies[reply] for reply in rejected) < 12


def test_pairs_look_to_other_topics_where_a_topic_has_no_other_question() -> None:
    chats = [exchange("Red?", "Yes."), exchange("red? ", "No."), exchange("Blue?", "Yes."), exchange("Old?", "Very.")]
    data = Dataset.from_dict({"messages": chats, "topic": ["a", "a", "b", "b"]})
    rejected = [pair["rejected"][0]["content"] for pair in preferences.preference_pairs(data, seed=0)]
    assert rejected == ["Very.", "Very.", "Very.", "Yes."]


@pytest.mark.parametrize(
    ("chats", "message"),
    [
        ([exchange("Red?", "Yes."), exchange("Red?", "No.")], "no other dialogue"),
        ([exchange("Red?", "Yes."), exchange("Red?", "No.")[:1]], "must end with a user's message"),
    ],
    ids=["one-question", "no-answer"],
)
def test_chats_that_make_no_pairs_are_refused(chats: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preferences.preference_pairs(Dataset.from_dict({"messages": chats}), seed=0)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_preferences_that_someone_judged_are_taken_as_they_are(tmp_path: Path) -> None:
    row = {"chosen": exchange("Red?", "Yes."), "rejected": exchange("Red?", "No."), "score": 3}
    (pair,) = preferences.load_pairs(write(tmp_path / "a.jsonl", [row]), ROOT, seed=0)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
        row["chosen"][:1],
        row["chosen"][1:],
        row["rejected"][1:],
    )
    labelled = [{"prompt": "Red?", "completion": "Yes.", "label": True}]
    assert list(preferences.load_labelled_answers(write(tmp_path / "b.jsonl", labelled), ROOT, seed=0)) == labelled
    with pytest.raises(ValueError, match="must have columns `chosen` and `rejected`, or `messages`; it has text"):
        preferences.load_pairs(write(tmp_path / "c.jsonl", [{"text": "Red."}]), ROOT, seed=0)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        preferences.load_pairs(str(tmp_path / "none.jsonl"), ROOT, seed=0)


def test_answers_are_labelled_by_the_pairs_and_mixed() -> None:
    pairs = preferences.load_pairs(TRAIN, ROOT, seed=5)
    rows = preferences.load_labelled_answers(TRAIN, ROOT, seed=5)

    def key(prompt: Any, answer: Any, label: bool) -> str:
        return json.dumps([prompt, answer, label])

    expected = Counter(key(p["prompt"], p[name], name == "chosen") for p in pairs for name in ("chosen", "rejected"))
    assert Counter(key(row["prompt"], row["completion"], row["label"]) for row in rows) == expected
    for start in range(0, 400, 100):  # KTO reads them in this order
        assert 20 < sum(rows["label"][start : start + 100]) < 80


def test_questions_keep_their_answers_for_the_reward() -> None:
    chats = load_chats(TRAIN, ROOT)
    for chat, row in zip(chats, preferences.questions_with_answers(chats), strict=True):
        assert row["prompt"] == chat["messages"][:-1]
        assert row["reference"] == chat["messages"][-1]["content"]


def test_held_out_rows_are_a_draw_by_the_seed() -> None:
    rows = Dataset.from_dict({"x": list(range(30))})
    assert preferences.at_most(rows, None, 0) is rows
    assert sorted(preferences.at_most(rows, 99, 0)["x"]) == list(range(30))
    some = preferences.at_most(rows, 8, 0)["x"]
    assert len(set(some)) == 8 and list(some) == list(preferences.at_most(rows, 8, 0)["x"]) != list(range(8))


def test_rewards_of_grpo() -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("PARIS, in France.", "It is far.", "", "la " * 20)]
    references = ["Paris is the capital of France.", "It is not.", "Paris", "Paris"]
    assert grpo.keywords(said, references) == pytest.approx([2 / 3, 0.0, 0.0, 0.0])
    assert grpo.brevity(said) == pytest.approx([1.0, 1.0, 0.0, 0.5])
    assert grpo.brevity([[{"role": "assistant", "content": "la " * 40}]]) == [0.0]


# --- students --------------------------------------------------------------------------------------------------------


def test_a_student_has_the_teachers_layers_in_order(tiny_llama: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_llama).config
    config.num_hidden_layers, config.layer_types = 5, None
    teacher = AutoModelForCausalLM.from_config(config)
    student = fewer_layers(teacher, 3)
    assert student.config.num_hidden_layers == 3 and teacher.config.num_hidden_layers == 5
    ids = torch.tensor([[5, 7, 11, 13]])
    for index in (1, 3):  # a teacher whose other layers add nothing says the same
        torch.nn.init.zeros_(teacher.model.layers[index].self_attn.o_proj.weight)
        torch.nn.init.zeros_(teacher.model.layers[index].mlp.down_proj.weight)
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits)
    whole = fewer_layers(teacher, 5)
    torch.testing.assert_close(whole(ids).logits, teacher(ids).logits)
    assert whole.model.layers[0].self_attn.q_proj.weight is not teacher.model.layers[0].self_attn.q_proj.weight
    for count in (0, 6):
        with pytest.raises(ValueError, match="count must be between 1 and the teacher's 5 layers"):
            fewer_layers(teacher, count)
    teacher.config.num_hidden_layers = 6
    with pytest.raises(ValueError, match="no weights named"):
        fewer_layers(teacher, 3)
