"""docs/models.md, from what the census found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

__all__ = ["LIGER_KERNEL", "markdown", "shortfalls", "summary"]

COLUMNS = {
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "fused_add_rms_norm": "add + RMSNorm",
    "rope": "RoPE",
    "mlp": "MLP",
    "gelu": "GELU",
    "experts": "experts",
    "fused_linear_cross_entropy": "deferred logits",
}

# The model types that Liger-Kernel 0.8.5 patches, by its MODEL_TYPE_TO_APPLY_LIGER_FN. A text model that transformers
# has no causal or vision-language class for is part of the type in brackets.
LIGER_KERNEL = {
    "deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3", "deepseek_v4": "deepseek_v4",
    "muse_glimmer": "muse_glimmer",
    "exaone4": "exaone4", "falcon_h1": "falcon_h1", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3",
    "gemma3_text": "gemma3_text", "gemma4": "gemma4", "gemma4_text": "gemma4_text", "glm4": "glm4", "glm4v": "glm4v",
    "glm4v_moe": "glm4v_moe", "gpt_oss": "gpt_oss", "granite": "granite", "hunyuan_v1_dense": "hunyuan_v1_dense",
    "hunyuan_v1_moe": "hunyuan_v1_moe", "internvl": "internvl", "llama": "llama", "llama4": "llama4",
    "llama4_text": "llama4_text", "llava": "llava", "ministral": "ministral", "mistral": "mistral",
    "mixtral": "mixtral", "mllama": "mllama", "mllama_text_model": "mllama", "nemotron": "nemotron", "olmo2": "olmo2",
    "olmo3": "olmo3", "paligemma": "paligemma", "phi3": "phi3", "pixtral": "mistral3", "qwen2": "qwen2",
    "qwen2_vl": "qwen2_vl", "qwen2_vl_text": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "qwen3_next": "qwen3_next", "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe", "qwen3_5_moe_text": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl", "qwen3_vl_text": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl_moe",
    "qwen3_vl_moe_text": "qwen3_vl_moe", "smollm3": "smollm3", "smolvlm": "smolvlm",
}  # fmt: skip

OUTCOMES = {
    "passed": "passed",
    "not replaced": "right, but not served in full",
    "wrong": "wrong",
    "not built": "not built small",
}


# What a census of all types must find at the least.
LEAST_PASSED = {"causal": 175, "vision": 60}
LEAST_CLASSES = {"RMSNorm and LayerNorm": 110, "MLP": 75, "experts": 50}
LEAST_TYPES = {"RoPE": 100, "add + RMSNorm": 140}


def _parts(result: dict[str, Any], field: str) -> dict[str, dict[tuple[str, str], int]]:
    """{kind: {(class, how or why): count}}"""
    found: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for key, count in result[field].items():
        kind, class_name, words = key.split("|", 2)
        found[kind][class_name, words] = count
    return found


def summary(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How many types came out how, and how many classes and types each kind of part was replaced in."""
    outcomes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    classes: dict[str, set[str]] = defaultdict(set)
    types: dict[str, set[str]] = defaultdict(set)
    images = 0
    for result in results:
        outcomes[result["task"]][result["outcome"]] += 1
        images += "images" in result["inputs"]
        if result["outcome"] in ("wrong", "not built"):
            continue
        for kind, parts in _parts(result, "replaced").items():
            classes[kind] |= {class_name for class_name, _ in parts}
            types[kind].add(result["model_type"])
    return {
        "outcomes": {task: dict(counts) for task, counts in outcomes.items()},
        "classes": {kind: len(names) for kind, names in classes.items()},
        "types": {kind: len(names) for kind, names in types.items()},
        "with_images": images,
    }


def shortfalls(found: dict[str, Any]) -> list[str]:
    """In words, where a :func:`summary` of all types is below what it must be."""
    short = [
        f"{found['outcomes'].get(task, {}).get('passed', 0)} {task} types passed, at least {least} expected"
        for task, least in LEAST_PASSED.items()
        if found["outcomes"].get(task, {}).get("passed", 0) < least
    ]
    for field, least_of in (("classes", LEAST_CLASSES), ("types", LEAST_TYPES)):
        for name, least in least_of.items():
            count = sum(found[field].get(kind, 0) for kind, column in COLUMNS.items() if column in name.split(" and "))
            if count < least:
                short.append(f"{name} replaced in {count} {field}, at least {least} expected")
    wrong = sum(counts.get("wrong", 0) for counts in found["outcomes"].values())
    return short + ([f"{wrong} types are wrong"] if wrong else [])


