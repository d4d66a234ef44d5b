"""A share of the census, another one each week; ``python -m tests.census`` runs it all."""

from __future__ import annotations

import datetime
import re

import pytest
import torch
from wide_tensors import wide_tensors

from liger_trainer import apply_liger_kernel, kernels
from tests.census.__main__ import PAGE
from tests.census.configs import HIDDEN, VOCAB
from tests.census.examine import TASKS, Result, _batches, build, error, examine, model_types
from tests.census.table import COLUMNS, LIGER_KERNEL, markdown, shortfalls, summary

# What users train most, and one of each way in which models differ.
ALWAYS = {
    "causal": [
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "glm4",
        "mixtral", "gpt_oss", "llama4_text", "deepseek_v2", "deepseek_v3", "cohere2", "bamba", "gpt2", "xlm",
        "prophetnet",
    ],
    "vision": [
        "llama4", "gemma3", "gemma4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "llava",
        "idefics3", "mllama", "kosmos-2.5", "nemotron_h_omni", "chameleon", "idefics",
    ],
}  # fmt: skip
ROTATING = {"causal": 40, "vision": 12}

# Types whose untouched model does not run in a release of transformers, with a piece of its error.
BROKEN = {"llama4": "no attribute 'image_outputs'"}  # 5.24
# The types that do not pass, with a piece of the reason that the census gives; releases of transformers differ.
KNOWN = {
    ("causal", "gemma3n"): "timm",
    ("causal", "gemma4_assistant"): "hidden_size_per_layer_input",
    ("causal", "gemma4_unified_assistant"): "layer types producing a cache|shared_kv_states",  # since transformers 5.24
    ("causal", "musicgen"): "the fused head did not run",
    ("causal", "musicgen_melody"): "the fused head did not run",
}


def share() -> list[tuple[str, str]]:
    week = datetime.date.today().isocalendar()[1]
    chosen = []
    for task, always in ALWAYS.items():
        types = model_types(task)
        others = [name for name in types if name not in always and (task, name) not in KNOWN]
        start = week * ROTATING[task] % len(others)
        rotating = [*others, *others][start : start + ROTATING[task]]
        chosen += [(task, name) for name in dict.fromkeys([*always, *rotating]) if name in types]
    return chosen


@pytest.mark.parametrize(("task", "model_type"), share())
def test_share(task, model_type):
    result = examine(task, model_type)
    broken = model_type in BROKEN and BROKEN[model_type] in result.reason
    if result.outcome == "not built" and (broken or model_type not in ALWAYS[task]):
        pytest.skip(result.reason)
    assert result.outcome == "passed", f"{result.reason}; {result.errors}"


# Models that do more to their logits, on the way to the loss, than cast, scale, cap and cut them; most of those from
# sequence to sequence add a buffer.
CHANGING = [("vision", "chameleon"), ("vision", "idefics"), ("causal", "prophetnet"), ("causal", "dory")]
SEQUENCE_TO_SEQUENCE = ["bart", "blenderbot", "led", "marian", "mbart", "mt5", "pegasus", "plbart", "prophetnet"]


@pytest.mark.parametrize(("task", "model_type"), [*CHANGING, *(("sequence", name) for name in SEQUENCE_TO_SEQUENCE)])
def test_models_that_change_their_logits_build_none(task, model_type, monkeypatch):
    mapping = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
    monkeypatch.setitem(TASKS, "sequence", (mapping, "AutoModelForSeq2SeqLM"))
    if model_type not in model_types(task):
        pytest.skip(f"this transformers has no {model_type}")
    if task == "sequence":
        result = examine(task, model_type)
        assert result.outcome == "passed", f"{result.reason}; {result.errors}"
    model = build(task, model_type)
    batches = _batches(model, Result(task, model_type))
    inputs, rows = batches.get("text") or batches["images"], 5

    def wide():
        with wide_tensors(VOCAB, rows=rows, hidden_size=HIDDEN) as found:
            model(**inputs).loss.backward()
        return found

    assert wide()
    apply_liger_kernel(model, tile_bytes=rows * VOCAB * 4)
    assert not wide()


