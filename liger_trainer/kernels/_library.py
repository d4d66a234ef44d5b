"""Registration of every op with PyTorch's dispatcher, namespace ``liger_trainer``.

An op ``name`` is three entries:

``liger_trainer::name_forward`` and ``liger_trainer::name_backward``
    The computation. Triton implementations serve CUDA (ROCm included) and XPU, the torch implementation serves every
    other device, and a fake implementation serves the compiler. All of that is registered as the default for any
    device, so that a vendor's kernel, registered for its device's own dispatch key on these two names
    (docs/backends.md), goes before it.
``liger_trainer::name``
    The differentiable op that the public functions call: it joins the two through an ``autograd.Function``. To
    ``torch.compile`` it is one opaque node, whose parts AOTAutograd then sees.

The low-level ``Library.define/impl`` is used and not ``torch.library.custom_op``, which takes a third more host time.
Even so the dispatcher takes a fifth of the host's time of a small call, packing arguments for a kernel in C++ and
unpacking them for ours: where it could only choose what is registered here, :class:`Op` calls that itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ._triton import HAS_TRITON

__all__ = [
    "NAMESPACE",
    "OPS",
    "Op",
    "define",
    "define_differentiable",
    "force",
    "graph_is_kept",
    "interpreted_kernels",
    "refuse_double_backward",
]

NAMESPACE = "liger_trainer"
TRITON_DEVICES = ("cuda", "xpu")
_library = torch.library.Library(NAMESPACE, "DEF")
_triton_on_cpu = False
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_profiling = torch._C._autograd._profiler_enabled
# Classes that have no say of their own in how an op is called.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, NoneType, bool, int, float, str, torch.dtype})
_forced: frozenset[str] = frozenset()  # families that the torch implementations serve everywhere


class Op:
    """One op of the computation, called as its overload ``torch.ops.liger_trainer.name.default`` would be.

    Plain tensors on a GPU, with no mode, transform or profiler that wants to see the op, go straight to what is
    registered here, unless a kernel is registered for the device's dispatch key when the op is first called there.

    Attributes:
        family: the name without its direction, by which :func:`use_torch` knows it.
    """

    def __init__(self, name: str, kernel: Callable[..., Any] | None, reference: Callable[..., Any]) -> None:
        self.name = name
        self.family = re.sub(r"(_rows)?_(forward|backward)_?$", "", name)
        self.kernel = kernel
        self.reference = reference
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._direct: dict[torch.device, Callable[..., Any]] = {}

    def default(self, *args: Any) -> Any:
        """What serves every device without a kernel of its own. The first argument is a tensor, and says which."""
        return self._default_on(args[0].device.type)(*args)

    def _default_on(self, device_type: str) -> Callable[..., Any]:
        if self.family in _forced:
            return self.reference
        has_triton = HAS_TRITON if device_type in TRITON_DEVICES else _triton_on_cpu and device_type == "cpu"
        return self.reference if self.kernel is None or not has_triton else self.kernel

    def __call__(self, *args: Any) -> Any:
        # A subclass, a mode or a transform may have a say in what the op does; a profiler wants to see it.
        if not _PLAIN.issuperset(map(type, args)) or _dispatch_modes() or _transforms_active() or _profiling():
            return self.overload(*args)
        device = args[0].device
        direct = self._direct.get(device)
        if direct is None:
            direct = self._direct[device] = self._chosen_on(device.type)
        return direct(*args)

    def _chosen_on(self, device_type: str) -> Callable[..., Any]:
        if self.family in _forced:
            return self.reference
        if device_type not in TRITON_DEVICES:
            return self.overload
        key = torch._C._dispatch_key_for_device(device_type)
        taken_over = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", key)
        return self.overload if taken_over else self._default_on(device_type)

    def implementation(self, device_type: str) -> str:
        """What serves the device's plain tensors: ``"torch"``, ``"triton"``, or ``"registered"`` by others."""
        if self.family in _forced:
            return "torch"
        key = torch._C._dispatch_key_for_device(device_type)
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", key):
            return "registered"
        return "torch" if self._default_on(device_type) is self.reference else "triton"


OPS: dict[str, Op] = {}


def force(families: frozenset[str]) -> None:
    """Have the torch implementations serve these families, and no others, from the next call on."""
    global _forced
    _forced = families
    for op in OPS.values():
        op._direct.clear()


def define(
    schema: str,
    *,
    kernel: Callable[..., Any] | None,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> Op:
    """Define one op of the computation and return it, ready to be called.

    Args:
        schema: the op's schema without its namespace, as ``"rms_norm_forward(Tensor x, float eps) -> Tensor"``. Its
            first argument is a tensor.
        kernel: the Triton implementation, or None for an op that has no Triton part.
        reference: the torch implementation: the same algorithm, for any device.
        fake: shapes and dtypes of the outputs, for meta and fake tensors.
        tags: what else the compiler should know of the op.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=tags)
    op = OPS[name] = Op(name, kernel, reference)
    _library.impl(name, op.default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return op


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
