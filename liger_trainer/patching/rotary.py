"""Replacing the rotary function that an attention module calls, for that module alone.

Attention forwards call their rotary function by its global name. Replacing the global would change every model of the
type in the process. Instead the module's class gets a forward that differs in one thing: where the code object names
the rotary function it holds a new name, under which the kernel stands in the globals of the original module. The
globals stay the dictionary that they were, since Dynamo looks them up by the module's name and would read the
original's through a copy.

Which function is a rotary one is found by calling it on random queries, keys and tables.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from .class_swap import stock_class
from .forwards import renamed_like
from .options import Options
from .probe import Call, Noise, compute_device, difference, quiet, training_dtype
from .recogniser import ClassSwap, Finding, Skip

__all__ = ["recognise"]

KIND = "rope"
PREFIX = "_liger_trainer_"

# What a rotary function may take besides q, k and the two tables.
OPTIONAL = ((), ("unsqueeze_dim",), ("position_ids", "unsqueeze_dim"))


@dataclass(frozen=True)
class Variant:
    """What a rotary function computes, and on which calls the kernel computes the same.

    Attributes:
        interleaved: whether neighbours are rotated with each other, or the halves of the head.
        unsqueeze_dim: the default place of the heads: 1 before the sequence, 2 behind it.
        half_tables: whether only the first half of the tables is read, one column a pair (GLM), or all of them.
        keep_dtype: whether the results keep the dtypes of queries and keys where the tables have another one.
        partial: whether tables narrower than the head rotate its first part.
        mixed: whether queries and tables may have different dtypes.
    """

    interleaved: bool
    unsqueeze_dim: int
    half_tables: bool = False
    keep_dtype: bool = False
    partial: bool = True
    mixed: bool = True

    def kernel(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        if self.half_tables:
            pairs = cos.shape[-1] // 2
            cos, sin = cos[..., :pairs], sin[..., :pairs]
        return kernels.rotary(
            q,
            k,
            cos,
            sin,
            interleaved=self.interleaved,
            per_pair=self.half_tables,
            keep_dtype=self.keep_dtype,
            unsqueeze_dim=unsqueeze_dim,
        )

    def __str__(self) -> str:
        return "rotary(interleaved)" if self.interleaved else "rotary"


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find the rotary functions of model's modules; see :class:`liger_trainer.patching.recogniser.Recogniser`."""
    if not options.rope:
        return
    known: dict[Any, Variant | str | None] = {}
    for path, module in model.named_modules():
        stock = stock_class(module)
        forward = stock.forward
        undecorated = inspect.unwrap(forward) if callable(forward) else forward
        if not isinstance(undecorated, types.FunctionType):
            continue
        for name, function in _called_globals(undecorated):
            signature = _signature(function)
            named_so = "rotary" in name or "rope" in name
            if signature is None or not (named_so or _takes_queries_keys_tables(signature)):
                continue
            parameters = list(module.parameters())
            where = (compute_device(parameters), training_dtype(parameters), _head_dim(module))
            key = (function, *where)
            if key not in known:
                known[key] = _identify(function, signature, *where)
            found = known[key]
            reason = found if isinstance(found, str) else _obstacle(module, forward, undecorated, name)
            if isinstance(found, Variant) and reason is None:
                make_members = functools.partial(_members, undecorated, name, function, found)
                yield ClassSwap(KIND, path, str(found), module, make_members)
            elif isinstance(found, Variant) or named_so:
                yield Skip(KIND, path, stock.__name__, f"{name}: {reason}")
            else:
                continue
            break


def _called_globals(forward: types.FunctionType) -> list[tuple[str, Any]]:
    names = dict.fromkeys(i.argval for i in dis.get_instructions(forward) if i.opname == "LOAD_GLOBAL")
    return [(name, forward.__globals__[name]) for name in names if name in forward.__globals__]


def _signature(function: Any) -> inspect.Signature | None:
    """The signature of a function, or of the stateless module that ``kernels`` makes of a decorated one."""
    if isinstance(function, nn.Module):
        function = function.forward
    elif not isinstance(function, types.FunctionType):
        return None
    return inspect.signature(function)


def _takes_queries_keys_tables(signature: inspect.Signature) -> bool:
    """Whether exactly the first four arguments must be given, and the others are known ones."""
    parameters = list(signature.parameters.values())
    return (
        [p for p in parameters if p.default is p.empty] == parameters[:4]
        and len(parameters) >= 4
        and all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
        and tuple(p.name for p in parameters[4:]) in OPTIONAL
    )


def _head_dim(module: nn.Module) -> int:
    size = getattr(module, "head_dim", None)
    return size if isinstance(size, int) and size > 0 and size % 4 == 0 else 16


def _obstacle(module: nn.Module, forward: Any, undecorated: types.FunctionType, name: str) -> str | None:
    """Why name can't be bound anew in the forward of module's class."""
    if "forward" in vars(module):
        return "its forward is set on the instance, as device hooks and kernelize do"
    if forward is not undecorated:
        return "its forward is decorated"
    uses = {i.opname for i in dis.get_instructions(forward) if i.opcode in dis.hasname and i.argval == name}
    if uses != {"LOAD_GLOBAL"}:
        return f"its forward uses the name {name} for something else as well"
    return None


