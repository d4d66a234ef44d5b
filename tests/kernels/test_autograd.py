"""What autograd may rely on in every op: a graph runs twice, nothing is written over, differences agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from liger_trainer.kernels import cross_entropy, jsd, kl_div, linear_cross_entropy, linear_jsd, linear_log_probs

from .cases import CASES, MINIMAL, bits, ids, run, strided
from .helpers import assert_close_to_reference
from .loss_reference import assert_product_close

LOSSES = (cross_entropy, jsd, kl_div, linear_cross_entropy, linear_jsd)
HEADS = (linear_cross_entropy, linear_jsd, linear_log_probs)  # matrix products, whose operands are rounded
every_case = pytest.mark.parametrize("case", CASES, ids=ids)
dense_and_strided = pytest.mark.parametrize("layout", [Tensor.contiguous, strided], ids=["dense", "strided"])


def memory(x: Tensor) -> Tensor:
    """A copy of all the memory that x is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.detach().untyped_storage()).clone()


@every_case
def test_a_kept_graph_gives_the_same_gradients_again(implementation, device, case):
    call = case.make(device, torch.float32)
    results = call()
    wanted, leaves = [each for each in results if each.requires_grad], tuple(call.leaves.values())
    upstream = call.upstream(results)
    first = torch.autograd.grad(wanted, leaves, upstream, retain_graph=True)
    copies = [each.clone() for each in first]
    for _ in range(2):
        torch.autograd.backward(wanted, upstream, retain_graph=True)
    last = torch.autograd.grad(wanted, leaves, upstream)
    for leaf, expected, gradient, in_the_end in zip(leaves, copies, first, last, strict=True):
        assert torch.equal(bits(leaf.grad), bits(expected + expected))
        assert torch.equal(bits(gradient), bits(expected))
        assert torch.equal(bits(in_the_end), bits(expected))


@every_case
@dense_and_strided
def test_inputs_results_and_upstream_gradients_are_not_modified(implementation, device, case, layout):
    call = case.make(device, torch.float32, layout=layout)
    inputs = [each for each in call.tensors.values() if each is not None]

    def state(tensors):
        return [(each._version, memory(each)) for each in tensors]

    def assert_unchanged(tensors, before):
        for each, (version, values) in zip(tensors, before, strict=True):
            assert each._version == version
            assert torch.equal(memory(each), values)

    before = state(inputs)
    results = call()
    assert_unchanged(inputs, before)
    upstream = call.upstream(results)
    seen = *inputs, *results, *upstream
    before = state(seen)
    for retain_graph in (True, False):
        wanted = [each for each in results if each.requires_grad]
        torch.autograd.grad(wanted, list(call.leaves.values()), upstream, retain_graph=retain_graph)
        assert_unchanged(seen, before)


@pytest.mark.parametrize("case", [case for case in CASES if case.op not in LOSSES or "none-" in case.name], ids=ids)
def test_an_expanded_upstream_gradient_is_as_good_as_a_dense_one(implementation, device, case):
    call = case.make(device, torch.float32)
    ones = [torch.ones_like(each) for each in call() if each.requires_grad]
    expanded = [torch.ones((), device=device).expand(each.shape) for each in ones]
    dense, same = run(call, ones), run(call, expanded)
    for name, expected in dense.items():
        assert torch.equal(bits(same[name]), bits(expected)), name


@pytest.mark.parametrize("case", [case for case in CASES if not case.constant_factor], ids=ids)
@dense_and_strided
def test_gradcheck(case, layout):
    call = case.make("cpu", torch.float64, MINIMAL, layout)
    names, leaves = zip(*call.leaves.items(), strict=True)

    def differentiable(*values):
        results = replace(call, tensors={**call.tensors, **dict(zip(names, values, strict=True))})()
        return tuple(each for each in results if each.requires_grad)

    assert torch.autograd.gradcheck(differentiable, leaves)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@every_case
@dense_and_strided
def test_triton_equals_the_torch_implementation(implementation, device, case, layout):
    call = case.make(device, torch.float32, layout=layout)

    def exact(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x if x is None else x.cpu()
        return x.detach().cpu().double().requires_grad_(x.requires_grad)

    # float64 on the CPU is the torch implementation's in either case.
    reference = replace(call, tensors={name: exact(x) for name, x in call.tensors.items()}, layout=Tensor.contiguous)
    upstream = call.upstream(call())
    ours, theirs = run(call, upstream), run(reference, [each.cpu().double() for each in upstream])
    compare = assert_product_close if case.op in HEADS else assert_close_to_reference
    for name, result in ours.items():
        if result.is_floating_point():
            compare(result, theirs[name], torch.float32)
        else:
            assert torch.equal(result.cpu(), theirs[name])
