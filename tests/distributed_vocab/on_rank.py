"""What the ranks run: each op on this rank's rows of a head, against float64 on the whole one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from liger_trainer.kernels import VocabularyShard, linear_cross_entropy, linear_log_probs, use_torch
from liger_trainer.kernels._library import OPS, interpreted_kernels
from tests.distributed.group import device
from tests.kernels.loss_reference import assert_product_close, doubled, reference_loss

N, H, V = 22, 24, 131  # V is divisible by neither 2 nor 3
OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs")


def bounds(n_classes: int, cuts: Sequence[int] | None) -> tuple[int, int, int]:
    """(first class, end, largest shard) of this rank, for cuts at these classes or torch.chunk's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if cuts is None:
        largest = -(-n_classes // world)
        return min(rank * largest, n_classes), min((rank + 1) * largest, n_classes), largest
    edges = [0, *cuts, n_classes]
    return edges[rank], edges[rank + 1], max(b - a for a, b in pairwise(edges))


def make(dtype: torch.dtype, n: int = N, v: int = V, labels: str = "random", bias: bool = True, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed + n + v)
    hidden = torch.randn(n, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(v, H, generator=generator, dtype=torch.float64) / H**0.5).to(dtype)
    offsets = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    found = torch.randint(v, (n,), generator=generator)
    if labels == "first":  # all on rank 0: the other shards hold none of them
        found = found % 3
    found[::3] = -100
    if labels == "ignored":
        found.fill_(-100)
    return tuple(each if each is None else each.to(device()) for each in (hidden, weight, offsets, found))


def fill(options: dict[str, Any], dtype: torch.dtype, n: int, v: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    sizes = {"token_weights": n, "class_weights": v}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: torch.rand(sizes[name], generator=generator, dtype=torch.float64).to(device(), wide) + 0.1
        if value == "random"
        else value
        for name, value in options.items()
    }


class LargestSeen(TorchDispatchMode):
    """The most columns that any matrix had, inside the project's ops as well, and the most elements of a tensor."""

    columns = elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "liger_trainer" and name in OPS:
            with self:
                outputs = OPS[name].default(*args, **(kwargs or {}))
        else:
            outputs = func(*args, **(kwargs or {}))
        for each in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
                if each.dim() > 1:
                    self.columns = max(self.columns, each.shape[-1])
        return outputs


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **options)

        return mock.patch.object(dist, name, call)

    with counting("all_reduce"), counting("all_gather_into_tensor"):
        yield counts


def _implementation(triton: bool) -> Any:
    if device().type == "cuda":
        return nullcontext() if triton else use_torch("all")
    return interpreted_kernels() if triton else nullcontext()


def cross_entropy(
    dtype: torch.dtype,
    reduction: str = "mean",
    *,
    v: int = V,
    n: int = N,
    labels: str = "random",
    bias: bool = True,
    cuts: Sequence[int] | None = None,
    tile_rows: int = 3,
    triton: bool = False,
    **options: Any,
) -> dict[str, int]:
    """Compare loss, predictions and all gradients; what collectives it took and how large its tensors were."""
    hidden, weight, offsets, found = make(dtype, n, v, labels, bias)
    options = fill(options, dtype, n, v)
    first, end, largest = bounds(v, cuts)
    own = [hidden.clone(), weight[first:end].clone(), *([offsets[first:end].clone()] if bias else [])]
    own = [each.requires_grad_() for each in own]
    exact = [each.double().requires_grad_() for each in (hidden, weight, *([offsets] if bias else []))]
    num_items = options.get("num_items")
    reference_options = {key: value for key, value in options.items() if key not in ("num_items", "max_valid")}
    logits = F.linear(*exact)
    expected = reference_loss(logits, found, reduction=reduction, num_items=num_items, **doubled(reference_options))
    shard = VocabularyShard(dist.group.WORLD, v, first, largest)
    if cuts is None:
        assert shard == VocabularyShard.even(dist.group.WORLD, v)
    outputs = ("predicted_tokens", "token_accuracy")
    with _implementation(triton), counted_collectives() as counts, LargestSeen() as seen:
        result = linear_cross_entropy(
            *own[:2],
            found,
            bias=own[2] if bias else None,
            reduction=reduction,
            tile_bytes=tile_rows * largest * dtype.itemsize,
            outputs=outputs,
            vocab_shard=shard,
            **options,
        )
        upstream = torch.randn(result.loss.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        upstream = upstream.to(device())
        gradients = torch.autograd.grad(result.loss, own, upstream.to(result.loss.dtype))
    expected_gradients = torch.autograd.grad(expected, exact, upstream)
    assert_product_close(result.loss, expected, dtype)
    z = logits.detach() * options.get("logit_scale", 1.0)
    assert torch.equal(result.predicted_tokens, torch.where(found == -100, -1, z.argmax(1)))
    valid = found != -100
    hits = (z.argmax(1) == found)[valid].float().mean() if valid.any() else z.new_zeros((), dtype=torch.float32)
    torch.testing.assert_close(result.token_accuracy, hits)
    for gradient, wanted, each in zip(gradients, expected_gradients, own, strict=True):
        assert gradient.dtype == each.dtype and gradient.shape == each.shape
        assert_part_close(gradient, wanted, slice(None) if each is own[0] else slice(first, end), dtype)
    assert_equal_everywhere(result.loss.detach(), gradients[0])
    return {**counts, "columns": seen.columns, "elements": seen.elements, "largest": largest}


def assert_part_close(gradient: Tensor, wanted: Tensor, rows: slice, dtype: torch.dtype) -> None:
    """A rank's rows of a gradient; the error that is allowed is relative to the largest of all, whoever holds it."""
    largest = wanted.abs().max().view(1)
    ours = torch.cat([gradient.double().flatten(), largest])
    assert_product_close(ours, torch.cat([wanted[rows].flatten(), largest]), dtype)


def assert_equal_everywhere(*tensors: Tensor) -> None:
    """Bit for bit: ranks that drift apart never meet again."""
    for tensor in tensors:
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.contiguous())
        assert all(torch.equal(copy, tensor) for copy in copies)


