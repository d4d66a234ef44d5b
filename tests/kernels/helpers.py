"""What the tests of the kernels compare, and how closely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liger_trainer.kernels import _library

ON_GPU = torch.cuda.is_available()

# dtype of the result: (atol, rtol) of an element, and the largest relative error of the whole tensor in the 2-norm.
# One rounding to nearest is an error of up to 2^-9 (bf16) or 2^-12 (fp16) of an element, and about half in the norm.
TOLERANCES = {
    torch.float32: (1e-7, 1e-5, 2e-6),
    torch.bfloat16: (1e-3, 1e-2, 4e-3),
    torch.float16: (1e-4, 2e-3, 5e-4),
    torch.float64: (1e-14, 1e-12, 1e-13),
}
# Accumulated in fp32, an element that is a difference of large terms keeps their rounding, whatever remains of it.
ROUNDINGS = 16


def dtypes_of(device: torch.device) -> Sequence[torch.dtype]:
    """The dtypes to test there. Interpreted kernels are tested in fp32: the interpreter truncates to bf16."""
    if device.type == "cpu" and _library._triton_on_cpu:
        return (torch.float32,)
    return (torch.float32, torch.bfloat16, torch.float16)


def assert_close_to_reference(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, *, magnitude: Tensor | float | None = None
) -> None:
    """Compare a result with its float64 reference, element by element and in the 2-norm.

    Args:
        actual: the result.
        expected: the reference in float64, computed from inputs rounded as the op's were.
        dtype: the precision to hold the result to.
        magnitude: the size of the terms whose sum an element is, each of which fp32 rounds: the bound on an element
            grows by 16 ulp of it. By default, the reference's largest element.
    """
    assert actual.shape == expected.shape
    actual = actual.detach().double().cpu()
    expected = expected.detach().double().cpu()
    assert actual.isfinite().all()
    if not actual.numel():
        return
    atol, rtol, norm_rtol = TOLERANCES[dtype]
    terms = expected.abs().max() if magnitude is None else torch.as_tensor(magnitude).double().cpu()
    rounding = ROUNDINGS * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * terms
    error = (actual - expected).abs()
    excess = error - (atol + rtol * expected.abs() + rounding)
    worst = excess.argmax()
    assert excess.max() <= 0, (
        f"{int((excess > 0).sum())} of {error.numel()} elements off; the worst, at {int(worst)}, is "
        f"{actual.flatten()[worst]:.9g} instead of {expected.flatten()[worst]:.9g}"
    )
    allowed = norm_rtol * expected.norm() + (rounding.expand_as(error).norm() if magnitude is not None else 0.0)
    assert error.norm() <= allowed + atol, f"relative error {error.norm() / expected.norm():.3g} in the 2-norm"


def rounded(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for every device, that are exact in dtype; a leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def doubled(x: Tensor | None) -> Tensor | None:
    """A float64 leaf with x's values, on the CPU."""
    return None if x is None else x.detach().double().cpu().requires_grad_()


class RecordOutputs(TorchDispatchMode):
    """Collects in ``outputs`` what each of the project's ops returned that has ``name`` in its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.outputs: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "liger_trainer" and self.name in func.name():
            self.outputs.append(outputs)
        return outputs


def strided_views(make: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Views that are not contiguous, of shape (2, 3, 5, 8) all, over memory that ``make(*shape)`` gives."""
    return {
        "half_of_each_row": make(2, 3, 5, 16)[..., 8:],
        "heads_from_tokens": make(2, 5, 3, 8).transpose(1, 2),
        "half_of_heads_from_tokens": make(2, 5, 3, 16)[..., :8].transpose(1, 2),
        "tokens_before_batch": make(5, 2, 3, 8).permute(1, 2, 0, 3),
        "every_other_column": make(2, 3, 5, 16)[..., ::2],
        "columns_outside": make(2, 3, 8, 5).transpose(2, 3),
        "every_other_row": make(2, 3, 10, 8)[:, :, ::2],
        "expanded_batch": make(1, 3, 5, 8).expand(2, 3, 5, 8),
    }
