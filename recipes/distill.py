"""Distillation: a smaller model learns the distribution of a larger one over each next token, without logits.

    accelerate launch recipes/distill.py                                   # 20 layers of SmolLM2-135M, by all 30
    accelerate launch recipes/distill.py --config configs/distill_llama3_8b.yaml --beta 0.1
    python recipes/distill.py --use_liger false                            # TRL's own, to compare

The loss is the generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2024) over the answers in the data;
with --lmbda above 0 that share of the batches is answered by the student instead.
Copy it and change it: it reads from top to bottom.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config

from liger_trainer.trl import LigerGKDConfig, LigerGKDTrainer
from support.alignment import DataOptions, load_policy, read_options, show_before_and_after
from support.chats import load_chats
from support.models import find_model, load_model
from support.preferences import at_most
from support.students import fewer_layers

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class StudentOptions:
    student_layers: int | None = field(
        default=None,
        metadata={"help": "Make the student from so many of the teacher's layers; model_name_or_path isn't read then."},
    )


def main(argv: list[str] | None = None) -> LigerGKDTrainer:
    data, student_options, model_options, args = read_options(
        (DataOptions, StudentOptions, ModelConfig, LigerGKDConfig), ROOT / "configs" / "distill_smollm2.yaml", argv
    )
    with args.main_process_first(desc="finding the teacher"):
        source = find_model(args.teacher_model_name_or_path)
    dtype = model_options.dtype or "float32"
    teacher, tokenizer = load_model(source, dtype, model_options.attn_implementation)
    if student_options.student_layers is not None:
        student = fewer_layers(teacher, student_options.student_layers)
    else:
        student, tokenizer = load_policy(model_options, args)

    def fits(row: dict[str, Any]) -> bool:  # GKD's collator cuts from the start, and refuses a chat without its prompt
        return len(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]) <= args.max_length

    with args.main_process_first(desc="preparing the data"):
        train, heldout = (load_chats(source, ROOT).filter(fits) for source in (data.train_data, data.heldout_data))

    trainer = LigerGKDTrainer(
        student,
        teacher,
        args=args,
        train_dataset=train,
        eval_dataset=at_most(heldout, data.heldout_examples, args.seed),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_options),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    show_before_and_after(
        trainer, f"Distillation of {args.teacher_model_name_or_path} into {student.config.num_hidden_layers} layers"
    )
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
