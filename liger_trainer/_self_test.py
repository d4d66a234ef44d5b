"""A self-test of every op on a device: what serves there against the torch implementation in float64 on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import kernels

__all__ = ["SelfTestResult", "self_test", "tested_dtypes"]

# The largest error of a result or gradient in the 2-norm, relative to the reference's. A rounding to nearest is an
# error of up to 2^-9 (bf16) or 2^-12 (fp16); a head rounds its logits before they go through exp and a sum over rows.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# Odd sizes: no multiple of a tile, a warp, or 16 bytes.
BATCH, TOKENS, WIDTH, CLASSES = 2, 37, 333, 1511
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SelfTestResult:
    """What became of one op in one dtype.

    Attributes:
        op: name of the public function, with the option that it was tried with.
        dtype: of the inputs.
        error: the largest relative error, in the 2-norm, of its results and gradients; infinite where one is not
            finite or it raised.
        limit: what was allowed.
        seconds: time taken, compilation included.
        exception: what was raised, or None.
    """

    op: str
    dtype: torch.dtype
    error: float
    limit: float
    seconds: float
    exception: str | None = None

    @property
    def passed(self) -> bool:
        return self.exception is None and self.error <= self.limit


@dataclass(frozen=True)
class _Case:
    name: str
    function: Callable[..., Any]  # of the tensors, and of the options by name
    shapes: Mapping[str, tuple[int, ...]]  # those that start with "teacher", cos and sin want no gradient
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, tensors: Tensors) -> Any:
        return self.function(tensors, **self.options)

    def make(self) -> Tensors:
        """Standard normal numbers in float64, and labels of which every third is ignored."""
        generator = torch.Generator().manual_seed(0)
        values = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in self.shapes.items()
        }
        for name in values:
            if name.endswith("weight") and values[name].dim() == 2:
                values[name] *= values[name].shape[1] ** -0.5
        values["labels"] = torch.randint(CLASSES, (BATCH, TOKENS), generator=generator)
        values["labels"].view(-1)[::3] = -100
        return values


def _cases() -> list[_Case]:
    rows, hidden, heads = (BATCH, TOKENS, WIDTH), (BATCH, TOKENS, WIDTH), (BATCH, 3, TOKENS, 64)
    head = {"hidden": hidden, "weight": (CLASSES, WIDTH)}
    norm = {"x": rows, "weight": (WIDTH,)}
    gated = {"gate": rows, "up": rows}
    logits = {"student": (BATCH, TOKENS, CLASSES), "teacher": (BATCH, TOKENS, CLASSES)}
    distilled = {**head, "teacher_hidden": hidden, "teacher_weight": (CLASSES, WIDTH)}
    outputs = ("entropy", "mean_logits")
    tile = 16 * CLASSES * 4  # a few rows, so that there are several tiles and a last one that is not full
    k = kernels
    return [
        *(
            _Case(f"rms_norm ({c})", lambda t, **o: k.rms_norm(t["x"], t["weight"], **o), norm, {"casting": c})
            for c in ("llama", "gemma", "none")
        ),
        _Case("add_rms_norm", lambda t: k.add_rms_norm(t["x"], t["residual"], t["weight"]), {**norm, "residual": rows}),
        _Case(
            "rms_norm_and_residual",
            # Both results in one: an upstream gradient for each, and no result that is the input.
            lambda t: tuple(2 * each for each in k.rms_norm_and_residual(t["x"], t["weight"])),
            norm,
        ),
        _Case("layer_norm", lambda t: k.layer_norm(t["x"], t["weight"], t["bias"]), {**norm, "bias": (WIDTH,)}),
        *(
            _Case(
                f"rotary ({'interleaved' if i else 'halves'})",
                lambda t, **o: k.rotary(t["q"], t["k"], t["cos"], t["sin"], **o),
                {"q": heads, "k": (BATCH, 1, *heads[2:]), "cos": (1, TOKENS, 64), "sin": (1, TOKENS, 64)},
                {"interleaved": i},
            )
            for i in (False, True)
        ),
        _Case("swiglu", lambda t: k.swiglu(t["gate"], t["up"]), gated),
        *(
            _Case(f"geglu ({a})", lambda t, **o: k.geglu(t["gate"], t["up"], **o), gated, {"approximate": a})
            for a in ("tanh", "none")
        ),
        _Case(
            "cross_entropy",
            lambda t: k.cross_entropy(t["logits"], t["labels"], label_smoothing=0.1, z_loss=1e-3, softcap=5.0),
            {"logits": (BATCH, TOKENS, CLASSES)},
        ),
        *(
            _Case(
                f"linear_cross_entropy ({r})",
                lambda t, **o: k.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], softcap=5.0, **o),
                head,
                {"reduction": r, "tile_bytes": tile},
            )
            for r in ("mean", "none")
        ),
        _Case(
            "linear_cross_entropy (LoRA)",
            lambda t: k.linear_cross_entropy(
                t["hidden"], t["weight"], t["labels"], low_rank=(t["lora_hidden"], t["lora_weight"]), tile_bytes=tile
            ),
            {**head, "lora_hidden": (BATCH, TOKENS, 16), "lora_weight": (CLASSES, 16)},
        ),
        _Case(
            "linear_log_probs",
            lambda t: k.linear_log_probs(t["hidden"], t["weight"], t["labels"], outputs=outputs, tile_bytes=tile),
            head,
        ),
        # Sums: the gradients of a mean over so many tokens and classes would be fp16's subnormal numbers.
        _Case(
            "linear_jsd",
            lambda t: k.linear_jsd(
                t["hidden"],
                t["weight"],
                t["teacher_hidden"],
                t["teacher_weight"],
                labels=t["labels"],
                reduction="sum",
                tile_bytes=tile,
            ),
            distilled,
        ),
        _Case("jsd", lambda t: k.jsd(t["student"], t["teacher"], labels=t["labels"], reduction="sum"), logits),
        # Any numbers will do for log-probabilities, whose sum the op does not look at.
        _Case("kl_div", lambda t: k.kl_div(t["student"], t["teacher"], reduction="sum", log_target=True), logits),
    ]


def tested_dtypes(device: torch.device) -> list[torch.dtype]:
    """Those that the device computes with itself: no bf16 on GPUs before Ampere."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return [torch.float32, *([torch.bfloat16] if bf16 else []), *([torch.float16] if device.type != "cpu" else [])]


