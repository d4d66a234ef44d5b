"""Contrastive Preference Optimization (Xu et al., 2024): DPO without a reference, and likelihood, without logits.

    accelerate launch recipes/cpo.py                                       # SmolLM2-135M on pairs from recipes/data
    accelerate launch recipes/cpo.py --config configs/cpo_llama3_8b.yaml --loss_type hinge
    python recipes/cpo.py --use_liger false                                # TRL's own, to compare

Copy it and change it: it reads from top to bottom.
"""

from __future__ import annotations

from pathlib import Path

from trl import ModelConfig, get_peft_config

from liger_trainer.trl import LigerCPOConfig, LigerCPOTrainer
from support.alignment import DataOptions, load_policy, read_options, show_before_and_after
from support.preferences import at_most, load_pairs

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> LigerCPOTrainer:
    data, model_options, args = read_options(
        (DataOptions, ModelConfig, LigerCPOConfig), ROOT / "configs" / "cpo_smollm2.yaml", argv
    )
    model, tokenizer = load_policy(model_options, args)
    with args.main_process_first(desc="preparing the data"):
        train, heldout = (load_pairs(source, ROOT, args.seed) for source in (data.train_data, data.heldout_data))

    trainer = LigerCPOTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=at_most(heldout, data.heldout_examples, args.seed),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_options),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    show_before_and_after(trainer, f"CPO ({args.loss_type}) · {model_options.model_name_or_path}")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
