"""One model type against its patched self: built small, run, patched, run again, reverted, run again."""

from __future__ import annotations

import functools
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from liger_trainer.patching import apply_liger_kernel, deferred_logits, is_patched, revert

from .configs import tiny_config
from .inputs import image_batch, text_batch

__all__ = ["TASKS", "Result", "build", "compare", "error", "examine", "model_types"]

# Task -> (the mapping of types, the class that builds a model).
TASKS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "vision": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
}
RELATIVE = 1e-5
# What rounds worse than that in a model as small as these is held to the untouched model's own distance from float64.
ROUNDING = 2.0
# Gradients that are zero but for rounding, as a key projection's bias has, are held to a share of the largest.
FLOOR = 1e-3


@dataclass
class Result:
    """What the census found out about one type.

    Attributes:
        outcome: ``"passed"``, ``"not built"``, ``"wrong"`` (a patched run differs) or ``"not replaced"`` (nothing
            wrong, but the fused head did not run or no other part was replaced).
        reason: why it did not pass.
        replaced, skipped: counts by "kind|class|how or why".
        inputs: the batches that were run.
        errors: the largest relative error of each run.
        fused: calls of the fused head in one training step; materialized: how often the logits were built.
    """

    task: str
    model_type: str
    outcome: str = "passed"
    reason: str = ""
    class_name: str = ""
    replaced: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    no_images: str = ""
    fused: int = 0
    materialized: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def model_types(task: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    return list(getattr(modeling_auto, TASKS[task][0]))


def build(task: str, model_type: str) -> nn.Module:
    """A small model in fp32 with no dropout, none of whose weights has a value that a fresh model would have."""
    config = tiny_config(model_type)
    if model_type in ("musicgen", "musicgen_melody"):
        config = config.decoder
        model_class = getattr(transformers, f"{'MusicgenMelody' if 'melody' in model_type else 'Musicgen'}ForCausalLM")
        make: Callable[..., nn.Module] = model_class._from_config
    else:
        make = getattr(transformers, TASKS[task][1]).from_config
    torch.manual_seed(0)
    model = make(config, dtype=torch.float32).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for each in (model.config, *(c for c in vars(model.config).values() if hasattr(c, "use_cache"))):
        each.use_cache = False
    return model.train()


@contextmanager
def _watched() -> Iterator[Counter[str]]:
    """Count the calls of the fused head and the times that deferred logits were built after all."""
    seen: Counter[str] = Counter()
    fused, materialize = deferred_logits.linear_cross_entropy, deferred_logits.DeferredLogits.materialize

    def counted_head(*args: Any, **kwargs: Any) -> Any:
        seen["fused"] += 1
        return fused(*args, **kwargs)

    def counted_materialize(self: Any) -> Any:
        seen["materialized"] += 1
        return materialize(self)

    deferred_logits.linear_cross_entropy = counted_head
    deferred_logits.DeferredLogits.materialize = counted_materialize
    try:
        yield seen
    finally:
        deferred_logits.linear_cross_entropy = fused
        deferred_logits.DeferredLogits.materialize = materialize


def _step(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def _logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    model.eval()
    torch.manual_seed(7)
    with torch.no_grad():
        outputs = model(**batch)
        logits = outputs.logits if outputs.get("logits") is not None else outputs[1]
        logits = logits + 0
    model.train()
    return logits


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative error of the loss and the gradients, each in its norm."""
    if ours.keys() != theirs.keys():
        return float("inf")
    sizes = {name: float(t.double().norm()) for name, t in theirs.items()}
    least = FLOOR * max((size for name, size in sizes.items() if name != "loss"), default=0.0)
    worst = 0.0
    for name, b in theirs.items():
        gap = float((ours[name].double() - b.double()).norm())
        if gap == gap:
            worst = max(worst, gap / (max(sizes[name], least) or 1.0))
        elif not torch.equal(ours[name].isnan(), b.isnan()):
            return float("inf")
    return worst


def examine(task: str, model_type: str) -> Result:
    """Build, compare, patch, compare, revert, compare; never raises for what a model does."""
    result, started = Result(task, model_type), time.perf_counter()
    try:
        model = build(task, model_type)
        result.class_name = type(model).__name__
        batches = _batches(model, result)
    except Exception as exception:
        result.outcome, result.reason = "not built", _words(exception)
        return result
    try:
        compare(model, batches, result)
    except Exception as exception:
        result.outcome, result.reason = "wrong", _words(exception)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def _words(exception: Exception) -> str:
    return f"{type(exception).__name__}: {' '.join(str(exception).split())[-300:]}"


def _batches(model: nn.Module, result: Result) -> dict[str, dict[str, Any]]:
    batches, problem = {}, None
    try:
        text = text_batch(model)
        _step(model, text)
        batches["text"] = text
    except Exception as exception:
        problem = exception
    if result.task == "vision" or problem is not None:
        images, result.no_images = image_batch(model)
        if images is not None:
            batches["images"] = images
    if not batches:
        assert problem is not None
        raise problem
    result.inputs = list(batches)
    return batches


@dataclass
class _Reference:
    """What the untouched model gives on one batch, in the ways that the patched one is run."""

    step: dict[str, Tensor]
    counted: dict[str, Tensor] | None
    logits: dict[str, Tensor]
    checkpointed: dict[str, Tensor] | None
    noise: float

    @classmethod
    def of(cls, model: nn.Module, batch: dict[str, Any]) -> _Reference:
        step = _step(model, batch)
        return cls(
            step=step,
            counted=_step(model, batch | COUNT) if _counts_items(model) else None,
            logits={"logits": _logits(model, batch)},
            checkpointed=_checkpointed(model, batch),
            noise=error(_step(model, batch), step),
        )


COUNT = {"num_items_in_batch": 11}


def compare(model: nn.Module, batches: dict[str, dict[str, Any]], result: Result) -> None:
    """Run model on every batch, patch it, run it again, revert it, and write what came out into result.

    Leaves model as it was. Raises whatever the model does on a batch.
    """
    references = {name: _Reference.of(model, batch) for name, batch in batches.items()}
    before = [(type(module), *vars(module)) for module in model.modules()]
    state = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    config = model.config.to_json_string()
    exact = functools.cache(lambda: _exact(result.task, result.model_type))

    report = apply_liger_kernel(model)
    result.replaced = dict(Counter(f"{e.kind}|{e.class_name}|{e.kernel}" for e in report.replaced))
    result.skipped = dict(Counter(f"{e.kind}|{e.class_name}|{e.reason}" for e in report.skipped))

    def check(label: str, ours: Any, theirs: Any, noise: float, in_float64: Callable[[nn.Module], Any]) -> None:
        difference = error(ours, theirs)
        allowed = max(RELATIVE, 3 * noise)
        if difference > allowed and result.model_type in model_types(result.task):
            truth = in_float64(exact())
            if error(ours, truth) <= ROUNDING * error(theirs, truth):
                allowed = difference
        result.errors[label] = difference
        if not difference <= allowed:
            result.outcome, result.reason = "wrong", f"{label}: differs by {difference:.1e} (at most {allowed:.0e})"

    for name, batch in batches.items():
        theirs, double = references[name], _in_float64(batch)
        with _watched() as seen:
            ours = _step(model, batch)
        result.fused, result.materialized = max(result.fused, seen["fused"]), seen["materialized"]
        check(name, ours, theirs.step, theirs.noise, lambda m, batch=double: _step(m, batch))
        if theirs.counted is not None:
            ours = _step(model, batch | COUNT)
            check(f"{name}, counted", ours, theirs.counted, theirs.noise, lambda m, b=double: _step(m, b | COUNT))
        ours = {"logits": _logits(model, batch)}
        check(f"{name}, eval", ours, theirs.logits, theirs.noise, lambda m, b=double: {"logits": _logits(m, b)})
        if theirs.checkpointed is not None:
            noise = max(theirs.noise, error(theirs.checkpointed, theirs.step))
            ours = _checkpointed(model, batch)
            check(f"{name}, checkpointed", ours, theirs.checkpointed, noise, lambda m, b=double: _checkpointed(m, b))
    if {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} != state:
        result.outcome, result.reason = "wrong", "the state_dict changed"
    if model.config.to_json_string() != config:
        result.outcome, result.reason = "wrong", "the config changed"
    revert(model)
    if is_patched(model) or [(type(module), *vars(module)) for module in model.modules()] != before:
        result.outcome, result.reason = "wrong", "revert left something behind"
    for name, batch in batches.items():
        result.errors[f"{name}, reverted"] = difference = error(_step(model, batch), references[name].step)
        if not difference <= references[name].noise:
            result.outcome, result.reason = "wrong", f"{name}, reverted: differs by {difference:.1e} from before"
    if result.outcome == "passed" and not result.fused:
        result.outcome, result.reason = "not replaced", "the fused head did not run"
    elif result.outcome == "passed" and all("cross_entropy" in key for key in result.replaced):
        result.outcome, result.reason = "not replaced", "no part but the head was replaced"


def _exact(task: str, model_type: str) -> nn.Module:
    model = build(task, model_type).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped matrix products know no float64
    return model


def _in_float64(batch: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in batch.items()}


def _counts_items(model: nn.Module) -> bool:
    parameters = inspect.signature(type(model).forward).parameters.values()
    return any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in parameters)


def _checkpointed(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor] | None:
    """A step under gradient checkpointing; None where the model can't be checkpointed."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return None
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        return None
    try:
        return _step(model, batch)
    finally:
        model.gradient_checkpointing_disable()
