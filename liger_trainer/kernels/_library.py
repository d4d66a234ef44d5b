"""Registration of every op with PyTorch's dispatcher, namespace ``liger_trainer``.

An op ``name`` is three entries:

``liger_trainer::name_forward`` and ``liger_trainer::name_backward``
    The computation. Triton implementations serve CUDA (ROCm included) and XPU, the torch implementation serves every
    other device, and a fake implementation serves the compiler. A vendor adds its device by registering its own
    kernels for its dispatch key on these two names (docs/backends.md).
``liger_trainer::name``
    The differentiable op that the public functions call: it joins the two through an ``autograd.Function``. To
    ``torch.compile`` it is one opaque node, whose parts AOTAutograd then sees.

The low-level ``Library.define/impl`` is used and not ``torch.library.custom_op``, which takes a third more host time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ._triton import HAS_TRITON

__all__ = [
    "NAMESPACE",
    "define",
    "define_differentiable",
    "graph_is_kept",
    "interpreted_kernels",
    "refuse_double_backward",
]

NAMESPACE = "liger_trainer"
_library = torch.library.Library(NAMESPACE, "DEF")
_triton_on_cpu = False


def define(
    schema: str,
    *,
    kernel: Callable[..., Any] | None,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Define one op of the computation and return its overload, ready to be called.

    Args:
        schema: the op's schema without its namespace, as ``"rms_norm_forward(Tensor x, float eps) -> Tensor"``.
        kernel: the Triton implementation, or None for an op that has no Triton part.
        reference: the torch implementation: the same algorithm, for any device.
        fake: shapes and dtypes of the outputs, for meta and fake tensors.
        tags: what else the compiler should know of the op.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=tags)

    def on_cpu(*args: Any) -> Any:
        return (kernel if _triton_on_cpu and kernel is not None else reference)(*args)

    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, on_cpu, "CPU")
    if kernel is not None and HAS_TRITON:
        _library.impl(name, kernel, "CUDA")
        _library.impl(name, kernel, "XPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_differentiable(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Define the differentiable op over a forward and a backward op and return what calls it.

    ``torch.compile`` must see the op; anyone else gets ``function`` itself, without the dispatcher's detour to it.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeImplicitAutograd")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_dynamo_compiling() else function(*args)

    return call


def refuse_double_backward(name: str) -> None:
    """Raise in a backward pass that is itself being recorded (``create_graph=True``).

    Raises:
        RuntimeError: when grad mode is on, which in a backward pass means ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"liger_trainer.kernels.{name} has no second derivative: its backward was called with create_graph=True. "
            "Use the PyTorch operation where a double backward is needed."
        )


def graph_is_kept() -> bool:
    """Whether the backward that is running may run again (``retain_graph=True``), or whether that can't be known."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return query is None or torch.compiler.is_compiling() or query()


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Run the Triton implementations on CPU tensors, for tests under ``TRITON_INTERPRET=1``."""
    global _triton_on_cpu
    before, _triton_on_cpu = _triton_on_cpu, True
    try:
        yield
    finally:
        _triton_on_cpu = before
