"""Recognising RMS norms and layer norms by what they compute.

A norm is a module without children whose parameters are at most a ``weight`` and a ``bias`` vector. It is run with
random parameters and compared, bit for bit in bf16, with the formulas that the kernels know:

======= ======== =================== ==================================================
formula weight   cast to input dtype example
======= ======== =================== ==================================================
RMS     w        before the weight   Llama, Mistral, Qwen
RMS     w        after the weight    OLMo 2
RMS     1 + w    after the weight    Gemma
RMS     w        after the weight    ``torch.nn.RMSNorm``, which autocast runs in fp32
RMS     none     the root by itself  DeepSeek-V4
layer   w, 1 + w after the weight    ``torch.nn.LayerNorm``, Cohere, Nemotron
======= ======== =================== ==================================================

In half precision the places of the casts show, in fp32 they do not. The random parameters show an offset that fresh
weights of one or zero would hide, and stand in for weights that are on the meta device or sharded.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import kernels
from .class_swap import stock_class
from .forwards import renamed_like, takes_one_input
from .memory import Trial, on_meta
from .options import Options
from .probe import (
    Call,
    Noise,
    compute_device,
    difference,
    fingerprint,
    kernels_in,
    nearly_bitwise,
    probe_dtypes,
    quiet,
    shadow,
    training_dtype,
)
from .recogniser import ClassSwap, Finding, Skip
from .recompute import rebuildable
from .residual import layers
from .residual_forward import ADD, FORK
from .sharding import whole_shape

__all__ = ["recognise"]

# An eps that no model has: set on a norm's attribute, it shows whether the forward reads that attribute.
MARKED_EPS = 0.0171

Casting = Literal["llama", "gemma", "none"]


@dataclass(frozen=True)
class Formula:
    """One way to normalise a vector.

    Attributes:
        kind: ``"rms_norm"`` or ``"layer_norm"``.
        offset: added to the weight.
        casting: where the result is cast to the input's dtype, as in :func:`liger_trainer.kernels.rms_norm`: before
            the weight (``"llama"``) or after it (``"gemma"``, ``"none"``, which differ under autocast).
        rounds_root: whether the reciprocal root is cast by itself, before it meets the input. The kernel rounds less.
    """

    kind: Literal["rms_norm", "layer_norm"]
    offset: float
    casting: Casting
    rounds_root: bool = False

    def eager(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """The formula in torch operations, rounding where a model written by hand rounds."""
        h = x.float()
        if self.kind == "layer_norm":
            scale = None if weight is None else (weight + self.offset).float()
            shift = None if bias is None else bias.float()
            return nn.functional.layer_norm(h, h.shape[-1:], scale, shift, eps).to(x.dtype)
        root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        h = x * root.to(x.dtype) if self.rounds_root else h * root
        if self.casting == "llama":
            h = h.to(x.dtype)
            return h if weight is None else h * (self.offset + weight)
        return (h if weight is None else h * (self.offset + weight.float())).to(x.dtype)

    def __str__(self) -> str:
        weight = ", weight + 1" if self.offset else ""
        return f"{self.kind}({self.casting}{weight})" if self.kind == "rms_norm" else f"{self.kind}{weight}"


FORMULAS = (
    *(Formula("rms_norm", offset, casting) for offset in (0.0, 1.0) for casting in ("llama", "gemma", "none")),
    Formula("rms_norm", 0.0, "llama", rounds_root=True),
    *(Formula("layer_norm", offset, "none") for offset in (0.0, 1.0)),
)


@dataclass(frozen=True)
class Eps:
    """Where a norm takes its eps from: an attribute, or a constant in its code.

    An attribute that is None stands for the machine epsilon of a dtype, as in ``torch.nn.RMSNorm``: the input's, or
    the one that half-precision inputs are computed in.
    """

    attribute: str | None
    constant: float = 0.0
    computed_in_float: bool = False

    def of(self, module: Any, x: Tensor) -> float:
        value = self.constant if self.attribute is None else getattr(module, self.attribute)
        if value is None:
            dtype = torch.float32 if self.computed_in_float and x.dtype.itemsize == 2 else x.dtype
            return torch.finfo(dtype).eps
        return float(value)


@dataclass(frozen=True)
class Recognised:
    """How a norm is computed, and where its stock forward must serve because the kernel rounds or casts otherwise."""

    formula: Formula
    eps: Eps
    weighted: bool
    biased: bool
    not_mixed: bool = False
    not_autocast: bool = False


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find the norms of model; see :class:`liger_trainer.patching.recogniser.Recogniser`."""
    if not (options.rms_norm or options.layer_norm):
        return
    known: dict[Any, Recognised | str | None] = {}
    joinable: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not _may_be_norm(module):
            if _is_gated_norm(module) and options.rms_norm:
                yield Skip("rms_norm", path, stock_class(module).__name__, "takes more than one input")
            continue
        key = fingerprint(module)
        if key not in known:
            known[key] = _identify(module, options.check)
        found = known[key]
        name = stock_class(module).__name__
        if isinstance(found, Recognised):
            kind = found.formula.kind
            if getattr(options, kind):
                members = functools.partial(_members, stock_class(module), found)
                checked = probe_dtypes(list(module.parameters(recurse=False))) if options.check else ()
                trial = functools.partial(_trial, model, path, module, found)
                verify = functools.partial(_verify, module, found)
                yield ClassSwap(kind, path, str(found.formula), module, members, checked, trial, verify)
                if kind == "rms_norm":
                    joinable[path] = key
        elif found is not None:
            kind = "layer_norm" if "layernorm" in name.lower() and "bias" in module._parameters else "rms_norm"
            if getattr(options, kind):
                yield Skip(kind, path, name, found)
    if options.fused_add_rms_norm:

        def verify_joined(path: str) -> str | None:
            return _verify_joined(model.get_submodule(path), known[joinable[path]])

        yield from layers(model, joinable, verify_joined, options.check)


