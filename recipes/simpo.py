"""SimPO (Meng et al., 2024): mean log-probabilities as rewards, a margin, and no reference, without logits.

    accelerate launch recipes/simpo.py                                     # SmolLM2-135M on pairs from recipes/data
    accelerate launch recipes/simpo.py --config configs/simpo_llama3_8b.yaml --simpo_gamma 1.0
    python recipes/simpo.py --use_liger false                              # TRL's own, to compare

Copy it and change it: it reads from top to bottom.
"""

from __future__ import annotations

from pathlib import Path

from trl import ModelConfig, get_peft_config

from liger_trainer.trl import LigerSimPOConfig, LigerSimPOTrainer
from support.alignment import DataOptions, load_policy, read_options, show_before_and_after
from support.preferences import at_most, load_pairs

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> LigerSimPOTrainer:
    data, model_options, args = read_options(
        (DataOptions, ModelConfig, LigerSimPOConfig), ROOT / "configs" / "simpo_smollm2.yaml", argv
    )
    model, tokenizer = load_policy(model_options, args)
    with args.main_process_first(desc="preparing the data"):
        train, heldout = (load_pairs(source, ROOT, args.seed) for source in (data.train_data, data.heldout_data))

    trainer = LigerSimPOTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=at_most(heldout, data.heldout_examples, args.seed),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_options),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    show_before_and_after(trainer, f"SimPO · {model_options.model_name_or_path}")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