def _identify(
    function: Any, signature: inspect.Signature, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Variant | str:
    """The variant that function computes; else why it is left alone."""
    if isinstance(function, nn.Module) and "forward" in vars(function):
        return "replaced by another kernel already"
    if not _takes_queries_keys_tables(signature):
        return f"takes {signature}, not (q, k, cos, sin)"
    option = signature.parameters.get("unsqueeze_dim")
    if option is not None and option.default not in (1, 2):
        return f"its default unsqueeze_dim is {option.default!r}"
    dims = (1, 2) if option is None else (option.default,)
    with quiet(device):
        for dim, half_tables, interleaved in itertools.product(dims, (False, True), (False, True)):
            variant = Variant(interleaved, dim, half_tables)

            def agrees(
                q_dtype: torch.dtype,
                table_dtype: torch.dtype,
                variant: Variant,
                width: int = head_dim,
                heads_at: int | None = None,
            ) -> bool:
                tensors = _probe(device, q_dtype, table_dtype, head_dim, width, heads_at or variant.unsqueeze_dim)
                return _agree(function, variant, tensors, heads_at)

            places = (None,) if option is None else (None, 3 - dim)
            pure = itertools.product(dict.fromkeys((dtype, torch.bfloat16)), places)
            if not all(agrees(pure_dtype, pure_dtype, variant, heads_at=place) for pure_dtype, place in pure):
                continue
            partial = agrees(dtype, dtype, variant, width=head_dim // 2)
            for keep_dtype in (False, True):
                kept = replace(variant, keep_dtype=keep_dtype, partial=partial)
                if all(
                    agrees(*mixed, kept) for mixed in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))
                ):
                    return kept
            return replace(variant, partial=partial, mixed=False)
    return "computes none of the known rotations"


def _probe(
    device: torch.device, q_dtype: torch.dtype, table_dtype: torch.dtype, head_dim: int, width: int, heads_at: int
) -> list[Tensor]:
    """Random q, k, cos and sin. Nothing relates the tables to each other, or their halves."""
    noise = Noise(device)
    q = noise.normal(2, 4, 5, head_dim, dtype=q_dtype)
    k = noise.normal(2, 2, 5, head_dim, dtype=q_dtype)
    tables = [noise.normal(2, 5, width, dtype=table_dtype) for _ in range(2)]
    heads = [t if heads_at == 1 else t.transpose(1, 2) for t in (q, k)]
    return [t.requires_grad_() for t in heads] + tables


def _agree(function: Any, variant: Variant, tensors: list[Tensor], heads_at: int | None) -> bool:
    options = {} if heads_at is None else {"unsqueeze_dim": heads_at}
    theirs = Call.of(functools.partial(function, **options), tensors)
    place = heads_at or variant.unsqueeze_dim
    ours = Call.of(functools.partial(variant.kernel, unsqueeze_dim=place), tensors)
    return difference(ours, theirs, "") is None


@functools.cache
def _bound(function: Any, variant: Variant) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel with function's signature; function itself serves the calls that the kernel does not know."""
    partial, mixed, default, serve = variant.partial, variant.mixed, variant.unsqueeze_dim, variant.kernel

    def known(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
        return (
            q.dim() == k.dim() == 4
            and cos.dim() == sin.dim() == 3
            and unsqueeze_dim in (1, 2)
            and (partial or q.shape[-1] == cos.shape[-1])
            and (mixed or q.dtype == k.dtype == cos.dtype == sin.dtype)
            and not (cos.requires_grad or sin.requires_grad)
        )

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if known(q, k, cos, sin, default):
            return serve(q, k, cos, sin, default)
        return function(q, k, cos, sin)

    def placed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = default) -> tuple[Tensor, Tensor]:
        if known(q, k, cos, sin, unsqueeze_dim):
            return serve(q, k, cos, sin, unsqueeze_dim)
        return function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    def positioned(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = default
    ) -> tuple[Tensor, Tensor]:
        if position_ids is None and known(q, k, cos, sin, unsqueeze_dim):
            return serve(q, k, cos, sin, unsqueeze_dim)
        return function(q, k, cos, sin, position_ids, unsqueeze_dim)

    target = function.forward if isinstance(function, nn.Module) else function
    optional = tuple(inspect.signature(target).parameters)[4:]
    return renamed_like((plain, placed, positioned)[OPTIONAL.index(optional)], target)


def _members(forward: types.FunctionType, name: str, function: Any, variant: Variant) -> dict[str, Any]:
    bound = _bound(function, variant)
    for suffix in itertools.count():
        new_name = f"{PREFIX}{name}" + (f"_{suffix}" if suffix else "")
        if forward.__globals__.setdefault(new_name, bound) is bound:
            return {"forward": _with_global(forward, name, new_name)}
    raise AssertionError


@functools.cache
def _with_global(forward: types.FunctionType, name: str, new_name: str) -> types.FunctionType:
    """A copy of forward, on the same globals, that reads new_name where forward reads name."""
    code = forward.__code__
    names = tuple(new_name if n == name else n for n in code.co_names)
    copied = types.FunctionType(
        code.replace(co_names=names), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copied, forward)
    del vars(copied)["__wrapped__"]  # a decorator's mark, by which others would unwrap to the original
    return copied