def _is_gated_norm(module: nn.Module) -> bool:
    """Whether module calls itself a norm, has a weight, and takes something beside what it normalises."""
    stock = stock_class(module)
    weighted = len(getattr(module._parameters.get("weight"), "shape", ())) == 1
    return weighted and "norm" in stock.__name__.lower() and not module._modules and not takes_one_input(stock.forward)


def _may_be_norm(module: nn.Module) -> bool:
    if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    if module._modules or set(parameters) - {"weight", "bias"} or any(True for _ in module.buffers(recurse=False)):
        return False
    if "bias" in parameters and "weight" not in parameters:
        return False
    if any(p.dim() != 1 for p in parameters.values()) or len({p.shape for p in parameters.values()}) > 1:
        return False
    return takes_one_input(stock_class(module).forward) and bool(_eps_candidates(module))


def _eps_candidates(module: nn.Module) -> list[Eps]:
    attributes = [
        Eps(name)
        for name, value in vars(module).items()
        if isinstance(value, float) or (value is None and "eps" in name.lower())
    ]
    constants = {
        constant
        for base in stock_class(module).__mro__
        if base not in (nn.Module, object)
        for function in vars(base).values()
        if isinstance(function, types.FunctionType)
        for constant in function.__code__.co_consts
        if isinstance(constant, float) and 0 < constant < 1e-2
    }
    return attributes + [Eps(None, constant) for constant in sorted(constants)]