def _outcome(case: _Case, values: Tensors) -> list[Tensor]:
    """Results and gradients, on the CPU in float64."""
    leaves = {
        name: tensor.requires_grad_()
        for name, tensor in values.items()
        if tensor.is_floating_point() and not name.startswith(("teacher", "cos", "sin"))
    }
    found = case.run(values)
    results = [found] if isinstance(found, Tensor) else [each for each in found if each is not None]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
    return [each.detach().to("cpu", torch.float64) for each in (*results, *gradients)]


def _relative_error(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(ours, reference, strict=True)]
    return max(error if error == error else float("inf") for error in errors)  # a NaN compares with nothing


def self_test(device: torch.device) -> Iterator[SelfTestResult]:
    """Run every op forward and backward on the device and yield what became of it, one op and dtype at a time.

    The inputs are rounded to the dtype; the reference is the torch implementation on the same numbers in float64 on the
    CPU. A fault of the torch implementation itself does not show: the project's tests compare that with formulas
    written on their own.
    """
    for case in _cases():
        for dtype in tested_dtypes(device):
            values = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case.make().items()}
            exact = {n: t.double() if t.is_floating_point() else t for n, t in values.items()}
            start = time.perf_counter()
            error, exception = float("inf"), None
            try:
                ours = _outcome(case, {name: tensor.detach().to(device) for name, tensor in values.items()})
                with kernels.use_torch():
                    error = _relative_error(ours, _outcome(case, exact))
            except Exception as raised:  # whatever a device or compiler throws belongs into the report
                exception = f"{type(raised).__name__}: {raised}"
            yield SelfTestResult(case.name, dtype, error, LIMITS[dtype], time.perf_counter() - start, exception)
