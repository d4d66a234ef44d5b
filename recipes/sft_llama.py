"""Fine-tune a Llama, or any causal language model, on chats, with liger_trainer's kernels.

    accelerate launch recipes/sft_llama.py                                # SmolLM2-135M on the chats in recipes/data
    accelerate launch recipes/sft_llama.py --config configs/sft_llama3_8b.yaml --learning_rate 1e-5
    accelerate launch recipes/sft_llama.py --compare true                 # with and without the kernels, side by side

Copy it and change it: it reads from top to bottom.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, set_seed

from liger_trainer import LigerTrainer, TrainingArguments
from support.chats import PackingCollator, load_chats, tokenise_chats
from support.compare import is_main_process, run_variant, show
from support.measure import Meter, RunReport, device_name, share_of_cores
from support.models import find_model, load_model
from support.options import parse_options

ROOT = Path(__file__).resolve().parent.parent

# What --help shows of the training arguments, in this order.
# fmt: off
COMMON_TRAINING_OPTIONS = [
    "use_liger", "liger_config", "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16", "gradient_checkpointing",
    "torch_compile", "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "seed", "report_to",
]
# fmt: on


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        metadata={"help": "Model of the hub, a folder, or a .gguf file. Needs a chat template."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the weights. Mixed precision is --bf16 or --fp16 over float32."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ...; transformers chooses by default."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank (LoRA); 0 trains all weights."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules with adapters: all-linear, or names joined by commas."}
    )


@dataclass
class DataOptions:
    _argument_group_name = "data"

    train_data: str = field(
        default="recipes/data/dialogues-train.jsonl",
        metadata={"help": "JSON Lines file with a column `messages`, or a dataset of the hub as name[:split]."},
    )
    heldout_data: str = field(
        default="recipes/data/dialogues-heldout.jsonl", metadata={"help": "Chats to evaluate on, given the same way."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens kept of a chat, and tokens in a packed row."})
    packing: bool = field(
        default=False, metadata={"help": "Fill rows with chats, which don't see one another, in place of padding."}
    )


@dataclass
class RunOptions:
    _argument_group_name = "run"

    compare: bool = field(
        default=False, metadata={"help": "Train a second time without liger_trainer, and show both side by side."}
    )
    save_model: bool = field(default=True, metadata={"help": "Save the trained model, or its adapters, at the end."})
    print_report: bool = field(default=True, metadata={"help": "Print the figures and draw the loss curve at the end."})
    stop_after_steps: int | None = field(
        default=None, metadata={"help": "End after so many steps, the learning rate's schedule unchanged."}
    )
    stop_after_seconds: float | None = field(default=None, metadata={"help": "End training after so long."})
    cpu_threads: int = field(
        default=0, metadata={"help": "Threads of each process on a CPU; 0 shares the cores out among the processes."}
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_options, data, run, args = parse_options(
        (ModelOptions, DataOptions, RunOptions, TrainingArguments),
        ROOT / "configs" / "sft_smollm2.yaml",
        argv,
        description=(__doc__ or "").partition("\n")[0],
        examples="\n".join(line.strip() for line in (__doc__ or "").splitlines() if "accelerate launch" in line),
        shown=COMMON_TRAINING_OPTIONS,
        defaults={"use_cpu": not torch.accelerator.is_available(), "ddp_find_unused_parameters": False},
    )
    output = Path(args.output_dir)
    report_file, plot_file = output / "report.json", output / "loss.png"

    if run.compare:
        if args.resume_from_checkpoint:
            raise SystemExit("--compare starts both runs afresh: leave out --resume_from_checkpoint")
        compare(argv, output)
        return

    if args.device.type == "cpu":  # `accelerate launch` leaves every process one thread.
        torch.set_num_threads(run.cpu_threads or share_of_cores())
    set_seed(args.seed)
    with args.main_process_first(desc="finding the model"):
        model_source = find_model(model_options.model)
    model, tokenizer = load_model(model_source, model_options.dtype, model_options.attn_implementation)
    if model_options.lora_rank:
        targets = model_options.lora_targets
        adapters = LoraConfig(
            task_type="CAUSAL_LM",
            r=model_options.lora_rank,
            lora_alpha=model_options.lora_alpha,
            lora_dropout=model_options.lora_dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
        )
        model = get_peft_model(model, adapters)

    with args.main_process_first(desc="preparing the data"):
        train, heldout = (
            tokenise_chats(load_chats(source, ROOT), tokenizer, data.max_length, data.packing, args.seed)
            for source in (data.train_data, data.heldout_data)
        )
    if data.packing:
        flash = "flash" in (model.config._attn_implementation or "")
        collator = PackingCollator(tokenizer.pad_token_id, flatten=flash)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    # The loss before training. Calling evaluate() before train() would leave the model without its DDP wrapper.
    args.eval_on_start = True
    args.include_num_input_tokens_seen = "all" if data.packing else "non_padding"

    meter = Meter(run.stop_after_steps, run.stop_after_seconds)
    trainer = LigerTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[meter],
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    after = trainer.evaluate()["eval_loss"]
    if run.save_model:
        trainer.save_model()

    logged = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] >= meter.first_step]
    report = RunReport(
        title=f"{model_options.model}{f', LoRA rank {model_options.lora_rank}' if model_options.lora_rank else ''}",
        device=device_name(args.device),
        processes=args.world_size,
        steps=[entry["step"] for entry in logged],
        losses=[entry["loss"] for entry in logged],
        heldout_before=meter.heldout_before,
        heldout_after=after,
        tokens_per_second=meter.tokens_per_second,
        peak_bytes=int(trainer.accelerator.gather(torch.tensor([meter.peak_bytes], device=args.device)).max()),
    )
    if trainer.is_world_process_zero():
        report.save(report_file)
    if trainer.is_world_process_zero() and run.print_report:
        show({"liger_trainer" if args.use_liger else "stock": report}, plot_file, output if run.save_model else None)
    trainer.accelerator.wait_for_everyone()


def compare(argv: list[str], output: Path) -> None:
    """Run this script twice, patched and not, from the same start; each in fresh processes, as memory needs it."""
    script, common = Path(__file__), [*argv, "--compare", "false", "--print_report", "false"]
    patched = run_variant("with liger_trainer", script, [*common, "--use_liger", "true"], output / "report.json", 0)
    if is_main_process() and patched is None:
        raise SystemExit("the run with liger_trainer failed: see above")
    without = ["--use_liger", "false", "--output_dir", str(output / "stock"), "--save_model", "false"]
    without += ["--save_strategy", "no", "--stop_after_seconds", "inf"]
    if patched is not None:  # As many steps, on the main process, which ends the run for the others.
        without += ["--stop_after_steps", str(len(patched.steps))]
    stock = run_variant("without", script, [*common, *without], output / "stock" / "report.json", 1)
    if is_main_process():
        show({"liger_trainer": patched, "stock": stock}, output / "loss.png", output)


if __name__ == "__main__":
    main()