def _identify(module: nn.Module, check: bool) -> Recognised | str | None:
    """How module normalises; else why it is left alone; None where nothing says that it is a norm.

    Without check, the stock forward keeps the calls that could show a difference: of mixed dtypes, and under autocast.
    """
    looks_like_one = "norm" in stock_class(module).__name__.lower()
    if "forward" in vars(module):
        return "its forward is set on the instance, as device hooks and kernelize do" if looks_like_one else None
    parameters = list(module.parameters(recurse=False))
    with quiet(compute_device(parameters)):
        found = _match(module)
        if isinstance(found, str):
            return found if looks_like_one else None
        if not check:
            return replace(found[0], not_mixed=found[0].weighted, not_autocast=True)
        checked = [_checked(module, candidate) for candidate in found]
    # Several formulas may agree outside of autocast: the best is the one whose kernel serves in most cases.
    usable = [candidate for candidate in checked if isinstance(candidate, Recognised)]
    return min(usable, key=lambda r: r.not_mixed + r.not_autocast) if usable else checked[0]


class _Probe:
    """A norm with random parameters in a dtype of choice."""

    def __init__(self, module: nn.Module, weight_dtype: torch.dtype, **attributes: Any) -> None:
        parameters = dict(module.named_parameters(recurse=False))
        self.device = compute_device(list(parameters.values()))
        self.noise = Noise(self.device)
        self.size = _size(module, parameters)
        self.norm = shadow(module)
        vars(self.norm).update(attributes)
        for name in parameters:
            drawn = self.noise.normal(self.size, dtype=weight_dtype, scale=1.5, shift=0.3)
            self.norm.register_parameter(name, nn.Parameter(drawn))
        self.weights = list(self.norm.parameters())

    def input(self, *leading: int, dtype: torch.dtype) -> Tensor:
        return self.noise.rows(*leading, self.size, dtype=dtype).requires_grad_()


def _names(module: nn.Module, function: str) -> bool:
    """Whether module's forward calls torch's own function. Autocast runs that one in fp32 on some devices, and leaves
    a norm written by hand alone: a difference that a probe on the CPU can't see."""
    return function in stock_class(module).forward.__code__.co_names


def _size(module: nn.Module, parameters: dict[str, nn.Parameter]) -> int:
    for parameter in parameters.values():
        width = whole_shape(parameter)[0]
        if width:
            return width
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if isinstance(shape, tuple | list | torch.Size) and shape else 96


def _match(module: nn.Module) -> list[Recognised] | str:
    """The formulas that give module's bf16 output bit for bit, for parameters and an eps of our own."""
    named = dict(module.named_parameters(recurse=False))
    for eps in _eps_candidates(module):
        marked = {} if eps.attribute is None else {eps.attribute: MARKED_EPS}
        probe = _Probe(module, torch.bfloat16, **marked)
        x = probe.input(2, 5, dtype=torch.bfloat16)
        theirs = {}
        for training in (True, False):
            probe.norm.training = training
            theirs[training] = call = Call.of(probe.norm.forward, [x])
            if isinstance(call, str):
                return f"its forward {call}, on a probe"
        weight, bias = getattr(probe.norm, "weight", None), getattr(probe.norm, "bias", None)
        value = eps.of(probe.norm, x)
        found, calls_torch = [], _names(module, "rms_norm")
        for formula in FORMULAS:
            if formula.kind == "rms_norm" and (bias is not None or (formula.casting == "none") != calls_torch):
                continue
            eager = functools.partial(formula.eager, weight=weight, bias=bias, eps=value)
            ours = Call.of(eager, [x])
            if all(nearly_bitwise(ours, call) for call in theirs.values()):
                found.append(Recognised(formula, eps, weighted="weight" in named, biased="bias" in named))
        if found:
            return found
    return "computes none of the known norm formulas"


