"""What hypothesis chooses from: shapes, layouts, labels and options, and how many examples it tries."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["EXAMPLES", "LAYOUTS", "draw_labels", "leading_shapes", "normal", "thorough", "widths"]

EXAMPLES = int(os.environ.get("LIGER_TRAINER_EXAMPLES", "0"))

# Few and the same ones in the default run; LIGER_TRAINER_EXAMPLES=500 tries so many others.
thorough: Callable = settings(
    max_examples=EXAMPLES or 10,
    derandomize=not EXAMPLES,
    deadline=None,  # a kernel compiles, or the interpreter crawls
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

leading_shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
# One element, around powers of two, and what is no multiple of anything.
widths = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 64, 100, 127, 128, 129, 257])


def _unused(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def _half_rows(x: Tensor) -> Tensor:
    memory = _unused(*x.shape[:-1], 2 * x.shape[-1] + 1, like=x)
    memory[..., 1 : 1 + x.shape[-1]] = x
    return memory[..., 1 : 1 + x.shape[-1]]


def _every_other_column(x: Tensor) -> Tensor:
    memory = _unused(*x.shape[:-1], 2 * x.shape[-1], like=x)
    memory[..., ::2] = x
    return memory[..., ::2]


def _reversed_leading(x: Tensor) -> Tensor:
    order = [*reversed(range(x.dim() - 1)), x.dim() - 1]
    return x.permute(order).contiguous().permute(order)


def _columns_outside(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


# Views of the same values; what lies between them in memory is NaN.
LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "half_rows": _half_rows,
    "every_other_column": _every_other_column,
    "reversed_leading": _reversed_leading,
    "columns_outside": _columns_outside,
}


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device, layout: str = "contiguous") -> Tensor:
    """Standard normal numbers that are exact in dtype; a leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return LAYOUTS[layout](values).detach().requires_grad_()


@st.composite
def draw_labels(draw: st.DrawFn, rows: int, classes: int) -> Tensor:
    """(rows,) labels of which any part is ignored, all and none included."""
    label = st.one_of(st.just(-100), st.integers(0, classes - 1))
    kind = draw(st.sampled_from(["some", "all", "none"]))
    if kind == "all":
        return torch.full((rows,), -100)
    label = st.integers(0, classes - 1) if kind == "none" else label
    return torch.tensor(draw(st.lists(label, min_size=rows, max_size=rows)), dtype=torch.int64)
