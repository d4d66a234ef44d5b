"""Running a part and its replacement on private random input, and comparing what comes out.

Nothing of the model is touched: parts run as *shadows* that share neither hooks nor parameters nor buffers with the
model, random numbers come from a generator of the probe's own, the global one is restored where a part draws from it,
and gradients are returned by ``torch.autograd.grad``, not accumulated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from .class_swap import stock_class
from .sharding import class_before_sharding

__all__ = [
    "Call",
    "Noise",
    "Replay",
    "compute_device",
    "difference",
    "fingerprint",
    "kernels_in",
    "nearly_bitwise",
    "no_farther",
    "probe_dtypes",
    "quiet",
    "shadow",
    "training_dtype",
]

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Rows of a probe input carry these scales: the small ones show an eps, the large ones a clamp.
MAGNITUDES = (1e-3, 0.1, 1.0, 30.0, 300.0)

# Two computations of one formula in fp32 that sum in another order round to different bf16 numbers now and then; two
# formulas that round at different places differ in every third element.
RARE = 0.02


class Noise:
    """Random tensors from a generator of its own.

    Args:
        device: where the tensors go. They are drawn on the CPU, so that every device sees the same ones.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (drawn * scale + shift).to(self.device, dtype)

    def rows(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers whose rows (last dimension) go through :data:`MAGNITUDES`."""
        drawn = self.normal(*shape, dtype=torch.float32)
        n_rows = drawn.numel() // shape[-1]
        low, high = (0.1, 30.0) if dtype == torch.float16 else (0.0, float("inf"))  # products of two stay normal
        scales = [min(max(MAGNITUDES[row % len(MAGNITUDES)], low), high) for row in range(n_rows)]
        return (drawn * torch.tensor(scales, device=self.device).view(*shape[:-1], 1)).to(dtype)


def compute_device(tensors: Sequence[Tensor]) -> torch.device:
    """Where a part with these parameters will run: their device, or the default accelerator for meta parameters."""
    for tensor in tensors:
        if tensor.device.type != "meta":
            return tensor.device
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def training_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a part with these parameters computes; bf16 where they are quantised or absent."""
    for tensor in tensors:
        if tensor.dtype in TRAINABLE:
            return tensor.dtype
    return torch.bfloat16


def probe_dtypes(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """The dtypes in which a part with these parameters is compared: its own, one that rounds much, one that doesn't."""
    return tuple(dict.fromkeys([training_dtype(tensors), torch.bfloat16, torch.float32]))


@contextmanager
def kernels_in(dtype: torch.dtype, trained: torch.dtype) -> Iterator[None]:
    """Inside, ops on tensors of dtype are kernels only if a part whose training dtype is ``trained`` may meet it.

    That one, and for fp32 those of autocast. In any other dtype a comparison is about the formula, for which the torch
    implementations do: a kernel would be compiled for this one call.
    """
    with nullcontext() if dtype == trained or trained.itemsize >= 4 else kernels.use_torch():
        yield


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, warnings silent, and the global random state restored afterwards."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.device(device),  # a model that is made without weights is made under torch.device("meta")
        warnings.catch_warnings(action="ignore"),
    ):
        yield


class Replay:
    """Gives the functions that it wraps the same random numbers each time, in every process; used inside :func:`quiet`.

    Args:
        device: the one whose generator counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: Any = torch.random if device.type == "cpu" else torch.get_device_module(device)
        self._arguments: tuple[Any, ...] = () if device.type == "cpu" else (device,)
        self._state = torch.Generator(device).manual_seed(0).get_state()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*args: Any) -> Any:
            self._states.set_rng_state(self._state, *self._arguments)
            return function(*args)

        return replayed


def shadow(module: nn.Module, children: dict[str, nn.Module] | None = None) -> Any:
    """A copy of module to run in its place: the stock class and the same attributes, but no hooks.

    Parameters and buffers of module are left out, for the caller to set; its children are shadows with clones of
    theirs, except those given in children.
    """
    stock = class_before_sharding(stock_class(module))
    copied: Any = stock.__new__(stock)
    copied.__dict__.update(vars(module))
    copied.__dict__.update({name: value for name, value in vars(nn.Module()).items() if name != "training"})
    copied._parameters.update({name: None for name, tensor in module._parameters.items() if tensor is None})
    copied._buffers.update({name: None for name, tensor in module._buffers.items() if tensor is None})
    for name, child in module.named_children():
        if children is not None and name in children:
            copied._modules[name] = children[name]
            continue
        copied._modules[name] = inner = shadow(child)
        for attribute, tensor in child.named_parameters(recurse=False):
            inner.register_parameter(attribute, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        for attribute, buffer in child.named_buffers(recurse=False):
            inner.register_buffer(attribute, buffer.detach().clone())
    return copied


def fingerprint(module: nn.Module, without: frozenset[str] = frozenset()) -> tuple[Any, ...]:
    """Equal for two modules of a model only if they compute the same formula on tensors of the same kind.

    Plain attributes count by value, every other object by identity; valid while the model lives. Children named in
    without count by their kind of projection only.
    """
    plain = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
    attributes = tuple(
        (name, type(value), value) if isinstance(value, plain) else (name, id(value))
        for name, value in sorted(vars(module).items())
        if name not in vars(nn.Module())
    )
    tensors = tuple(
        (name, tensor.shape, tensor.dtype, tensor.device)
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in named
    )
    children = tuple(
        (name, child.in_features, child.out_features, training_dtype(list(child.parameters())))
        if name in without
        else (name, fingerprint(child))
        for name, child in module.named_children()
    )
    return stock_class(module), attributes, tensors, children


@dataclass(frozen=True)
class Call:
    """The outputs of a function, and its gradients with respect to some tensors."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Call | str:
        """Call function on copies of inputs and differentiate a random projection of its outputs.

        The gradients are those of the inputs that require them, then those of weights. An error is returned in words:
        foreign functions raise anything on a probe, and kernels refuse what they do not know.
        """
        leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
        try:
            result = function(*leaves)
        except Exception as error:
            return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        outputs = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(output, Tensor) and output.is_floating_point() for output in outputs):
            return "returns something that is not a floating point tensor"
        wanted = [leaf for leaf in leaves if leaf.requires_grad] + list(weights)
        noise = Noise(leaves[0].device, seed=1)
        upstream = [noise.normal(*output.shape, dtype=output.dtype) for output in outputs]
        try:
            gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
        except Exception as error:
            return f"raises {type(error).__name__} in its backward: {' '.join(str(error).split())[:200]}"
        return cls(tuple(output.detach() for output in outputs), gradients)


