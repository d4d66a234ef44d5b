"""A few training steps of a tiny model, in one process on the whole batch or in several on a share each."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import HIDDEN, sequences
from torch import Tensor, nn
from wide_tensors import wide_in

from liger_trainer import apply_liger_kernel, is_patched
from liger_trainer.patching.deferred_logits import DeferredLogits
from tests.distributed.group import device
from tests.distributed.models import KINDS, images, make
from tests.distributed.wrappings import Wrapping, wrapped

ROWS, STEPS = 8, 3
TILE_ROWS = 8  # of the fused losses, in fp32: fewer than a process has labels


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    ``head`` is a key of :data:`~tests.distributed.models.KINDS`. ``adapters``: "", "lora" on the layers, "save" for
    the head in ``modules_to_save`` besides, "head" for one on the head, and "save tied" where what is trained
    in the head's place is shared by the embedding. ``silent``: the last half of the batch has no labels.
    ``accumulate``: parts of a step's batch, all but the last without synchronisation. ``preferences``: the loss is
    DPO's, of the even rows over the odd ones.
    """

    wrapping: Wrapping | None
    patched: bool = True
    tied: bool = False
    head: str = "plain"
    adapters: str = ""
    silent: bool = False
    accumulate: int = 1
    checkpointing: bool = False
    shifted: bool = False
    frozen: str = ""
    late: bool = False
    preferences: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [str(self.wrapping), "tied" if self.tied else "untied", self.adapters.replace(" ", "_"), self.frozen]
        parts += [] if self.head == "plain" else [self.head.replace(" ", "_")]
        parts += [name for name in ("silent", "checkpointing", "shifted", "late", "preferences") if getattr(self, name)]
        return "-".join(filter(None, [*parts, f"accumulate{self.accumulate}" if self.accumulate > 1 else ""]))


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    parameters: dict[str, Tensor] = field(default_factory=dict)  # after the last
    collectives: dict[str, int] = field(default_factory=dict)  # of the last step
    evaluated: float = 0.0
    left_alone: list[str] = field(default_factory=list)  # why a head was not patched
    wide: list[tuple[str, tuple[int, ...]]] = field(
        default_factory=list
    )  # logits of more than a tile, in the last step
    logits: Tensor | None = None
    read_in_training: Tensor | None = None


def build(run: Run) -> nn.Module:
    model: Any = make(run.head, run.tied)
    if run.adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        on_head = ["lm_head"] if run.adapters.startswith("head") else []
        saved = ["lm_head"] if run.adapters.startswith("save") else None
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj", *on_head],
            modules_to_save=saved,
            init_lora_weights=False,
            ensure_weight_tying=run.adapters.endswith("tied"),
        )
        model = get_peft_model(model, config)
    if run.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(("lm_head" in name) == (run.frozen == "body"))
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if run.adapters:
            model.enable_input_require_grads()
    return model