@pytest.mark.parametrize(("known", "reason"), KNOWN.items(), ids=str)
def test_what_does_not_pass_is_right_all_the_same(known, reason):
    result = examine(*known)
    assert result.outcome in ("not built", "not replaced")
    assert any(piece in result.reason for piece in reason.split("|"))


def test_what_liger_kernel_patches_is_known_to_transformers():
    known = {name for task in TASKS for name in model_types(task)}
    assert set(LIGER_KERNEL.values()) <= known


class TestTheCensusItself:
    """A census that finds nothing is worth as much as what it would find."""

    @pytest.mark.parametrize(
        ("kernel", "wrong"),
        [
            ("rms_norm", lambda x, weight, eps, **options: (x - x.mean(-1, keepdim=True)) * weight),
            ("swiglu", lambda gate, up: torch.sigmoid(gate) * up),
            ("rotary", lambda q, k, cos, sin, **options: (q * 1.001, k)),
        ],
    )
    def test_a_kernel_that_went_wrong_after_its_check_is_found(self, monkeypatch, kernel, wrong):
        def apply_and_break(model):
            report = apply_liger_kernel(model)
            monkeypatch.setattr(kernels, kernel, wrong)
            return report

        monkeypatch.setattr("tests.census.examine.apply_liger_kernel", apply_and_break)
        result = examine("causal", "llama")
        assert result.outcome == "wrong"
        assert "differs by" in result.reason

    def test_a_tiny_difference_is_found(self):
        model = build("causal", "llama")
        exact = {name: p.detach().clone() for name, p in model.named_parameters()} | {"loss": torch.tensor(1.0)}
        off = {**exact, "model.norm.weight": exact["model.norm.weight"] * (1 + 3e-5)}
        assert error(exact, exact) == 0
        assert error(off, exact) > 1e-5
        assert error({**exact, "loss": torch.tensor(float("nan"))}, exact) == float("inf")
        assert error({"loss": exact["loss"]}, exact) == float("inf")

    def test_what_all_types_must_give(self):
        """Of the page that the last census wrote, and of one that found less."""
        page = PAGE.read_text(encoding="utf-8")
        counts = re.search(r"Replaced were (.*)\.\n", page)[1]
        found = {"outcomes": {}, "classes": {}, "types": {}}
        for kind, column in COLUMNS.items():
            match = re.search(rf"(?:^|, ){re.escape(column)} in (\d+) classes \((\d+) types\)", counts)
            if match:
                found["classes"][kind], found["types"][kind] = map(int, match.groups())
        for task, words in (("causal", "causal language"), ("vision", "vision-language")):
            passed, _, wrong, _ = re.search(rf"\| {words} models \|(.*)\|\n", page)[1].split("|")
            found["outcomes"][task] = {"passed": int(passed), "wrong": int(wrong)}
        assert shortfalls(found) == []
        found["classes"]["mlp"], found["types"]["rope"] = 74, 99
        found["outcomes"]["vision"] = {"passed": 59, "wrong": 1}
        assert shortfalls(found) == [
            "59 vision types passed, at least 60 expected",
            "MLP replaced in 74 classes, at least 75 expected",
            "RoPE replaced in 99 types, at least 100 expected",
            "1 types are wrong",
        ]

    def test_the_page(self):
        results = [examine("causal", "llama").as_dict(), examine("causal", "gpt_oss").as_dict()]
        page = markdown(results, {"torch": "1"})
        assert (
            "| llama | replaced (5) | – | replaced (2) | replaced (2) | replaced (2) | – | – | replaced | text |"
            in page
        )
        assert (
            "| gpt_oss | replaced (5) | – | replaced (2) | replaced (2) | – | – | left alone [1] | replaced | text |"
            in page
        )
        assert "1. `GptOssExperts`: its _apply_gate computes something else" in page
        assert "| mistral | mistral | not passed |" in page
        assert summary(results)["outcomes"] == {"causal": {"passed": 2}}
