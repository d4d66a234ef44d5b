"""Kahneman-Tversky Optimization (Ethayarajh et al., 2024): answers each called good or bad, no pairs, without logits.

    accelerate launch recipes/kto.py                                       # SmolLM2-135M on answers from recipes/data
    accelerate launch recipes/kto.py --config configs/kto_llama3_8b.yaml --desirable_weight 1.5
    python recipes/kto.py --use_liger false                                # TRL's own, to compare

Copy it and change it: it reads from top to bottom.
"""

from __future__ import annotations

from pathlib import Path

from trl import ModelConfig, get_peft_config

from liger_trainer.trl import LigerKTOConfig, LigerKTOTrainer
from support.alignment import DataOptions, load_policy, read_options, show_before_and_after
from support.preferences import at_most, load_labelled_answers

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> LigerKTOTrainer:
    data, model_options, args = read_options(
        (DataOptions, ModelConfig, LigerKTOConfig), ROOT / "configs" / "kto_smollm2.yaml", argv
    )
    model, tokenizer = load_policy(model_options, args)
    with args.main_process_first(desc="preparing the data"):
        train, heldout = (
            load_labelled_answers(source, ROOT, args.seed) for source in (data.train_data, data.heldout_data)
        )

    trainer = LigerKTOTrainer(
        model,  # the reference is a copy of it, or, with adapters, the model without them
        args=args,
        train_dataset=train,
        eval_dataset=at_most(heldout, data.heldout_examples, args.seed),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_options),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    show_before_and_after(trainer, f"KTO ({args.loss_type}) · {model_options.model_name_or_path}")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