def batch(step: int, run: Run = Run(None)) -> dict[str, Tensor]:
    """The whole batch of a step."""
    rows = sequences(ROWS, seed=10 + step)
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if run.silent and step < STEPS:
        stacked["labels"][ROWS // 2 :] = -100
    if KINDS[run.head].images:
        stacked |= images(*stacked["labels"].shape, seed=step)
    if run.shifted:
        stacked["shift_labels"] = torch.nn.functional.pad(stacked["labels"][:, 1:], (0, 1), value=-100)
    return stacked


def labels_in(whole: dict[str, Tensor], run: Run = Run(None)) -> Tensor:
    first = 0 if KINDS[run.head].averages else 1
    return (whole["labels"][:, first:] != -100).sum()


def train(run: Run) -> Outcome | None:
    """Returns None but in the first process."""
    rank, size = (0, 1) if run.wrapping is None else (dist.get_rank(), dist.get_world_size())
    model = build(run)
    n_classes = model.config.vocab_size
    where = torch.device("cpu") if run.wrapping is None else device()
    if run.wrapping is not None and not run.wrapping.cpu_offload:
        model.to(where)
    options = {"tile_bytes": TILE_ROWS * n_classes * 4} | dict(run.options)
    report = None
    if run.patched and not run.late:
        report = apply_liger_kernel(model, **options)
    if run.patched and run.preferences:
        _install(model, options["tile_bytes"])
    learning_rate = 0.02 if run.wrapping is not None and run.wrapping.bf16 else 0.2
    spread = wrapped(model, run.wrapping, learning_rate=learning_rate, steps=run.accumulate)
    if run.patched and run.late:
        report = apply_liger_kernel(model, **options)
    assert is_patched(model) == run.patched
    outcome = Outcome()
    if report is not None:
        outcome.left_alone = [each.reason for each in report.skipped if each.kind == "fused_linear_cross_entropy"]
    share = ROWS // size
    for step in range(STEPS):
        whole = {name: each.to(where) for name, each in batch(step, run).items()}
        num_items = labels_in(whole, run)
        mine = {name: each[rank * share : (rank + 1) * share] for name, each in whole.items()}
        part = share // run.accumulate
        total = torch.zeros((), device=where)
        with ExitStack() as stack:
            profiler = None
            if step == STEPS - 1:
                profiler = stack.enter_context(torch.profiler.profile(record_shapes=True))
            for micro in range(run.accumulate):
                last = micro == run.accumulate - 1
                inputs = {name: each[micro * part : (micro + 1) * part] for name, each in mine.items()}
                with ExitStack() as syncing:
                    if not last:
                        syncing.enter_context(spread.no_sync())
                    loss = _loss(run, spread.model, inputs, num_items)
                    total += loss.detach() / size
                    spread.backward(loss * (size if run.wrapping is not None else 1), last)
            if step == 0:
                outcome.gradients = _on_cpu(spread.gradients())
            spread.step()
        if profiler is not None:
            outcome.collectives = _collectives(profiler)
            outcome.wide = wide_in(profiler, n_classes, rows=2 * TILE_ROWS, hidden_size=HIDDEN)
        if size > 1:
            dist.all_reduce(total)
        outcome.losses.append(float(total) * size)
    outcome.parameters = _on_cpu(spread.parameters())
    _evaluate(run, spread, outcome, rank, share)
    return outcome if rank == 0 else None


def _install(model: Any, tile_bytes: int) -> None:
    from liger_trainer.trl.fused_forward import HeadOptions, install

    install(
        model.get_base_model() if hasattr(model, "get_base_model") else model,
        HeadOptions(tile_bytes=tile_bytes, cache_bytes=tile_bytes),
    )


def _loss(run: Run, model: nn.Module, inputs: dict[str, Tensor], num_items: Tensor) -> Tensor:
    if not run.preferences:
        if KINDS[run.head].averages:
            return model(**inputs).loss * labels_in(inputs, run) / num_items
        return model(**inputs, num_items_in_batch=num_items).loss
    labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    if run.patched:
        log_probs = model(**inputs, fused_lm_head=True).log_probs.sum(1)
    else:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        gathered = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        log_probs = (gathered * (labels != -100)).sum(1)
    return -torch.nn.functional.logsigmoid(0.1 * (log_probs[::2] - log_probs[1::2])).sum() / (ROWS // 2)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.detach().cpu() for name, each in tensors.items()}


def _collectives(profiler: Any) -> dict[str, int]:
    names = Counter({each.key: each.count for each in profiler.key_averages() if each.key.startswith("c10d::")})
    return dict(names)


def _evaluate(run: Run, spread: Any, outcome: Outcome, rank: int, share: int) -> None:
    """An evaluation; then two whose logits are read when both are through, and a forward for training that is read."""
    where = torch.device("cpu") if run.wrapping is None else device()
    whole = {name: each.to(where) for name, each in batch(STEPS, run).items()}
    mine = {name: each[rank * share : (rank + 1) * share] for name, each in whole.items()}
    spread.model.eval()
    with torch.no_grad():
        evaluated = _loss(run, spread.model, mine, labels_in(whole, run)).clone()
        if run.wrapping is not None:
            dist.all_reduce(evaluated)
        outcome.evaluated = float(evaluated)
        if run.preferences:  # whose evaluation goes through the same forward as its training
            return
        outputs = [spread.model(**mine) for _ in range(2)]
        outcome.logits = outputs[1].logits.float().cpu().clone()
    del outputs
    spread.model.train()
    outputs = spread.model(**mine)
    assert isinstance(outputs.logits, DeferredLogits) == (run.patched and not outcome.left_alone), run
    with torch.no_grad():
        outcome.read_in_training = (outputs.logits + 0).float().cpu()
    spread.backward(outputs.loss)
    spread.step()


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, relative to the largest entry of each."""
    assert ours.keys() == theirs.keys()
    differences = (
        float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-3)) for name in theirs
    )
    return max(differences, default=0.0)