def nearly_bitwise(ours: Call | str, theirs: Call | str) -> bool:
    """Whether the outputs agree bit for bit, up to the rare last bit that depends on the order of a sum."""
    if isinstance(ours, str) or isinstance(theirs, str) or len(ours.outputs) != len(theirs.outputs):
        return False
    for a, b in zip(ours.outputs, theirs.outputs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b, last_bit = a.double(), b.double(), torch.finfo(a.dtype).eps
        gaps = (a - b).abs()
        if int((gaps > 0).sum()) > max(1, int(RARE * a.numel())) or not bool((gaps <= last_bit * b.abs()).all()):
            return False
    return True


def difference(ours: Call | str, theirs: Call | str, where: str) -> str | None:
    """Why the replacement (ours) is not the original (theirs), or None where they agree within rounding."""
    if isinstance(theirs, str):
        return f"its forward {theirs} {where}"
    if isinstance(ours, str):
        return f"the kernel {ours} {where}"
    if len(ours.outputs) != len(theirs.outputs):
        return f"{len(theirs.outputs)} outputs expected, got {len(ours.outputs)}, {where}"
    allowed = _allowed(theirs)
    labels = [*("output" for _ in ours.outputs), *("gradient" for _ in ours.gradients)]
    pairs = zip(labels, (*ours.outputs, *ours.gradients), (*theirs.outputs, *theirs.gradients), strict=True)
    for label, a, b in pairs:
        if (a is None) != (b is None):
            return f"only one of the two has a {label}, {where}"
        if a is None or b is None:
            continue
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{label} {_kind(b)} expected, got {_kind(a)}, {where}"
        distance = _distance(a, b)
        if not distance <= allowed:
            return f"{label} differs by {distance:.1e} of its size (at most {allowed:.1e} expected), {where}"
    return None


def no_farther(ours: Call | str, theirs: Call | str, exact: Call | str) -> bool:
    """Whether the replacement is as near to exact numbers, tensor by tensor, as an original that rounds much is.

    A tenth is for chance: which of two nearly equal numbers rounds up.
    """
    if isinstance(ours, str) or isinstance(theirs, str) or isinstance(exact, str):
        return False
    allowed = _allowed(theirs)
    for a, b, c in zip(*((*call.outputs, *call.gradients) for call in (ours, theirs, exact)), strict=True):
        if a is None or b is None or c is None:
            if not a is b is c is None:
                return False
        elif a.dtype != b.dtype or not _distance(a, c) <= max(1.1 * _distance(b, c), allowed):
            return False
    return True


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _allowed(theirs: Call) -> float:
    return max(_tolerance(t.dtype) for t in (*theirs.outputs, *theirs.gradients) if t is not None)


def _tolerance(dtype: torch.dtype) -> float:
    """What two correct computations may differ by: some roundings, and the order of sums in fp32.

    Norms of fp64 models compute in fp32, so that they get no less.
    """
    return 2 * torch.finfo(dtype).eps + 1e-5


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest relative difference of a row, against the norm of the row."""
    a, b = (torch.atleast_1d(t).cpu().double() for t in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, a - b).norm(dim=-1)
    size = torch.where(same & ~b.isfinite(), 0.0, b).norm(dim=-1)
    ratio = torch.where(gap == 0, 0.0, gap / size)
    return float(ratio.max()) if ratio.numel() else 0.0
