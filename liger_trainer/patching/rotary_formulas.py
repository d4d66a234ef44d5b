"""The rotations that the kernel computes, and finding out which of them a function is.

======================= ========================================== ===========================================
what a head looks like  what becomes of it                         example
======================= ========================================== ===========================================
halves                  element i turns with i + R / 2             Llama, Qwen, Gemma, Phi-3 (the first part)
neighbours              element 2 i turns with 2 i + 1             Cohere, GLM, ERNIE 4.5
neighbours              the same, then the halves are put together DeepSeek-V3, Mistral 4
neighbours, complex     pairs are multiplied by complex numbers    Llama 4, DeepSeek-V2
======================= ========================================== ===========================================

Tables have a column an element, a column a pair of which there are twice as many as needed (GLM), or just as many
(gpt-oss); nanochat turns the other way. Random tables, whose halves have nothing to do with each other, show what is
read of them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import kernels
from .forwards import renamed_like
from .probe import Call, Noise, difference, kernels_in, quiet

__all__ = ["ComplexRotation", "OneAtATime", "Rotation", "bind", "identify", "signature_of", "takes_heads_and_tables"]

# What a rotary function may take besides q, k and the two tables.
OPTIONAL = ((), ("unsqueeze_dim",), ("position_ids", "unsqueeze_dim"))


@dataclass(frozen=True)
class Rotation:
    """What a rotary function of q, k, cos and sin computes, and on which calls the kernel computes the same.

    Attributes:
        layout: ``"halves"`` or ``"neighbours"``, whichever turn with each other, or ``"split"``: neighbours turn, and
            the result has the first ones of all pairs before the second ones.
        tables: ``"full"``, a column an element; ``"half"``, the same number of columns of which the first half is
            read, one a pair; ``"pairs"``, a column a pair.
        unsqueeze_dim: the default place of the heads: 1 before the sequence, 2 behind it.
        reverse: whether it turns the other way.
        keep_dtype: whether the results keep the dtypes of queries and keys where the tables have another one.
        partial: whether tables narrower than the head rotate its first part.
        mixed: whether queries and tables may have different dtypes.
        tail: whether tables narrower than the head rotate its last part (DeepSeek-V4).
    """

    layout: Literal["halves", "neighbours", "split"]
    tables: Literal["full", "half", "pairs"]
    unsqueeze_dim: int
    reverse: bool = False
    keep_dtype: bool = False
    partial: bool = True
    mixed: bool = True
    tail: bool = False

    def kernel(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        if self.tables == "half":
            pairs = cos.shape[-1] // 2
            cos, sin = cos[..., :pairs], sin[..., :pairs]
        if self.reverse:
            sin = -sin
        if self.layout == "split":
            q, k = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
        return kernels.rotary(
            q,
            k,
            cos,
            sin,
            interleaved=self.layout == "neighbours",
            per_pair=self.tables != "full",
            keep_dtype=self.keep_dtype,
            unsqueeze_dim=unsqueeze_dim,
        )

    def knows(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
        return (
            q.dim() == k.dim() == 4
            and cos.dim() == sin.dim() == 3
            and unsqueeze_dim in (1, 2)
            and (self.partial or self.tail or q.shape[-1] == self.width(cos))
            and (self.mixed or q.dtype == k.dtype == cos.dtype == sin.dtype)
            and not (cos.requires_grad or sin.requires_grad)
        )

    def width(self, cos: Tensor) -> int:
        """How many elements of a head turn."""
        return 2 * cos.shape[-1] if self.tables == "pairs" else cos.shape[-1]

    def __str__(self) -> str:
        layout = {"halves": "", "neighbours": "interleaved", "split": "interleaved, split"}[self.layout]
        words = ", ".join(filter(None, (layout, "reversed" if self.reverse else "")))
        return f"rotary({words})" if words else "rotary"


class OneAtATime(Rotation):
    """The same of a function of x, cos, sin and the place of the heads, called for queries and for keys (Gemma 4)."""

    def one(self, x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> Tensor:
        still = x.shape[-1] - self.width(cos) if self.tail else 0
        turned = x[..., still:]
        no_keys = turned.detach().narrow(unsqueeze_dim, 0, 0)
        turned = super().kernel(turned, no_keys, cos, sin, unsqueeze_dim)[0]
        return torch.cat([x[..., :still], turned], dim=-1) if still else turned

    def kernel(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        return self.one(q, cos, sin, unsqueeze_dim), self.one(k, cos, sin, unsqueeze_dim)


@dataclass(frozen=True)
class ComplexRotation:
    """A rotary function of q, k and a table of complex numbers of modulus one, one a pair of neighbours.

    Attributes:
        unsqueeze_dim: the place of the heads, as above.
        batched: whether the table may have a row of its own for each sequence of the batch.
    """

    unsqueeze_dim: int
    batched: bool = True

    def kernel(self, q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        table = table.reshape(-1, q.shape[3 - self.unsqueeze_dim], table.shape[-1])
        return kernels.rotary(
            q,
            k,
            table.real,
            table.imag,
            interleaved=True,
            per_pair=True,
            keep_dtype=True,
            unsqueeze_dim=self.unsqueeze_dim,
        )

    def knows(self, q: Tensor, k: Tensor, table: Tensor) -> bool:
        rows = q.shape[3 - self.unsqueeze_dim] if q.dim() == 4 else 0
        return (
            q.dim() == k.dim() == 4
            and table.is_complex()
            and 2 * table.shape[-1] == q.shape[-1]
            and table.numel() in {rows * table.shape[-1], q.shape[0] * rows * table.shape[-1] if self.batched else -1}
            and not table.requires_grad
        )

    def __str__(self) -> str:
        return "rotary(complex)"


# In the order of their number; of two that agree on everything that is tried, the first serves.
ROTATIONS = (
    *(Rotation(layout, tables, 1) for tables in ("full", "half") for layout in ("halves", "neighbours", "split")),
    *(Rotation(layout, "pairs", 1) for layout in ("halves", "neighbours", "split")),
    *(Rotation(layout, "full", 1, reverse=True) for layout in ("halves", "neighbours")),
)


def signature_of(function: Any) -> inspect.Signature | None:
    """The signature of a function, or of the stateless module that ``kernels`` makes of a decorated one."""
    if isinstance(function, nn.Module):
        function = function.forward
    elif not inspect.isfunction(function):
        return None
    return inspect.signature(function)


def takes_heads_and_tables(signature: inspect.Signature) -> bool:
    """Whether the first four arguments, or all of three, are what is rotated and by what, and the others known ones.

    Of four, all but the first may have None for a default.
    """
    parameters = list(signature.parameters.values())
    if not all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters):
        return False
    if len(parameters) == 3:
        return all(p.default is p.empty for p in parameters)
    return (
        len(parameters) >= 4
        and parameters[0].default is inspect.Parameter.empty
        and all(p.default in (p.empty, None) for p in parameters[1:4])
        and all(p.default is not p.empty for p in parameters[4:])
        and tuple(p.name for p in parameters[4:]) in OPTIONAL
    )


def _takes_one_and_tables(signature: inspect.Signature) -> bool:
    """Whether the arguments are what is rotated, the two tables, and the place of the heads."""
    parameters = list(signature.parameters.values())
    return (
        len(parameters) == 4
        and all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
        and all(p.default is p.empty for p in parameters[:3])
        and parameters[3].name == "unsqueeze_dim"
        and parameters[3].default is not inspect.Parameter.empty
    )


def for_both(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A rotary function of one tensor of heads as one of queries and keys."""

    def rotate(q: Tensor, k: Tensor, *tables: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return function(q, *tables, **options), function(k, *tables, **options)

    return rotate


def identify(
    function: Any, signature: inspect.Signature, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Rotation | ComplexRotation | str:
    """The rotation that function computes; else why it is left alone."""
    if isinstance(function, nn.Module) and "forward" in vars(function):
        return "replaced by another kernel already"
    one_at_a_time = _takes_one_and_tables(signature)
    if not one_at_a_time and not takes_heads_and_tables(signature):
        return f"takes {signature}, not (q, k, cos, sin) or (q, k, table)"
    rotations = [OneAtATime(**vars(each)) for each in ROTATIONS] if one_at_a_time else ROTATIONS
    called = for_both(function) if one_at_a_time else function
    with quiet(device):
        if len(signature.parameters) == 3:
            return _identify_complex(function, device, dtype, head_dim)
        option = signature.parameters.get("unsqueeze_dim")
        if option is not None and option.default not in (1, 2):
            return f"its default unsqueeze_dim is {option.default!r}"
        for dim in (1, 2) if option is None else (option.default,):
            for rotation in rotations:
                found = _checked(
                    called, replace(rotation, unsqueeze_dim=dim), device, dtype, head_dim, option is not None
                )
                if found is not None:
                    return found
    return "computes none of the known rotations"


def _checked(
    function: Any, rotation: Rotation, device: torch.device, dtype: torch.dtype, head_dim: int, placeable: bool
) -> Rotation | None:
    """rotation with the calls on which it agrees with function; None where it never does."""
    full = head_dim // 2 if rotation.tables == "pairs" else head_dim

    def agrees(
        q_dtype: torch.dtype, table_dtype: torch.dtype, as_: Rotation, width: int = full, heads_at: int | None = None
    ) -> bool:
        place = heads_at or as_.unsqueeze_dim
        tensors = _probe(device, q_dtype, head_dim, place, [(2, 5, width, table_dtype)] * 2)
        options = {} if heads_at is None else {"unsqueeze_dim": heads_at}
        theirs = Call.of(functools.partial(function, **options), tensors)
        with kernels_in(q_dtype, dtype):
            ours = Call.of(functools.partial(as_.kernel, unsqueeze_dim=place), tensors)
        return difference(ours, theirs, "") is None

    places = (None, 3 - rotation.unsqueeze_dim) if placeable else (None,)
    pure = itertools.product(dict.fromkeys((dtype, torch.bfloat16)), places)
    if not all(agrees(pure_dtype, pure_dtype, rotation, heads_at=place) for pure_dtype, place in pure):
        return None
    rotation = replace(rotation, partial=agrees(dtype, dtype, rotation, width=full // 2))
    if not rotation.partial and isinstance(rotation, OneAtATime):
        tailed = replace(rotation, tail=True)
        rotation = tailed if agrees(dtype, dtype, tailed, width=full // 2) else rotation
    for keep_dtype in (False, True):
        kept = replace(rotation, keep_dtype=keep_dtype)
        if all(agrees(*mixed, kept) for mixed in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))):
            return kept
    return replace(rotation, mixed=False)


def _identify_complex(function: Any, device: torch.device, dtype: torch.dtype, head_dim: int) -> ComplexRotation | str:
    for dim in (1, 2):
        rotation = ComplexRotation(dim)

        def agreement(q_dtype: torch.dtype, rows: int, rotation: ComplexRotation = rotation) -> str | None:
            shape = (rows, 5, head_dim // 2, torch.complex64)
            tensors = _probe(device, q_dtype, head_dim, rotation.unsqueeze_dim, [shape])
            theirs = Call.of(function, tensors)
            return theirs if isinstance(theirs, str) else difference(Call.of(rotation.kernel, tensors), theirs, "")

        if all(agreement(each, 1) is None for each in dict.fromkeys((dtype, torch.bfloat16, torch.float32))):
            return replace(rotation, batched=agreement(dtype, 2) is None)
    return "computes none of the known rotations"


def _probe(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    heads_at: int,
    tables: list[tuple[int, int, int, torch.dtype]],
) -> list[Tensor]:
    """Random q, k and tables. Nothing relates the tables to each other, or their halves."""
    noise = Noise(device)
    q = noise.normal(2, 4, 5, head_dim, dtype=dtype)
    k = noise.normal(2, 2, 5, head_dim, dtype=dtype)
    drawn = []
    for *shape, table_dtype in tables:
        if table_dtype.is_complex:
            drawn.append(torch.complex(*(noise.normal(*shape, dtype=torch.float32) for _ in range(2))))
        else:
            drawn.append(noise.normal(*shape, dtype=table_dtype))
    heads = [t if heads_at == 1 else t.transpose(1, 2) for t in (q, k)]
    return [t.requires_grad_() for t in heads] + drawn


@functools.cache
def bind(function: Any, rotation: Rotation | ComplexRotation) -> Callable[..., Any]:
    """The kernel with function's signature; function itself serves the calls that the kernel does not know."""
    target = function.forward if isinstance(function, nn.Module) else function
    if isinstance(rotation, ComplexRotation):
        return renamed_like(_bind_complex(function, rotation), target)
    if isinstance(rotation, OneAtATime):
        return renamed_like(_bind_one(function, rotation), target)
    return renamed_like(_bind_tables(function, rotation, inspect.signature(target)), target)


def _bind_one(function: Any, rotation: OneAtATime) -> Callable[..., Tensor]:
    knows, serve, default = rotation.knows, rotation.one, rotation.unsqueeze_dim

    def placed(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = default) -> Tensor:
        if knows(x, x, cos, sin, unsqueeze_dim):
            return serve(x, cos, sin, unsqueeze_dim)
        return function(x, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return placed


def _bind_complex(function: Any, rotation: ComplexRotation) -> Callable[..., tuple[Tensor, Tensor]]:
    knows, serve = rotation.knows, rotation.kernel

    def multiplied(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return serve(q, k, table) if knows(q, k, table) else function(q, k, table)

    return multiplied


def _bind_tables(
    function: Any, rotation: Rotation, signature: inspect.Signature
) -> Callable[..., tuple[Tensor, Tensor]]:
    knows, serve, default = rotation.knows, rotation.kernel, rotation.unsqueeze_dim

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if knows(q, k, cos, sin, default):
            return serve(q, k, cos, sin, default)
        return function(q, k, cos, sin)

    def placed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = default) -> tuple[Tensor, Tensor]:
        if knows(q, k, cos, sin, unsqueeze_dim):
            return serve(q, k, cos, sin, unsqueeze_dim)
        return function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    def placed_or_missing(
        q: Tensor, k: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim: int = default
    ) -> tuple[Tensor, Tensor]:
        if k is not None and cos is not None and sin is not None and knows(q, k, cos, sin, unsqueeze_dim):
            return serve(q, k, cos, sin, unsqueeze_dim)
        return function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    def positioned(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = default
    ) -> tuple[Tensor, Tensor]:
        if position_ids is None and knows(q, k, cos, sin, unsqueeze_dim):
            return serve(q, k, cos, sin, unsqueeze_dim)
        return function(q, k, cos, sin, position_ids, unsqueeze_dim)

    parameters = list(signature.parameters.values())
    if parameters[1].default is None:
        return placed_or_missing
    wrappers: tuple[Callable[..., tuple[Tensor, Tensor]], ...] = (plain, placed, positioned)
    return wrappers[OPTIONAL.index(tuple(p.name for p in parameters[4:]))]
