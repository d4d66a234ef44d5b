"""The runs: a model's shape, what it is trained for, on how many tokens, and what is kept of its activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .shapes import FAMILIES, SHAPES, Shape, shrunk

__all__ = ["RUNS", "Run"]

PREFERENCES = ("dpo", "orpo", "simpo")


@dataclass(frozen=True)
class Run:
    """One training step.

    Attributes:
        title: what tables and plots call it.
        shape: of the model, see `training.shapes`.
        task: ``"sft"``, ``"dpo"``, ``"orpo"`` or ``"simpo"``. The last three go through TRL's trainers.
        batch: sequences, or pairs of sequences where the task is about preferences.
        length: tokens of each sequence.
        ignored: share of the labels that are -100. Of a preference pair always that share is prompt.
        checkpointing: every decoder layer is recomputed in the backward.
        lora_rank: adapters of this rank on all linear layers but the head; 0 trains all weights.
    """

    title: str
    shape: Shape
    task: str = "sft"
    batch: int = 1
    length: int = 4096
    ignored: float = 0.0
    checkpointing: bool = False
    lora_rank: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that one step trains on, both sequences of each pair counted."""
        return self.batch * self.length * (2 if self.task in PREFERENCES else 1)

    def tiny(self) -> Run:
        """The same run, small enough for a CPU."""
        return replace(
            self, shape=shrunk(self.shape), batch=min(self.batch, 2), length=64, lora_rank=min(self.lora_rank, 2)
        )


LLAMA_1B, LLAMA_8B, QWEN = SHAPES["llama-3.2-1b"], SHAPES["llama-3-8b"], SHAPES["qwen3-0.6b"]
PLAIN = Run("Llama-3.2-1B, 4 × 4096", LLAMA_1B, batch=4)

RUNS: dict[str, Run] = {
    "llama-1b": PLAIN,
    "llama-1b-half": replace(PLAIN, title="Llama-3.2-1B, 4 × 4096, half of the labels ignored", ignored=0.5),
    "llama-1b-checkpointing": replace(
        PLAIN, title="Llama-3.2-1B, 8 × 4096, checkpointing", batch=8, checkpointing=True
    ),
    "llama-8b-lora": Run(
        "Llama-3-8B, LoRA r=16, 1 × 8192, checkpointing", LLAMA_8B, length=8192, checkpointing=True, lora_rank=16
    ),
    # For the sweep over contexts: one sequence.
    "llama-1b-context": Run("Llama-3.2-1B, one sequence", LLAMA_1B),
    # Checkpointing is what TRL's configs default to.
    **{
        f"{name}-{task}{'-checkpointing' if again else ''}": Run(
            f"{title} {label}, 8 pairs × {length}{', checkpointing' if again else ''}",
            shape,
            task,
            8,
            length,
            ignored=0.25,
            checkpointing=again,
        )
        for again in (False, True)
        for name, title, shape, length in (
            ("qwen3-0.6b", "Qwen3-0.6B", QWEN, 2048),
            ("llama-1b", "Llama-3.2-1B", LLAMA_1B, 1024),
        )
        for task, label in zip(PREFERENCES, ("DPO", "ORPO", "SimPO"), strict=True)
    },
    **{f"family-{name}": Run(f"{title}, 2 × 4096", shape, batch=2) for name, (title, shape) in FAMILIES.items()},
}