def _checked(module: nn.Module, found: Recognised) -> Recognised | str:
    """found, with the cases in which the kernel must not serve; or the reason for which it never may."""
    parameters = list(module.parameters(recurse=False))
    pure = [(dtype, dtype) for dtype in probe_dtypes(parameters)]
    rules = [found.eps]
    if found.eps.attribute is not None and getattr(module, found.eps.attribute) is None:
        rules.append(replace(found.eps, computed_in_float=True))
    reasons = []
    for candidate in (replace(found, eps=eps) for eps in rules):
        reason = next(filter(None, (_disagreement(module, candidate, *dtypes) for dtypes in pure)), None)
        if reason is None:
            break
        reasons.append(reason)
    else:
        return reasons[0]
    mixed = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)] if found.weighted else []
    not_mixed = any(_disagreement(module, candidate, *dtypes) for dtypes in mixed)
    autocast = pure if not_mixed else pure + mixed
    by_hand = found.formula.kind == "layer_norm" and not _names(module, "layer_norm")
    not_autocast = by_hand or any(_disagreement(module, candidate, *dtypes, autocast=True) for dtypes in autocast)
    return replace(candidate, not_mixed=not_mixed, not_autocast=not_autocast)


def _verify(module: nn.Module, found: Recognised) -> str | None:
    parameters = list(module.parameters(recurse=False))
    with quiet(compute_device(parameters)):
        each = (_disagreement(module, found, dtype, dtype) for dtype in probe_dtypes(parameters))
        return next(filter(None, each), None)


def _disagreement(
    module: nn.Module, found: Recognised, x_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool = False
) -> str | None:
    where = f"in {x_dtype}".replace("torch.", "")
    forward = _forward(found)
    for leading in ((2, 5), (2, 3, 5)):
        probe = _Probe(module, weight_dtype)
        x = probe.input(*leading, dtype=x_dtype)
        with torch.autocast(probe.device.type, torch.bfloat16, enabled=autocast):
            with kernels_in(weight_dtype, training_dtype(list(module.parameters(recurse=False)))):
                ours = Call.of(functools.partial(forward, probe.norm), [x], probe.weights)
            theirs = Call.of(probe.norm.forward, [x], probe.weights)
        reason = difference(ours, theirs, where)
        if reason is not None:
            return reason
    return None


def _verify_joined(module: nn.Module, found: Any) -> str | None:
    """How the kernels that join a norm with the residual connection differ from the two by themselves, if they do."""
    parameters = list(module.parameters(recurse=False))
    add, fork = _joined(found)
    with quiet(compute_device(parameters)):
        for dtype in probe_dtypes(parameters):
            probe, where = _Probe(module, dtype), f"in {dtype}".replace("torch.", "")
            norm, a, b = probe.norm, probe.input(2, 5, dtype=dtype), probe.input(2, 5, dtype=dtype)
            pairs: list[tuple[Any, Any, list[Tensor]]] = [
                (add, lambda norm, a, b: (norm.forward(a + b), a + b), [a, b]),
                (fork, lambda norm, x: (norm.forward(x), x), [a]),
            ]
            for kernel, original, inputs in pairs:
                with kernels_in(dtype, training_dtype(parameters)):
                    ours = Call.of(functools.partial(kernel, norm), inputs, probe.weights)
                theirs = Call.of(functools.partial(original, norm), inputs, probe.weights)
                reason = difference(ours, theirs, where)
                if reason is not None:
                    return reason
    return None


def _owned(y: Tensor) -> Tensor:
    """y as no view, so that a model may change it in place: autograd forbids that of a view made inside a function."""
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    return torch.ops.aten._unsafe_view(y, y.shape)


@functools.cache
def _forward(found: Recognised) -> Callable[[Any, Tensor], Tensor]:
    formula, eps, offset = found.formula, found.eps, found.formula.offset

    if formula.kind == "rms_norm":

        def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
            return kernels.rms_norm(x, weight, eps, offset=offset, casting=formula.casting)

        def normalise(self: Any, x: Tensor, eps: float) -> Tensor:
            weight = self.weight if found.weighted else None
            return rebuildable(_owned(rms_norm(x, weight, eps)), rms_norm, x, weight, eps, norm=True)
    else:

        def normalise(self: Any, x: Tensor, eps: float) -> Tensor:
            weight = self.weight if found.weighted else None
            if weight is not None and offset:
                weight = weight + offset
            bias = self.bias if found.biased else None
            y = _owned(kernels.layer_norm(x, weight, bias, eps))
            return rebuildable(y, kernels.layer_norm, x, weight, bias, eps, norm=True)

    if eps.attribute is None:
        constant = eps.constant

        def forward(self: Any, x: Tensor) -> Tensor:
            return normalise(self, x, constant)
    else:
        attribute = eps.attribute

        def forward(self: Any, x: Tensor) -> Tensor:
            value = getattr(self, attribute)
            return normalise(self, x, value if value is not None else eps.of(self, x))

    return forward


