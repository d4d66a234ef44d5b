"""A model's forward that hands its logits, unbuilt, to a loss: what stands behind TRL's ``fused_lm_head=True``."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trl.trainer.utils import FusedCausalLMOutput

from ..kernels import LogProbs, linear_log_probs
from ..patching.counted_labels import CountedLabels, count_labels
from ..patching.deferred_logits import DeferredLogits
from ..patching.lazy_logits import settle
from .deferred_head import HeadTensors, check_head, deferring_head, head_tensors

__all__ = ["HeadOptions", "install", "one_forward", "trl_options", "upper_bound"]

IGNORED = -100


@dataclass(frozen=True)
class HeadOptions:
    """How a model's head is to be scored; the first three are ``trl.trainer.utils.add_fused_lm_head``'s."""

    temperature: float = 1.0
    cast_lm_head_to_fp32: bool = False
    outputs: tuple[str, ...] = ("log_probs",)
    tile_bytes: int | None = None
    cache_bytes: int | None = None
    least_memory: bool = False


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


def upper_bound(counted: Tensor) -> int | None:
    """How many of labels that :func:`~..patching.counted_labels.count_labels` gave are not ignored at most."""
    return counted.upper_bound(IGNORED) if isinstance(counted, CountedLabels) else None


class _OneForward:
    """Outputs of the forwards inside :func:`one_forward`, each with the input that they are of."""

    def __init__(self, fused_too: bool) -> None:
        self.fused_too = fused_too
        self._made: list[tuple[nn.Module, Tensor, Any]] = []
        self._heads: list[Any] = []  # kept alive

    def find(self, model: nn.Module, inputs: Tensor, fused: bool) -> Any:
        if fused and not self.fused_too:
            return None
        for of, given, outputs in self._made:
            if of is model and given is inputs:
                return outputs
        return None

    def keep(self, model: nn.Module, inputs: Tensor, outputs: Any, heads: list[Any]) -> None:
        if not any(of is model and given is inputs for of, given, _ in self._made):
            self._made.append((model, inputs, outputs))
            self._heads += heads


_SHARING: list[_OneForward] = []


@contextmanager
def one_forward(fused_too: bool) -> Iterator[None]:
    """Inside, a model runs once over the same tensor of tokens, however often it is called for it.

    Its first outputs are handed out again, their logits unbuilt until they are read. TRL's code runs a model a second
    time for logits beside its fused head's log-probabilities, or for these beside logits.

    Args:
        fused_too: whether calls for a fused head's outputs are among those that are spared. Not where the same model
            with its adapters off is the reference: its log-probabilities are of the same tokens.
    """
    _SHARING.append(_OneForward(fused_too))
    try:
        yield
    finally:
        _SHARING.pop()


def _handed_out(outputs: Any) -> Any:
    """Outputs of which a loss may use up the logits: what is kept for others stays whole."""
    logits = outputs.logits
    if not isinstance(logits, DeferredLogits) or logits.cell.value is not None:
        return outputs
    fresh = copy.copy(outputs)
    fresh.logits = logits._replace(head=copy.copy(logits.head), cell=type(logits.cell)())
    return settle(fresh)


def _score(head: HeadTensors, labels: Tensor, n_labels: int | None, options: HeadOptions) -> LogProbs:
    scored = linear_log_probs(
        head.hidden,
        head.weight,
        labels,
        bias=head.bias,
        low_rank=head.low_rank,
        outputs=tuple(ours for theirs, ours in _OURS.items() if theirs in options.outputs),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=options.temperature,
        compute_dtype=torch.float32 if options.cast_lm_head_to_fp32 else head.compute_dtype,
        max_valid=n_labels,
        tile_bytes=options.tile_bytes,
        cache_bytes=options.cache_bytes,
        least_memory=options.least_memory,
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
    scored = _score(head, labels, upper_bound(counted), options)
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
        given = {name: value for name, value in given.items() if value is not None}
        plain = not fused_lm_head and logits_to is None
        tokens: Any = kwargs.get("input_ids", args[0] if args else None)
        shares = _SHARING and tokens is not None and not (plain and given) and not torch.compiler.is_compiling()
        sharing = _SHARING[-1] if shares else None
        if plain and sharing is None:
            return before(*args, **given, **kwargs)
        kwargs["use_cache"] = False
        scored_labels = labels if shift_labels is None else shift_labels
        # On its way to the host while the model runs.
        counted = None if scored_labels is None else count_labels(scored_labels, IGNORED)
        with autocast():
            outputs = None if sharing is None else sharing.find(self, tokens, fused_lm_head)
            if outputs is None:
                with deferring_head(self, options.tile_bytes) as heads:
                    outputs = original(*args, **kwargs)
                if sharing is not None:
                    sharing.keep(self, tokens, outputs, heads)
            if plain:
                return _handed_out(outputs)
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
