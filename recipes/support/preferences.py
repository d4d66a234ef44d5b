"""Preferences and prompts: read as they stand, or made from dialogues by rules that need no judge."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

from datasets import Dataset
from trl import unpair_preference_dataset
from trl.data_utils import maybe_extract_prompt

from .chats import Messages, load_rows


def load_pairs(source: str, root: Path, seed: int) -> Dataset:
    """Pairs of a preferred and another answer: `source`'s own, or else made from its chats by `preference_pairs`.

    Args:
        source: a file or a dataset with columns ``chosen`` and ``rejected``, or ``messages``, given as to `load_rows`.
        root: where a relative file is looked for next.
        seed: decides which answers are the rejected ones.

    Returns:
        Rows with ``prompt``, ``chosen`` and ``rejected``, lists of messages where `source` has those.

    Raises:
        ValueError: `source` has neither kind of columns.
    """
    rows = load_rows(source, root)
    if {"chosen", "rejected"} <= set(rows.column_names):
        return rows.map(maybe_extract_prompt, desc="Taking the prompts out")
    if "messages" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise ValueError(f"{source} must have columns `chosen` and `rejected`, or `messages`; it has {columns}")
    return preference_pairs(rows, seed)


def load_labelled_answers(source: str, root: Path, seed: int) -> Dataset:
    """Answers each called good or bad, in random order: `source`'s own, or the two of each pair of `load_pairs`.

    The order matters: KTO reads its data in sequence, since it estimates a divergence from neighbours.

    Returns:
        Rows with ``prompt``, ``completion`` and ``label``, True for the preferred ones.
    """
    rows = load_rows(source, root)
    if not {"completion", "label"} <= set(rows.column_names):
        pairs = load_pairs(source, root, seed)
        rows = unpair_preference_dataset(pairs.select_columns(["prompt", "chosen", "rejected"]))
    return rows.shuffle(seed=seed)


def preference_pairs(chats: Dataset, seed: int) -> Dataset:
    """Pairs from dialogues: the reply that was given is preferred to one that was given to another question.

    The other reply is drawn at random among the last replies of the dialogues with the same ``topic``, where there is
    such a column, so that the topic alone doesn't tell the two apart. A reply that stands anywhere in `chats` as the
    answer to the same question is never the rejected one. What a model learns from such pairs is to answer to the
    point; no one has judged which of two fitting answers is better.

    Args:
        chats: rows with ``messages`` that end with the assistant's, the user's before it.
        seed: of the draw.

    Returns:
        As many rows, with ``prompt`` (all messages but the last), ``chosen`` and ``rejected`` (one message each).

    Raises:
        ValueError: a chat doesn't end with a question and its answer, or no dialogue has another question.
    """
    answers_to: dict[str, set[str]] = defaultdict(set)
    pools: dict[str, list[tuple[str, str]]] = defaultdict(list)
    topics = chats["topic"] if "topic" in chats.column_names else [""] * len(chats)
    for messages, topic in zip(chats["messages"], topics, strict=True):
        question, answer = _last_exchange(messages)
        answers_to[question].add(answer)
        pools[topic].append((question, answer))
    everywhere = [exchange for pool in pools.values() for exchange in pool]

    draw = random.Random(seed)
    rows = []
    for messages, topic in zip(chats["messages"], topics, strict=True):
        question, _ = _last_exchange(messages)
        for pool in (pools[topic], everywhere):
            start = draw.randrange(len(pool))
            others = (pool[(start + step) % len(pool)] for step in range(len(pool)))
            other = next((a for q, a in others if q != question and a not in answers_to[question]), None)
            if other is not None:
                break
        else:
            raise ValueError(f"no other dialogue has an answer to another question than {question!r}")
        rows.append(
            {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [{"role": "assistant", "content": other}]}
        )
    return Dataset.from_list(rows)


def questions_with_answers(chats: Dataset) -> Dataset:
    """Prompts to sample answers to, each with the answer that was given, for a reward function to look at.

    Returns:
        Rows with ``prompt`` (all messages but the last) and ``reference`` (the text of the last).

    Raises:
        ValueError: a chat doesn't end with a question and its answer.
    """
    return Dataset.from_list(
        [{"prompt": messages[:-1], "reference": _last_exchange(messages)[1]} for messages in chats["messages"]]
    )


def at_most(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """`count` rows drawn at random by `seed`, or all where there are no more or `count` is ``None``."""
    return rows if count is None else rows.shuffle(seed=seed).select(range(min(count, len(rows))))


def _last_exchange(messages: Messages) -> tuple[str, str]:
    """What the user said last, without regard to letter case and outer blanks, and the reply to it."""
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        raise ValueError(f"a chat must end with a user's message and the assistant's reply, this one is {messages!r}")
    return messages[-2]["content"].strip().lower(), messages[-1]["content"]