@functools.cache
def _joined(found: Recognised) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The members of :mod:`.residual_forward`: a sum and its norm, and a norm beside what it is of."""
    formula, eps = found.formula, found.eps

    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return kernels.rms_norm(x, weight, eps, offset=formula.offset, casting=formula.casting)

    def serves(self: Any, a: Tensor, b: Tensor) -> bool:
        if found.not_autocast and torch.is_autocast_enabled(a.device.type):
            return False
        if found.not_mixed and not a.dtype == b.dtype == self.weight.dtype:
            return False
        # An eps that is None depends on the dtype, which is the sum's.
        return a.dtype == b.dtype or eps.attribute is None or getattr(self, eps.attribute) is not None

    def add(self: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if not serves(self, a, b):
            total = a + b
            return self.forward(total), total
        weight, value = self.weight if found.weighted else None, eps.of(self, a)
        y, total = kernels.add_rms_norm(a, b, weight, value, offset=formula.offset, casting=formula.casting)
        return rebuildable(_owned(y), rms_norm, total, weight, value, norm=True), total

    def fork(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if not serves(self, x, x):
            return self.forward(x), x
        weight, value = self.weight if found.weighted else None, eps.of(self, x)
        y, same = kernels.rms_norm_and_residual(x, weight, value, offset=formula.offset, casting=formula.casting)
        return rebuildable(_owned(y), rms_norm, x, weight, value, norm=True), same

    return add, fork


@functools.cache
def _members(stock: Any, found: Recognised) -> dict[str, Any]:
    if found.formula.kind != "rms_norm":
        return _forward_member(stock, found)
    return {**_forward_member(stock, found), **dict(zip((ADD, FORK), _joined(found), strict=True))}


def _forward_member(stock: Any, found: Recognised) -> dict[str, Any]:
    original, serve = stock.forward, _forward(found)
    if not (found.not_mixed or found.not_autocast):
        return {"forward": renamed_like(serve, original)}
    not_mixed, not_autocast = found.not_mixed, found.not_autocast

    def forward(self: Any, x: Tensor) -> Tensor:
        if (not_mixed and x.dtype != self.weight.dtype) or (not_autocast and torch.is_autocast_enabled(x.device.type)):
            return original(self, x)
        return serve(self, x)

    return {"forward": renamed_like(forward, original)}


def _trial(model: nn.Module, path: str, module: nn.Module, found: Recognised, batch: int, length: int) -> Trial:
    parameters = dict(module.named_parameters(recurse=False))
    size = _size(module, parameters)
    norm = on_meta(shadow(module), module)
    x = torch.empty(
        batch, length, _vectors_a_token(model, path, size), size, dtype=training_dtype([*parameters.values()]),
        device="meta", requires_grad=True,
    )  # fmt: skip
    return Trial(norm.forward, functools.partial(_forward(found), norm), [x])


def _vectors_a_token(model: nn.Module, path: str, size: int) -> int:
    """How many vectors of size a token has: the heads, for a norm of queries or keys, else one."""
    parent_path, _, name = path.rpartition(".")
    for child_name, child in model.get_submodule(parent_path).named_children():
        width = getattr(child, "out_features", None)
        if child_name[:2] == name[:2] and name[:2] in ("q_", "k_") and isinstance(width, int) and width % size == 0:
            return width // size
    return 1
