"""Chats as training examples: the chat template, labels on the assistant's tokens, packing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

IGNORE_INDEX = -100
Messages = list[dict[str, Any]]
Example = dict[str, list[int]]
logger = logging.get_logger(__name__)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int | None = None) -> list[Example]:
    """Tokenise a chat with the tokenizer's template and label what the assistant said, nothing else.

    The assistant's tokens are those of the template's ``{% generation %}`` blocks where it has them; else what the
    template adds between the prompt for the assistant's turn and the end of that turn, the end-of-turn token included.
    A template that renders earlier turns differently once later ones follow (reasoning models drop old thoughts) gives
    one example for each of the assistant's turns, each in the context in which the model would have answered.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: ``[{"role": ..., "content": ...}, ...]``; what a tokenizer's ``apply_chat_template`` accepts.
        max_length: tokens to keep from the start; ``None`` keeps all.

    Returns:
        Examples with ``input_ids`` and ``labels`` of one length, ``labels`` being -100 at every token that is not the
        assistant's. Examples in which no label is left are dropped, so the list may be empty.

    Raises:
        ValueError: no chat template; the first turn is the assistant's; or the template doesn't start the assistant's
            turn with its own generation prompt, so that the turn can't be told apart.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template: use the instruct version of the model, "
            "or set tokenizer.chat_template"
        )
    if messages[0]["role"] == "assistant":
        raise ValueError("a chat must begin with a system or user message, this one begins with the assistant's")
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        examples = [_labelled(encoded["input_ids"], encoded["assistant_masks"], max_length)]
    else:
        examples = [
            _labelled(*_tokens_within(tokenizer, text, spans), max_length)
            for text, spans in _assistant_spans(tokenizer, messages)
        ]
    return [example for example in examples if any(label != IGNORE_INDEX for label in example["labels"])]


def _assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[tuple[str, list[tuple[int, int]]]]:
    """Rendered texts, each with the character ranges in which the assistant speaks."""

    def render(turns: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=prompt)

    whole = render(len(messages))
    spans, turns = [], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = render(index, prompt=True), render(index + 1).rstrip()
        if not answered.startswith(prompt):
            raise ValueError(
                "the chat template doesn't begin the assistant's turn with its own generation prompt, so the "
                "assistant's tokens can't be told apart: mark them in the template with {% generation %} and "
                f"{{% endgeneration %}}. Turn {index} renders as {answered!r}, its prompt as {prompt!r}"
            )
        spans.append((len(prompt), len(answered)))
        turns.append(answered)
    if all(whole.startswith(answered) for answered in turns):
        return [(whole, spans)]
    return [(answered, [span]) for answered, span in zip(turns, spans, strict=True)]


def _tokens_within(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a <= start < end <= b for a, b in spans)) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


def _labelled(input_ids: list[int], mask: list[int], max_length: int | None) -> Example:
    labels = [token if chosen else IGNORE_INDEX for token, chosen in zip(input_ids, mask, strict=True)]
    return {"input_ids": list(input_ids[:max_length]), "labels": labels[:max_length]}


def pack(examples: Iterable[Example], length: int) -> list[Example]:
    """Lay examples one after another in rows of at most `length` tokens, each example whole and in one row.

    First fit, in the order given: sorted by length, rows would hold chats of one kind, and losses would jump. Rows
    carry ``position_ids`` that begin at 0 with every example, by which the model's attention keeps the examples apart,
    and the first label of every example is -100, since the token before it belongs to another example.
    """
    rows: list[Example] = []
    for example in examples:
        size = len(example["input_ids"])
        if size > length:
            raise ValueError(f"an example of {size} tokens does not fit in a row of {length}")
        row = next((row for row in rows if len(row["input_ids"]) + size <= length), None)
        if row is None:
            rows.append(row := {"input_ids": [], "labels": [], "position_ids": []})
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORE_INDEX, *example["labels"][1:]]
        row["position_ids"] += range(size)
    return rows


@dataclass
class PackingCollator:
    """Batch packed rows, without an attention mask: ``position_ids`` alone say what may attend to what.

    Rows are filled up to the longest of the batch with a document of padding that carries no label. With `flatten`
    they become one row instead, which is what flash attention's variable-length kernels need.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, rows: list[Example]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "labels", "position_ids")
        if self.flatten:
            rows = [{key: [value for row in rows for value in row[key]] for key in keys}]
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {key: [] for key in keys}
        for row in rows:
            rest = longest - len(row["input_ids"])
            batch["input_ids"].append(row["input_ids"] + [self.pad_token_id] * rest)
            batch["labels"].append(row["labels"] + [IGNORE_INDEX] * rest)
            batch["position_ids"].append(row["position_ids"] + list(range(rest)))
        return {key: torch.tensor(values) for key, values in batch.items()}


def load_rows(source: str, root: Path) -> Dataset:
    """Rows of a JSON Lines file (relative to the working directory or to `root`) or of a dataset ``name[:split]``.

    Raises:
        FileNotFoundError: `source` names a file that isn't there.
    """
    file = next((path for path in (Path(source), root / source) if path.is_file()), None)
    if file is not None:
        return load_dataset("json", data_files=str(file), split="train")
    if source.endswith((".json", ".jsonl")):
        raise FileNotFoundError(f"no file {source}, neither in {Path.cwd()} nor in {root}")
    name, _, split = source.partition(":")
    return load_dataset(name, split=split or "train")


def load_chats(source: str, root: Path) -> Dataset:
    """Chats, given as to `load_rows`.

    Raises:
        ValueError: the data has no ``messages`` column.
        FileNotFoundError: `source` names a file that isn't there.
    """
    data = load_rows(source, root)
    if "messages" not in data.column_names:
        raise ValueError(f"{source} must have a column `messages` of chats, it has {', '.join(data.column_names)}")
    return data


def tokenise_chats(
    chats: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, packing: bool, seed: int
) -> Dataset:
    """Turn a dataset of chats into one of training examples, or, with `packing`, of rows of them, shuffled by `seed`.

    Raises:
        ValueError: no chat has a label left within `max_length` tokens.
    """

    def encode(batch: dict[str, list[Messages]]) -> dict[str, list[list[int]]]:
        examples = [example for chat in batch["messages"] for example in encode_chat(tokenizer, chat, max_length)]
        keys: tuple[str, ...] = ("input_ids", "labels")
        if packing:
            examples = pack(examples, max_length)
            keys += ("position_ids",)
        return {key: [example[key] for example in examples] for key in keys}

    if packing:
        chats = chats.shuffle(seed=seed)
    examples = chats.map(encode, batched=True, remove_columns=chats.column_names, desc="Applying the chat template")
    if not len(examples):
        raise ValueError(f"none of the {len(chats)} chats has an assistant's token within max_length={max_length}")
    return examples