def log_probs(
    dtype: torch.dtype,
    outputs: Sequence[str] = (),
    *,
    v: int = V,
    n: int = N,
    labels: str = "random",
    frozen_head: bool = False,
    cuts: Sequence[int] | None = None,
    triton: bool = False,
    **options: Any,
) -> dict[str, int]:
    hidden, weight, offsets, found = make(dtype, n, v, labels)
    first, end, largest = bounds(v, cuts)
    own = [hidden.clone(), weight[first:end].clone(), offsets[first:end].clone()]
    exact = [hidden.double(), weight.double(), offsets.double()]
    for tensors in (own, exact):
        for each in tensors[: 1 if frozen_head else 3]:
            each.requires_grad_()
    z = F.linear(*exact) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    log_p = z.log_softmax(-1)
    valid = found != -100
    safe = found.where(valid, 0).unsqueeze(1)
    expected = {
        "log_probs": log_p.gather(1, safe).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "mean_logits": z.mean(1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
    }
    with _implementation(triton), counted_collectives() as counts, LargestSeen() as seen:
        result = linear_log_probs(
            *own[:2],
            found,
            bias=own[2],
            outputs=(*outputs, "top1"),
            vocab_shard=VocabularyShard(dist.group.WORLD, v, first, largest),
            tile_bytes=3 * largest * dtype.itemsize,
            **options,
        )
        names = ("log_probs", *outputs)
        upstreams = torch.randn(len(names), n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        upstreams = upstreams.to(device())
        values = [getattr(result, name) for name in names]
        ours = sum((upstream.to(each.dtype) * each).sum() for each, upstream in zip(values, upstreams))
        wanted_inputs = [each for each in own if each.requires_grad]
        gradients = torch.autograd.grad(ours, wanted_inputs)
    theirs = sum((upstream * expected[name].where(valid, 0)).sum() for name, upstream in zip(names, upstreams))
    expected_gradients = torch.autograd.grad(theirs, [each for each in exact if each.requires_grad])
    for name in names:
        assert_product_close(getattr(result, name), expected[name].where(valid, 0), dtype)
    assert torch.equal(result.top1, valid & (z.argmax(1) == found))
    for gradient, wanted, each in zip(gradients, expected_gradients, wanted_inputs, strict=True):
        assert_part_close(gradient, wanted, slice(None) if each is own[0] else slice(first, end), dtype)
    assert_equal_everywhere(result.log_probs.detach(), gradients[0])
    return {**counts, "columns": seen.columns, "elements": seen.elements, "largest": largest}


def low_rank(dtype: torch.dtype, *, divided: bool, reduction: str = "mean", **options: Any) -> None:
    """An adapter beside a frozen head: each rank has its rows of the second weight, of a DTensor if ``divided``."""
    hidden, weight, _, found = make(dtype)
    first, end, largest = bounds(V, None)
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(n, 5, generator=generator, dtype=torch.float64).to(device(), dtype) for n in (N, V))
    given: dict[str, Any] = {"vocab_shard": VocabularyShard(dist.group.WORLD, V, first, largest)}
    leaves = [each.clone().requires_grad_() for each in (hidden, a, b[first:end])]
    own: Any = weight[first:end]
    if divided:
        mesh = init_device_mesh(device().type, (dist.get_world_size(),), mesh_dim_names=("tp",))
        given, own = {}, distribute_tensor(weight, mesh, [Shard(0)])
        leaves[2] = distribute_tensor(b, mesh, [Shard(0)]).requires_grad_()
    exact = [each.double().requires_grad_() for each in (hidden, a, b)]
    logits = F.linear(exact[0], weight.double()) + exact[1] @ exact[2].t()
    for op, more in ((linear_cross_entropy, {"reduction": reduction}), (linear_log_probs, options)):
        found_loss = op(
            leaves[0],
            own,
            found,
            low_rank=(leaves[1], leaves[2]),
            tile_bytes=3 * largest * dtype.itemsize,
            **given,
            **more,
        )
        expected = reference_loss(logits, found, reduction=reduction if op is linear_cross_entropy else "none")
        expected = expected if op is linear_cross_entropy else -expected
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        upstream = upstream.to(device())
        gradients = list(torch.autograd.grad(found_loss, leaves, upstream.to(found_loss.dtype)))
        wanted = torch.autograd.grad(expected, exact, upstream, retain_graph=True)
        assert_product_close(found_loss, expected, dtype)
        if divided:
            gradients[2] = gradients[2].to_local()
        for gradient, of_all, rows in zip(
            gradients, wanted, (slice(None), slice(None), slice(first, end)), strict=True
        ):
            assert_part_close(gradient, of_all, rows, dtype)
        assert_equal_everywhere(found_loss.detach(), *gradients[:2])


def from_dtensors(hidden_placement: str) -> None:
    """A DTensor weight finds its shard, and its gradient is a DTensor of the same division."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    hidden, weight, offsets, found = make(torch.float64)
    exact = [each.clone().requires_grad_() for each in (hidden, weight, offsets)]
    leaf = hidden.clone().requires_grad_()
    head = [distribute_tensor(each, mesh, [Shard(0)]).requires_grad_() for each in (weight, offsets)]
    given: Any = leaf
    if hidden_placement == "replicated":
        given = DTensor.from_local(leaf, mesh, [Replicate()], run_check=False)
    elif hidden_placement == "sharded":  # sequence parallel: a part of the rows each
        given = leaf = distribute_tensor(hidden, mesh, [Shard(0)]).requires_grad_()
    for op in (linear_cross_entropy, linear_log_probs):
        loss = op(given, head[0], found, bias=head[1], tile_bytes=3 * V * 8).sum()
        log_p = F.linear(*exact).log_softmax(-1)
        expected = F.nll_loss(log_p, found)
        if op is linear_log_probs:
            expected = -F.nll_loss(log_p, found, reduction="sum")
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, [leaf, *head], retain_graph=True)
        for gradient, wanted, each in zip(gradients, torch.autograd.grad(expected, exact), [leaf, *head], strict=True):
            if isinstance(each, DTensor):
                assert isinstance(gradient, DTensor) and gradient.placements == each.placements
                gradient = gradient.full_tensor()
            torch.testing.assert_close(gradient, wanted)


def labels_that_differ() -> tuple[bool, bool]:
    """Whether loss and log-probabilities are NaN where each rank brought labels of its own."""
    hidden, weight, offsets, found = make(torch.float64)
    first, end, _ = bounds(V, None)
    found = torch.where(found == -100, found, (found + 50 * dist.get_rank()) % V)
    options = {"bias": offsets[first:end], "vocab_shard": VocabularyShard.even(dist.group.WORLD, V)}
    loss = linear_cross_entropy(hidden, weight[first:end], found, **options)
    rows = linear_log_probs(hidden, weight[first:end], found, **options)
    return bool(loss.isnan()), bool(rows.isnan().any())


def masked_classes(dtype: torch.dtype, triton: bool) -> None:
    """A bias of -inf on all classes of rank 0, and on a label: as on a whole head."""
    hidden, weight, offsets, found = make(dtype)
    first, end, largest = bounds(V, None)
    offsets[: bounds(V, None)[2]] = -torch.inf
    found = torch.where(found == -100, found, found.clamp(min=largest))
    found[1] = 0
    log_p = F.linear(hidden.double(), weight.double(), offsets.double()).log_softmax(-1)
    with _implementation(triton):
        result = linear_log_probs(
            hidden,
            weight[first:end],
            found,
            bias=offsets[first:end],
            outputs=("entropy", "log_sum_sq_probs"),
            vocab_shard=VocabularyShard.even(dist.group.WORLD, V),
        )
    valid = found != -100
    rows = valid.nonzero().squeeze(1)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.float64 else {}
    wide = result.log_probs.dtype
    torch.testing.assert_close(result.log_probs[rows], log_p[rows, found[rows]].to(wide), **tolerance)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(1)
    torch.testing.assert_close(result.entropy[rows], entropy[rows].to(wide), **tolerance)
    torch.testing.assert_close(result.log_sum_sq_probs[rows], (2 * log_p).logsumexp(1)[rows].to(wide), **tolerance)
