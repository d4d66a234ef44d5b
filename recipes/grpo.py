"""Group Relative Policy Optimization (Shao et al., 2024): sampled answers, checked rewards, a loss without logits.

    accelerate launch recipes/grpo.py                                      # SmolLM2-135M on questions from recipes/data
    accelerate launch recipes/grpo.py --config configs/grpo_llama3_8b.yaml --num_generations 16
    python recipes/grpo.py --use_liger false                               # TRL's own, to compare

Copy it and change it, the reward functions first: it reads from top to bottom.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config

from liger_trainer.trl import LigerGRPOConfig, LigerGRPOTrainer
from support.alignment import DataOptions, load_policy, read_options, show_before_and_after
from support.chats import Messages, load_chats
from support.preferences import at_most, questions_with_answers

ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG = 8, 32  # words


def keywords(completions: list[Messages], reference: list[str], **_: Any) -> list[float]:
    """The share of the reference answer's words of four letters and more that the completion has as well."""
    rewards = []
    for completion, answer in zip(completions, reference, strict=True):
        wanted = {word for word in _words(answer) if len(word) >= 4}
        said = set(_words(completion[-1]["content"]))
        rewards.append(len(wanted & said) / len(wanted) if wanted else 0.0)
    return rewards


def brevity(completions: list[Messages], **_: Any) -> list[float]:
    """1 for an answer of one to `SHORT` words, falling in a line to 0 at `LONG` words; 0 for an empty one."""
    counts = [len(_words(completion[-1]["content"])) for completion in completions]
    return [min(1.0, max(0.0, (LONG - count) / (LONG - SHORT))) if count else 0.0 for count in counts]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def main(argv: list[str] | None = None) -> LigerGRPOTrainer:
    data, model_options, args = read_options(
        (DataOptions, ModelConfig, LigerGRPOConfig), ROOT / "configs" / "grpo_smollm2.yaml", argv
    )
    model, tokenizer = load_policy(model_options, args)
    with args.main_process_first(desc="preparing the data"):
        train, heldout = (
            questions_with_answers(load_chats(source, ROOT)) for source in (data.train_data, data.heldout_data)
        )

    trainer = LigerGRPOTrainer(
        model,
        [keywords, brevity],
        args=args,
        train_dataset=train,
        eval_dataset=at_most(heldout, data.heldout_examples, args.seed),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_options),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    show_before_and_after(trainer, f"GRPO ({args.loss_type}) · {model_options.model_name_or_path}")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