class _Notes:
    """Numbered notes, one a text."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def reference(self, text: str) -> str:
        return f"[{self.texts.setdefault(text, len(self.texts) + 1)}]"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for text, number in self.texts.items()]


def _cell(kind: str, replaced: dict[Any, Any], skipped: dict[Any, Any], notes: _Notes) -> str:
    words = []
    if kind in replaced:
        count = sum(replaced[kind].values())
        words.append("replaced" if kind == "fused_linear_cross_entropy" else f"replaced ({count})")
    if kind in skipped:
        marks = dict.fromkeys(
            notes.reference(f"`{class_name}`: {_plain(reason)}") for class_name, reason in skipped[kind]
        )
        words.append(f"left alone {' '.join(marks)}")
    return ", ".join(words) or "–"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("torch.", "").split())


def markdown(results: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The page."""
    found, notes = summary(results), _Notes()
    lines = [
        "# Models",
        "",
        "Every model type of transformers that a causal or a vision-language Auto class knows, built small with random "
        "weights, run, patched, run again and reverted by `python -m tests.census`, which writes this page. A type has "
        "passed when with the kernels' PyTorch implementations in fp32 the loss and every gradient are within 1e-5 of "
        "the untouched model's (or, where a model this small rounds worse, as near to float64 as the untouched "
        "model's), with labels, with `num_items_in_batch`, under gradient checkpointing, and in an evaluation that "
        "reads the logits; when `revert` gives the numbers of before bit by bit; when the fused head really ran; and "
        "when at least one other part was replaced.",
        "",
        "Measured with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        "| | " + " | ".join(OUTCOMES.values()) + " |",
        "| --- |" + " --- |" * len(OUTCOMES),
    ]
    names = {"causal": "causal language models", "vision": "vision-language models"}
    for task, counts in found["outcomes"].items():
        lines.append(f"| {names[task]} | " + " | ".join(str(counts.get(o, 0)) for o in OUTCOMES) + " |")
    lines += [
        "",
        f"{found['with_images']} types were run with images too. Replaced were "
        + ", ".join(
            f"{COLUMNS[kind]} in {count} classes ({found['types'][kind]} types)"
            for kind, count in found["classes"].items()
            if kind != "fused_linear_cross_entropy"
        )
        + ".",
        "",
        "A number is the count of replaced parts in the small model. A dash: the model has no such part, or none that "
        "resembles one. Reasons for what is left alone stand below the tables by their numbers.",
    ]
    for task, title in (("causal", "Causal language models"), ("vision", "Vision-language models")):
        rows = [result for result in results if result["task"] == task]
        if not rows:
            continue
        lines += ["", f"## {title}", "", "| type | " + " | ".join(COLUMNS.values()) + " | run on |"]
        lines.append("| --- |" + " --- |" * (len(COLUMNS) + 1))
        for result in sorted(rows, key=lambda row: row["model_type"]):
            if result["outcome"] == "not built":
                continue
            replaced, skipped = _parts(result, "replaced"), _parts(result, "skipped")
            cells = [_cell(kind, replaced, skipped, notes) for kind in COLUMNS]
            if not result["fused"]:
                cells[-1] = f"left alone {notes.reference(_why_no_head(result, skipped))}"
            lines.append(f"| {result['model_type']} | " + " | ".join([*cells, ", ".join(result["inputs"])]) + " |")
        missing = [result for result in rows if result["outcome"] == "not built"]
        if missing:
            lines += ["", "Not built small: "]
            lines += [f"- {result['model_type']}: {_plain(result['reason'])[:160]}" for result in missing]
    lines += ["", "## Left alone because", "", *notes.lines(), "", *_beside_liger_kernel(results), ""]
    return "\n".join(lines)


def _why_no_head(result: dict[str, Any], skipped: dict[Any, Any]) -> str:
    for class_name, reason in skipped.get("fused_linear_cross_entropy", ()):
        return f"`{class_name}`: {_plain(reason)}"
    return f"`{result['class_name']}` does something else with its logits than a cross entropy, which needs them all"


def _beside_liger_kernel(results: list[dict[str, Any]]) -> list[str]:
    passed = {result["model_type"] for result in results if result["outcome"] == "passed"}
    lines = ["## Types that Liger-Kernel patches", "", "| its type | here | |", "| --- | --- | --- |"]
    for theirs, ours in LIGER_KERNEL.items():
        lines.append(f"| {theirs} | {ours} | {'passed' if ours in passed else 'not passed'} |")
    return lines
