"""A model's forward that hands its logits, unbuilt, to a loss: what stands behind TRL's ``fused_lm_head=True``."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trl.trainer.utils import FusedCausalLMOutput

from ..kernels import LogProbs, linear_log_probs
from ..patching.counted_labels import CountedLabels, count_labels
from .deferred_head import HeadTensors, check_head, deferring_head, head_tensors

__all__ = ["HeadOptions", "install", "trl_options"]

IGNORED = -100


@dataclass(frozen=True)
class HeadOptions:
    """How a model's head is to be scored; the first three are ``trl.trainer.utils.add_fused_lm_head``'s."""

    temperature: float = 1.0
    cast_lm_head_to_fp32: bool = False
    outputs: tuple[str, ...] = ("log_probs",)
    tile_bytes: int | None = None
    cache_bytes: int | None = None


# TRL's names of what the kernel calls otherwise.
_OURS = {"entropy": "entropy", "mean_logits": "mean_logits", "log_sum_sq_probs": "log_sum_sq_probs", "is_top1": "top1"}


def _find_trl_forward(forward: Any, depth: int = 6) -> Any:
    """The function that ``add_fused_lm_head`` made, behind whatever accelerate has wrapped around it; else None."""
    function = getattr(forward, "__func__", forward)
    code = getattr(function, "__code__", None)
    if code is not None and code.co_name == "_fused_forward" and "outputs" in code.co_freevars:
        return function
    if depth:
        inside = [getattr(function, name, None) for name in ("__wrapped__", "model_forward")]
        inside += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        for each in inside:
            if callable(each) and not isinstance(each, (nn.Module, type)):
                found = _find_trl_forward(each, depth - 1)
                if found is not None:
                    return found
    return None


def trl_options(model: nn.Module) -> tuple[Callable[..., Any], HeadOptions] | None:
    """The forward that ``model`` had before TRL gave it a fused head, and that head's options; None without one."""
    function = _find_trl_forward(vars(model).get("forward"))
    if function is None:
        return None
    values = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    options = HeadOptions(values["temperature"], values["cast_lm_head_to_fp32"], tuple(values["outputs"]))
    return values["original_forward"], options


def _score(head: HeadTensors, labels: Tensor, n_labels: int | None, options: HeadOptions) -> LogProbs:
    scored = linear_log_probs(
        head.hidden,
        head.weight,
        labels,
        bias=head.bias,
        outputs=tuple(ours for theirs, ours in _OURS.items() if theirs in options.outputs),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=options.temperature,
        compute_dtype=torch.float32 if options.cast_lm_head_to_fp32 else head.compute_dtype,
        max_valid=n_labels,
        tile_bytes=options.tile_bytes,
        cache_bytes=options.cache_bytes,
    )
    return LogProbs(scored) if isinstance(scored, Tensor) else scored


def _fused_output(
    outputs: Any,
    head: HeadTensors,
    labels: Tensor,  # (B, T)
    counted: Tensor,  # (B, T)
    *,
    shifted: bool,
    num_items: Tensor | int | None,
    router_coefficient: float,
    options: HeadOptions,
) -> FusedCausalLMOutput:
    labels = labels.to(head.hidden.device)
    if not shifted:  # the last position predicts nothing; the hidden states stay where they are
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    n_labels = counted.upper_bound(IGNORED) if isinstance(counted, CountedLabels) else None
    scored = _score(head, labels, n_labels, options)
    end = labels.shape[1] if shifted else -1
    mask = (labels != IGNORED)[:, :end]
    log_probs = scored.log_probs[:, :end]
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is not None:
        loss = loss + router_coefficient * aux_loss.to(loss.device)
    values = {theirs: getattr(scored, ours) for theirs, ours in _OURS.items()}
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=log_probs,
        label_mask=mask,
        aux_loss=aux_loss,
        **{name: None if value is None else value[:, :end] for name, value in values.items()},
    )


def install(
    model: nn.Module,
    options: HeadOptions,
    original: Callable[..., Any] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Give ``model`` a forward that can do without its logits, before or after it was prepared for training.

    Beyond what it takes already, it takes

    - ``fused_lm_head=True`` with ``labels`` or ``shift_labels``: returns TRL's ``FusedCausalLMOutput``;
    - ``logits_to=f``: returns ``f(outputs, head)``, the model's own outputs and the :class:`HeadTensors` whose product
      their logits would be.

    Args:
        model: a causal language model of transformers, not a wrapper of one.
        options: of its head.
        original: its own forward; None takes the one that it has.
        autocast: makes the context of a forward that accelerate's wrapping of the old forward does not reach.

    Raises:
        ValueError: where the head can't be deferred.
    """
    check_head(model)
    before = model.forward
    original = before if original is None else original
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]

    @functools.wraps(type(model).forward)  # `generate` looks at its signature
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        logits_to: Callable[[Any, HeadTensors], Any] | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head and logits_to is None:
            return before(*args, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        kwargs["use_cache"] = False
        scored_labels = labels if shift_labels is None else shift_labels
        # On its way to the host while the model runs.
        counted = None if scored_labels is None else count_labels(scored_labels, IGNORED)
        with autocast():
            with deferring_head(self, options.tile_bytes):
                outputs = original(*args, **kwargs)
            head = head_tensors(outputs.logits, self)
            if logits_to is not None:
                return logits_to(outputs, head)
            if scored_labels is None:
                raise ValueError("fused_lm_head=True needs labels or shift_labels, got neither")
            assert counted is not None
            return _fused_output(
                outputs,
                head,
                scored_labels,
                counted,
                shifted=shift_labels is not None,
                num_items=num_items_in_batch,
                router_coefficient=getattr(config, "router_aux_loss_coef", 0.0),
                options=options,
            )

    model.forward = types.MethodType(forward, model)
