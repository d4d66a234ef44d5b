"""What the benchmarks know of the peers, beyond how to call them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .benchmark import Case, Op, Provider

__all__ = ["compiled", "liger_kernel", "upcast"]


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or in float64 where it is that: one formula serves as the eager peer and as the reference."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compiled(op: Op) -> Provider:
    """The op under torch.compile, for one shape: nothing of an earlier shape is kept that could make it dynamic."""

    def build(case: Case) -> Op:
        torch.compiler.reset()
        return torch.compile(op, dynamic=False)

    return Provider(build, note="compiled for this shape alone (dynamic=False)")


def liger_kernel(
    build: Callable[[Case], Op], *, cutedsl: bool = False, overwrites: bool = False, note: str = ""
) -> Provider:
    """Liger-Kernel's op on Triton, or on CuTe DSL, which an environment variable chooses when it is first imported."""
    if cutedsl:
        return Provider(build, ("liger_kernel", "cutlass"), {"LIGER_KERNEL_IMPL": "cutedsl"}, overwrites, note)
    return Provider(build, ("liger_kernel",), {}, overwrites, note)
