#!/usr/bin/env python3
"""Write dialogues-train.jsonl and dialogues-heldout.jsonl from the package chatterbot-corpus.

    pip install --no-deps chatterbot-corpus==1.3.3 && pip install pyyaml
    python recipes/data/prepare.py

The outcome depends on nothing but the package's files: duplicates go, and a hash of a dialogue's first turn decides
its split, so that one question, however often it is asked, never stands on both sides.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import distribution
from pathlib import Path

import yaml

PACKAGE, VERSION = "chatterbot-corpus", "1.3.3"
# The corpus's files of questions with answers and of whole dialogues. Its other English files list several
# alternative answers as if they were turns (computers, emotion), or are small talk about one persona (ai, food).
TOPICS = ("coding", "conversations", "greetings", "science", "tech_support", "trivia")
HELD_OUT_PERCENT = 10


def chats(topic: str) -> list[list[dict[str, str]]]:
    """The dialogues of one corpus file as alternating user and assistant messages that end with the assistant."""
    path = distribution(PACKAGE).locate_file(f"chatterbot_corpus/data/english/{topic}.yml")
    dialogues = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))["conversations"]
    found = []
    for dialogue in dialogues:
        turns = [str(turn).strip() for turn in dialogue] if isinstance(dialogue, list) else []
        turns = turns[: len(turns) // 2 * 2]
        if turns and all(turns):
            found.append([{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)])
    return found


def is_held_out(messages: list[dict[str, str]]) -> bool:
    question = "".join(filter(str.isalnum, messages[0]["content"].lower()))
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def main() -> None:
    installed = distribution(PACKAGE).version
    if installed != VERSION:
        raise SystemExit(f"{PACKAGE} {VERSION} is needed, {installed} is installed: pip install {PACKAGE}=={VERSION}")
    seen: set[str] = set()
    lines: dict[bool, list[str]] = {False: [], True: []}
    for topic in TOPICS:
        for messages in chats(topic):
            line = json.dumps({"messages": messages, "topic": topic}, ensure_ascii=False)
            if line not in seen:
                seen.add(line)
                lines[is_held_out(messages)].append(line)
    for held_out, name in ((False, "dialogues-train.jsonl"), (True, "dialogues-heldout.jsonl")):
        target = Path(__file__).with_name(name)
        target.write_text("\n".join(lines[held_out]) + "\n", encoding="utf-8")
        print(f"{target}: {len(lines[held_out])} chats")


if __name__ == "__main__":
    main()
