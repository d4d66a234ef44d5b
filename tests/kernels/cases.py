"""The ops with their options, one line a case, for what is promised of every op alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_trainer.kernels import (
    add_rms_norm,
    cross_entropy,
    geglu,
    jsd,
    kl_div,
    layer_norm,
    linear_cross_entropy,
    linear_jsd,
    linear_log_probs,
    rms_norm,
    rotary,
    swiglu,
)

__all__ = ["CASES", "MINIMAL", "RAGGED", "Call", "Case", "Sizes", "bits", "ids", "run", "strided"]


class Sizes(NamedTuple):
    """How large the tensors of a case are; each op takes what it has."""

    tokens: int  # of each of the batch's two sequences
    width: int  # of the hidden states, and of a head where it is even
    classes: int
    tile_rows: int = 3  # of the tiles of logits


LOW_RANK = ("low_rank_hidden", "low_rank_weight")
RANK = 3
RAGGED = Sizes(tokens=3, width=13, classes=131)
MINIMAL = Sizes(tokens=2, width=4, classes=5, tile_rows=1)


def strided(values: Tensor) -> Tensor:
    """The values as half of each row of a memory with tokens before batch; the other half must not be read."""
    if not values.dim():
        return values
    swapped = values.dim() > 2
    shape = list(values.transpose(-3, -2).shape if swapped else values.shape)
    shape[-1] *= 2
    memory = torch.full(
        shape, float("nan") if values.is_floating_point() else 2**40, dtype=values.dtype, device=values.device
    )
    view = memory[::2] if values.dim() == 1 else memory[..., : values.shape[-1]]
    view = view.transpose(-3, -2) if swapped else view
    return view.copy_(values)


class Maker:
    """Makes tensors of the device, dtype and layout that a test is about, each from the same seed everywhere."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
        self.device, self.dtype, self.layout = device, dtype, layout
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self.layout(values.to(self.device, self.dtype))

    def leaf(self, *shape: int) -> Tensor:
        return self.normal(*shape).detach().requires_grad_()

    def positive(self, *shape: int) -> Tensor:
        """In fp32 (in float64 with it), as weights of a loss are."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.1
        return self.layout(values.to(self.device, torch.promote_types(self.dtype, torch.float32)))

    def labels(self, *shape: int, classes: int, ignored: str = "some") -> Tensor:
        values = torch.randint(classes, shape, generator=self.generator)
        if ignored == "some":
            values.view(-1)[::3] = -100
        elif ignored == "all":
            values.fill_(-100)
        return self.layout(values.to(self.device))


Inputs = Callable[[Maker, Sizes], dict[str, Any]]


def _norm(weight: bool = True, bias: bool = False, residual: bool = False) -> Inputs:
    def inputs(make: Maker, sizes: Sizes) -> dict[str, Any]:
        arguments = {"x": make.leaf(2, sizes.tokens, sizes.width), "weight": make.leaf(sizes.width) if weight else None}
        if bias:
            arguments["bias"] = make.leaf(sizes.width)
        if residual:
            arguments["residual"] = make.leaf(2, sizes.tokens, sizes.width)
        return arguments

    return inputs


def _heads(per_pair: bool = False, partial: bool = False, keys: int = 1) -> Inputs:
    def inputs(make: Maker, sizes: Sizes) -> dict[str, Any]:
        head = sizes.width - sizes.width % 2
        turned = head - 2 if partial else head
        table = (1, sizes.tokens, turned // 2 if per_pair else turned)
        return {
            "q": make.leaf(2, 3, sizes.tokens, head),
            "k": make.leaf(2, keys, sizes.tokens, head),
            "cos": make.normal(*table),
            "sin": make.normal(*table),
        }

    return inputs


def _gated(make: Maker, sizes: Sizes) -> dict[str, Any]:
    return {name: make.leaf(2, sizes.tokens, sizes.width) for name in ("gate", "up")}


def _rows(sizes: Sizes, flat: bool) -> tuple[int, ...]:
    return (2 * sizes.tokens,) if flat else (2, sizes.tokens)


def _logits(class_weights: bool = False, flat: bool = False, **labels: str) -> Inputs:
    def inputs(make: Maker, sizes: Sizes) -> dict[str, Any]:
        rows = _rows(sizes, flat)
        arguments = {
            "logits": make.leaf(*rows, sizes.classes),
            "labels": make.labels(*rows, classes=sizes.classes, **labels),
        }
        return {**arguments, "weight": make.positive(sizes.classes)} if class_weights else arguments

    return inputs


def _head(
    *,
    bounded: bool = True,
    frozen: bool = False,
    bias: bool = False,
    token_weights: bool = False,
    class_weights: bool = False,
    num_items: bool = False,
    cached: bool = False,
    low_rank: bool = False,
    flat: bool = False,
    **labels: str,
) -> Inputs:
    def inputs(make: Maker, sizes: Sizes) -> dict[str, Any]:
        rows = _rows(sizes, flat)
        weight = make.leaf(sizes.classes, sizes.width)
        arguments = {
            "hidden": make.leaf(*rows, sizes.width),
            "weight": weight.detach() if frozen else weight,
            "labels": make.labels(*rows, classes=sizes.classes, **labels),
            "tile_bytes": sizes.tile_rows * sizes.classes * make.dtype.itemsize,
        }
        if cached:  # one tile
            arguments["cache_bytes"] = arguments["tile_bytes"]
        if bounded:
            arguments["max_valid"] = int((arguments["labels"] != -100).sum())
        if bias:
            arguments["bias"] = make.leaf(sizes.classes)
        if token_weights:
            arguments["token_weights"] = make.positive(*rows)
        if class_weights:
            arguments["class_weights"] = make.positive(sizes.classes)
        if num_items:
            arguments["num_items"] = torch.tensor(7, device=make.device)
        if low_rank:
            arguments["low_rank_hidden"] = make.leaf(*rows, RANK)
            arguments["low_rank_weight"] = make.leaf(sizes.classes, RANK)
        return arguments

    return inputs


def _two_heads(
    *,
    frozen: bool = False,
    biases: bool = False,
    token_weights: bool = False,
    low_rank: bool = False,
    padded: int = 0,
) -> Inputs:
    def inputs(make: Maker, sizes: Sizes) -> dict[str, Any]:
        of_student = _head(frozen=frozen, bias=biases, token_weights=token_weights, low_rank=low_rank)(make, sizes)
        own = [each for each in of_student if each in ("hidden", "weight", "bias") or each in LOW_RANK]
        arguments = {
            **{f"student_{name}": of_student.pop(name) for name in own},
            **of_student,
            "teacher_hidden": make.normal(2, sizes.tokens, sizes.width + 3),
            "teacher_weight": make.normal(sizes.classes + padded, sizes.width + 3),
        }
        arguments["tile_bytes"] *= 2
        if low_rank:
            arguments["teacher_low_rank_hidden"] = make.normal(2, sizes.tokens, RANK)
            arguments["teacher_low_rank_weight"] = make.normal(sizes.classes + padded, RANK)
        return {**arguments, "teacher_bias": make.normal(sizes.classes + padded)} if biases else arguments

    return inputs


def _two_logits(log_target: bool | None = None, labels: bool = False) -> Inputs:
    """Two models' logits; or with ``log_target``, log-probabilities and the target's, or its probabilities."""

    def inputs(make: Maker, sizes: Sizes) -> dict[str, Any]:
        shape = 2, sizes.tokens, sizes.classes
        student, teacher = make.leaf(*shape), make.normal(*shape)
        if log_target is not None:
            student = make.layout(student.detach().log_softmax(-1)).requires_grad_()
            return {
                "input": student,
                "target": make.layout(teacher.log_softmax(-1) if log_target else teacher.softmax(-1)),
            }
        arguments = {"student_logits": student, "teacher_logits": teacher}
        return {**arguments, "labels": make.labels(*shape[:-1], classes=sizes.classes)} if labels else arguments

    return inputs


@dataclass(frozen=True)
class Call:
    """An op with all its arguments."""

    function: Callable[[dict[str, Tensor | None], dict[str, int]], Any]  # of tensors and numbers
    tensors: dict[str, Tensor | None]
    numbers: dict[str, int]  # what may differ from batch to batch
    layout: Callable[[Tensor], Tensor]

    def __call__(self) -> tuple[Tensor, ...]:
        results = self.function(self.tensors, self.numbers)
        return (results,) if isinstance(results, Tensor) else tuple(each for each in results if each is not None)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor is not None and tensor.requires_grad}

    def upstream(self, results: Sequence[Tensor]) -> list[Tensor]:
        """A gradient for each of the results that want one."""
        generator = torch.Generator().manual_seed(1)
        made = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in results if y.requires_grad]
        return [self.layout(each) for each in made]


@dataclass(frozen=True)
class Case:
    """An op with one choice of its options."""

    op: Callable[..., Any]
    inputs: Inputs
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    asks_device: bool = False  # for the number of labels, which the host then waits for
    constant_factor: bool = False  # the gradient takes a factor for a constant, so differences don't show it

    @property
    def name(self) -> str:
        return self.op.__name__ + (f"-{self.label}" if self.label else "")

    def make(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        sizes: Sizes = RAGGED,
        layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
    ) -> Call:
        arguments = self.inputs(Maker(device, dtype, layout), sizes)
        constants = {name: arguments.pop(name) for name in ("tile_bytes", "cache_bytes") if name in arguments}
        numbers = {name: arguments.pop(name) for name in ("max_valid",) if name in arguments}
        op, constants = self.op, {**self.options, **constants}
        return Call(lambda tensors, numbers: op(**_paired(tensors), **numbers, **constants), arguments, numbers, layout)


def _paired(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """The two tensors of a low-rank term as the one argument that they are."""
    paired: dict[str, Any] = dict(tensors)
    for prefix in ("", "student_", "teacher_"):
        names = [f"{prefix}{name}" for name in LOW_RANK]
        if names[0] in paired:
            paired[f"{prefix}low_rank"] = tuple(paired.pop(name) for name in names)
    return paired


LOG_PROB_OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs", "top1")
EXTRA = ("token_loss", "token_accuracy", "predicted_tokens", "z_loss")

CASES = [
    Case(rms_norm, _norm(), {"casting": "llama"}, "llama"),
    Case(rms_norm, _norm(), {"casting": "gemma", "offset": 1.0}, "gemma"),
    Case(rms_norm, _norm(), {"casting": "none", "offset": 0.5}, "none"),
    Case(rms_norm, _norm(weight=False), {}, "unweighted"),
    Case(add_rms_norm, _norm(residual=True), {"casting": "llama"}, "llama"),
    Case(add_rms_norm, _norm(residual=True), {"casting": "gemma", "offset": 1.0}, "gemma"),
    Case(add_rms_norm, _norm(residual=True, weight=False), {"casting": "none"}, "none-unweighted"),
    Case(layer_norm, _norm(bias=True)),
    Case(layer_norm, _norm(weight=False), {}, "unweighted"),
    Case(rotary, _heads()),
    Case(rotary, _heads(partial=True), {"interleaved": True}, "interleaved"),
    Case(rotary, _heads(per_pair=True, partial=True), {"per_pair": True}, "per_pair"),
    Case(rotary, _heads(per_pair=True), {"interleaved": True, "per_pair": True}, "interleaved-per_pair"),
    Case(rotary, _heads(keys=0), {}, "no_keys"),
    Case(swiglu, _gated),
    Case(geglu, _gated, {"approximate": "tanh"}, "tanh"),
    Case(geglu, _gated, {"approximate": "none"}, "exact"),
    Case(cross_entropy, _logits()),
    Case(cross_entropy, _logits(ignored="all"), {}, "all_ignored"),
    Case(cross_entropy, _logits(), {"reduction": "sum", "softcap": 3.0, "logit_scale": 1.7}, "sum-softcap"),
    Case(cross_entropy, _logits(), {"reduction": "none", "z_loss": 1e-2, "outputs": EXTRA}, "none-z_loss-outputs"),
    Case(cross_entropy, _logits(class_weights=True, flat=True), {"label_smoothing": 0.1}, "class_weights-smoothing"),
    Case(linear_cross_entropy, _head()),
    Case(linear_cross_entropy, _head(bounded=False, flat=True), {}, "counting", asks_device=True),
    Case(linear_cross_entropy, _head(ignored="none"), {}, "none_ignored"),
    Case(linear_cross_entropy, _head(ignored="all"), {}, "all_ignored"),
    Case(linear_cross_entropy, _head(frozen=True), {}, "frozen"),
    Case(linear_cross_entropy, _head(bias=True, num_items=True), {}, "bias-num_items"),
    Case(
        linear_cross_entropy,
        _head(bias=True),
        {"reduction": "sum", "softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3},
        "sum-softcap-bias",
    ),
    Case(
        linear_cross_entropy,
        _head(bias=True, token_weights=True),
        {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-2, "outputs": EXTRA},
        "none-bias-token_weights-outputs",
    ),
    Case(linear_cross_entropy, _head(frozen=True), {"reduction": "none"}, "none-frozen"),
    Case(
        linear_cross_entropy,
        _head(token_weights=True, class_weights=True, flat=True),
        {"label_smoothing": 0.2},
        "token_weights-class_weights-smoothing",
    ),
    Case(linear_cross_entropy, _head(), {"token_scaling": True}, "token_scaling", constant_factor=True),
    Case(linear_cross_entropy, _head(low_rank=True, frozen=True), {}, "low_rank-frozen"),
    Case(linear_cross_entropy, _head(low_rank=True, bias=True), {"reduction": "none"}, "none-low_rank-bias"),
    Case(linear_log_probs, _head(cached=True)),
    Case(linear_log_probs, _head(ignored="none"), {}, "all_cached"),
    Case(linear_log_probs, _head(ignored="all"), {}, "all_ignored"),
    Case(
        linear_log_probs, _head(bounded=False, flat=True, bias=True), {"cache_bytes": 0}, "counting", asks_device=True
    ),
    Case(linear_log_probs, _head(frozen=True), {}, "frozen"),
    Case(linear_log_probs, _head(bias=True), {"least_memory": True, "outputs": LOG_PROB_OUTPUTS}, "least_memory"),
    Case(
        linear_log_probs,
        _head(cached=True, bias=True),
        {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3, "outputs": LOG_PROB_OUTPUTS},
        "outputs-softcap-bias",
    ),
    Case(linear_log_probs, _head(frozen=True), {"outputs": ("entropy", "mean_logits")}, "outputs-frozen"),
    Case(linear_log_probs, _head(low_rank=True, frozen=True, cached=True), {}, "low_rank-frozen"),
    Case(
        linear_log_probs,
        _head(low_rank=True, bias=True),
        {"least_memory": True, "outputs": ("entropy",)},
        "low_rank-least_memory",
    ),
    Case(linear_jsd, _two_heads(padded=6)),
    Case(linear_jsd, _two_heads(low_rank=True, frozen=True, padded=6), {}, "low_rank-frozen"),
    Case(linear_jsd, _two_heads(biases=True), {"beta": 0, "student_softcap": 3.0, "teacher_softcap": 2.0}, "forward"),
    Case(
        linear_jsd,
        _two_heads(token_weights=True),
        {"beta": 1, "temperature": 1.7, "outputs": ("student_entropy",)},
        "reverse-token_weights-outputs",
    ),
    Case(linear_jsd, _two_heads(frozen=True), {"reduction": "sum"}, "sum-frozen"),
    Case(linear_jsd, _two_heads(token_weights=True), {"beta": 0.2, "reduction": "none"}, "none-token_weights"),
    Case(linear_jsd, _two_heads(frozen=True), {"reduction": "none"}, "none-frozen"),
    Case(jsd, _two_logits(labels=True)),
    Case(jsd, _two_logits(), {"beta": 0, "temperature": 0.7, "reduction": "sum"}, "forward-sum"),
    Case(jsd, _two_logits(labels=True), {"beta": 1, "reduction": "none"}, "none-reverse"),
    Case(kl_div, _two_logits(log_target=False), {"reduction": "batchmean"}, "batchmean"),
    Case(kl_div, _two_logits(log_target=True), {"log_target": True}, "mean-log_target"),
]


def ids(case: Case) -> str:
    return case.name


def run(call: Call, upstream: Sequence[Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Everything that comes out of a forward and a backward, by name; ``kwargs`` go to :func:`torch.autograd.grad`."""
    results = call()
    wanted = [each for each in results if each.requires_grad]
    gradients = torch.autograd.grad(
        wanted, list(call.leaves.values()), call.upstream(results) if upstream is None else upstream, **kwargs
    )
    return {
        **{f"result {i}": each.detach() for i, each in enumerate(results)},
        **{f"gradient of {name}": each for name, each in zip(call.leaves, gradients, strict=True)},
    }


_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """x's bits as integers: unlike its numbers they tell 0 from -0, and one NaN is as good as another."""
    x = x.detach()
    if not x.is_floating_point():
        return x
    x = x.masked_fill(x.isnan(), float("nan")).contiguous()
    return x.view(_AS_INTEGERS[x.element_size()])
