"""Residual additions joined with norms: what is recognised, that it runs, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from liger_trainer import apply_liger_kernel, is_patched, kernels, plan, revert
from liger_trainer.patching import residual_forward
from liger_trainer.patching.norm import Eps, Formula, Recognised, _joined
from liger_trainer.patching.residual_forward import Joints, joints_of
from tests.patching.test_norm_recogniser import KNOWN

SIZE = 16
NAME = "fused_add_rms_norm"


class RMSNorm(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.eps = eps

    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.block1, self.block2 = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.drop, self.scale, self.flag = nn.Dropout(0.5), 0.7, True


class PreNorm(Layer):
    joints = Joints(("norm2",), ("norm1",))

    def forward(self, x, *, bias: float = 0.25):
        residual = x
        x = self.norm1(x)
        x = self.block1(x) + bias
        x = residual + x
        residual = x
        x = self.norm2(x)
        x = self.block2(x)
        return residual + x


class Scaled(Layer):
    joints = Joints(("norm2",), ("norm1",))

    def forward(self, x):
        kept = x
        normed = self.norm1(x)
        x = kept + self.drop(self.block1(normed)) * self.scale
        y = self.norm2(x)
        return x + self.block2(y), (y, kept)


class InOneStatement(Layer):
    joints = Joints(("norm2",), ())

    def forward(self, x):
        x = x + self.block1(self.norm1(x))
        return x + self.block2(self.norm2(x))


class Parallel(Layer):
    joints = Joints((), ("norm1",))

    def forward(self, x):
        residual = x
        x = self.norm1(x)
        return residual + self.block1(x) + self.block2(x)


class InABranch(Layer):
    joints = Joints(("norm2",), ("norm1",))

    def forward(self, x):
        if self.flag:
            residual = x
            x = self.norm1(x)
            x = residual + self.block1(x)
            x = self.norm2(x)
        return self.block2(x)


class OnlySometimes(Layer):
    joints = Joints()

    def forward(self, x):
        x = x + self.block1(x)
        x = self.norm2(x) if self.flag else x
        y = self.block2(x)
        y += x
        return self.norm1(y)


class NotOfTheSum(Layer):
    joints = Joints()

    def forward(self, x):
        y = x + self.block1(x)
        z = self.norm1(x)
        y, w = y + z, z
        w = self.norm2(y)
        return y * w


class OfTwo(Layer):
    joints = Joints()

    def forward(self, x):
        x = x + self.block1(x)
        return self.norm1(x) + self.norm2(x)


class InOneBlock(PreNorm):
    def forward(self, x):
        residual = x
        x = self.norm1(x)
        x = residual + self.block1(x)
        residual = x
        x = self.norm2(x)
        return residual + self.block2(x)


LAYERS = [PreNorm, Scaled, InOneStatement, Parallel, InABranch, OnlySometimes, NotOfTheSum, OfTwo]


class Calls:
    """Counts the calls of the two kernels."""

    def __init__(self, monkeypatch):
        self.counts = {}
        for name in ("add_rms_norm", "rms_norm_and_residual"):
            self.counts[name] = 0
            monkeypatch.setattr(kernels, name, self.counted(name, getattr(kernels, name)))

    def counted(self, name, function):
        def call(*args, **options):
            self.counts[name] += 1
            return function(*args, **options)

        return call

    def taken(self):
        counts = tuple(self.counts.values())
        self.counts = dict.fromkeys(self.counts, 0)
        return counts


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def run(layer, x, **inputs):
    """The outputs and gradients of layer."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    outputs = layer(x, **inputs)
    flat = [outputs] if isinstance(outputs, torch.Tensor) else [outputs[0], *outputs[1]]
    loss = sum((output.double() * (i + 2)).sin().sum() for i, output in enumerate(flat))
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*flat, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


def patched(layer, **options):
    copied = copy.deepcopy(layer)
    return copied, apply_liger_kernel(copied, fused_linear_cross_entropy=False, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_recognised(kind, calls):
    torch.manual_seed(0)
    layer, x = kind(), torch.randn(2, 5, SIZE)
    assert joints_of(kind.forward) == kind.joints
    model, report = patched(layer)
    calls.taken()
    torch.testing.assert_close(run(model, x), run(layer, x), rtol=1e-5, atol=1e-5)
    assert calls.taken() == (len(kind.joints.added), len(kind.joints.forked))
    assert report.counts().get(NAME, 0) == bool(kind.joints.names)
    assert type(model) is kind
    revert(model)
    assert "forward" not in vars(model)
    assert not model._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(run(model, x), run(layer, x), strict=True))


def test_arguments_and_defaults_are_the_same():
    layer, x = PreNorm(), torch.randn(2, 5, SIZE)
    model, report = patched(layer)
    torch.testing.assert_close(run(model, x, bias=1.5), run(layer, x, bias=1.5), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="positional argument"):
        model(x, 1.5)
    (entry,) = [entry for entry in report.replaced if entry.kind == NAME]
    assert (entry.class_name, entry.kernel) == ("PreNorm", "add_rms_norm(1 added, 1 kept)")
    assert entry.checked == ("float32", "bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_forward_rounds_where_it_did(dtype):
    """Bit for bit the norms' own kernels; the gradients round once less."""
    torch.manual_seed(0)
    layer, x = PreNorm().to(dtype), torch.randn(64, SIZE, dtype=dtype)
    (joined, _), (separate, _) = patched(layer), patched(layer, fused_add_rms_norm=False)
    assert torch.equal(joined(x), separate(x))
    exact = run(copy.deepcopy(layer).double(), x.double())
    for ours, theirs, truth in zip(run(joined, x), run(separate, x), exact, strict=True):
        assert (ours.double() - truth).norm() <= 1.2 * (theirs.double() - truth).norm() + 1e-3 * truth.norm()


class Between(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.norm1, self.norm2 = make(), make()

    def forward(self, x):
        residual = x
        x = self.norm1(x)
        x = residual + x * 0.5
        total = x
        x = self.norm2(x)
        return x, (total,)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32,) * 2], ids=str
)
@pytest.mark.parametrize(("make", "kernel"), KNOWN[:11])
def test_mixed_dtypes_and_autocast_give_what_the_statements_give(make, kernel, dtypes, autocast):
    """With every kind of RMS norm; where its kernel must not serve, nor must the joined one."""
    assert kernel.startswith("rms_norm")
    x_dtype, weight_dtype = dtypes
    layer = Between(make).to(weight_dtype)
    model, report = patched(layer)
    assert report.counts()[NAME] == 1
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            theirs = run(layer, x)
        except RuntimeError:
            pytest.skip("PyTorch refuses this combination")
        ours = run(model, x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()


class Additions(TorchDispatchMode):
    """Counts additions of whole tensors; those inside of a kernel are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and result.dim() > 1
        return result


@pytest.mark.parametrize(("joined", "forward", "backward"), [(True, 1, 0), (False, 2, 2)])
def test_nothing_is_added_outside_of_the_kernels(joined, forward, backward):
    """But for what leaves the layer."""
    model, _ = patched(InOneBlock(), fused_add_rms_norm=joined)
    x = torch.randn(2, 5, SIZE, requires_grad=True)
    with Additions() as additions:
        y = model(x)
        assert additions.count == forward
        torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))
        assert additions.count == forward + backward


class TestModels:
    FAMILIES = ("Llama", "Gemma2", "Qwen3", "Phi3")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_layer_is_joined(self, tiny, batch, gradients, error, calls, family):
        reference = tiny(family)
        model = copy.deepcopy(reference)
        report = apply_liger_kernel(model)
        layers = len(model.model.layers)
        assert report.counts()[NAME] == layers
        calls.taken()
        assert error(gradients(model, batch), gradients(reference, batch)) < 1e-5
        assert calls.taken() == (layers, layers)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("derived", [False, True], ids=["plain", "fsdp2"])
    def test_gradient_checkpointing_still_checkpoints(self, tiny, batch, gradients, error, calls, reentrant, derived):
        reference = tiny("Llama")
        model = copy.deepcopy(reference)
        apply_liger_kernel(model)
        if derived:  # what fully_shard does to the class of a module
            for layer in model.model.layers:
                layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
        for each in (reference, model):
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls.taken()
        assert error(gradients(model, batch), gradients(reference, batch)) < 1e-5
        layers = len(model.model.layers)
        added, forked = calls.taken()
        assert added == 2 * layers  # again in the backward
        assert forked == (2 * layers)

    def test_copies_pickles_and_replicas(self, tiny, batch, gradients, error, calls):
        reference = tiny("Llama")
        model = copy.deepcopy(reference)
        apply_liger_kernel(model)
        theirs = gradients(reference, batch)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        calls.taken()
        assert error(gradients(copied, batch), theirs) < 1e-5
        assert calls.taken() == (2, 2)
        loaded = pickle.loads(pickle.dumps(copied))
        assert not is_patched(loaded)
        assert error(gradients(loaded, batch), theirs) == 0
        assert calls.taken() == (0, 0)
        assert apply_liger_kernel(loaded).counts()[NAME] == 2
        for each in (copied, loaded):
            revert(each)
            assert not {"forward", "_replicate_for_data_parallel"} & vars(each.model.layers[0]).keys()
            assert error(gradients(each, batch), theirs) == 0

    def test_a_replica_of_data_parallel_runs_on_its_own_weights(self, tiny, batch):
        model = tiny("Llama").eval()
        expected = model(**batch).logits * 1
        apply_liger_kernel(model)
        modules = list(model.modules())
        replicas = {module: module._replicate_for_data_parallel() for module in modules}
        for module, replica in replicas.items():
            for name, child in module._modules.items():
                replica._modules[name] = replicas[child] if child is not None else None
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter.detach().clone())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.testing.assert_close(replicas[model](**batch).logits, expected, rtol=1e-4, atol=1e-4)

    def test_hidden_states_keep_their_gradients(self, tiny, batch):
        """What a layer hands on is no tensor that a norm has changed the history of."""
        reference = tiny("Llama")
        model = copy.deepcopy(reference)
        apply_liger_kernel(model)
        found = []
        for each in (reference, model):
            outputs = each(**batch, output_hidden_states=True)
            found.append(torch.autograd.grad(outputs.loss, outputs.hidden_states))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

    def test_autocast(self, tiny, batch, gradients, error):
        model = tiny("Llama")
        joined = copy.deepcopy(model)
        apply_liger_kernel(model, fused_add_rms_norm=False)
        apply_liger_kernel(joined)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(gradients(joined, batch), gradients(model, batch)) < 0.03


class TestLeftToTheStatements:
    """Where the kernel must not serve, the two operations run as they were."""

    def test_hooks_on_a_norm_see_what_they_would_see(self, calls):
        layer, x = PreNorm(), torch.randn(2, 5, SIZE)
        model, _ = patched(layer)
        seen = []
        for each in (layer, model):
            for norm in (each.norm1, each.norm2):
                norm.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        calls.taken()
        torch.testing.assert_close(run(model, x), run(layer, x), rtol=1e-5, atol=1e-5)
        assert calls.taken() == (0, 0)
        assert len(seen) == 4
        torch.testing.assert_close(seen[:2], seen[2:], rtol=1e-5, atol=1e-5)

    def test_a_norm_that_was_wrapped_since(self, calls):
        layer, x = PreNorm(), torch.randn(2, 5, SIZE)
        model, _ = patched(layer)
        norm = model.norm2
        norm.forward = lambda x: type(norm).forward(norm, x) * 1  # as accelerate's hooks do
        model.norm1 = nn.Sequential(model.norm1)  # as adapters do
        calls.taken()
        torch.testing.assert_close(run(model, x), run(layer, x), rtol=1e-5, atol=1e-5)
        assert calls.taken() == (0, 0)

    def test_a_sum_that_broadcasts(self, calls):
        class Positions(Layer):
            def forward(self, x):
                x = x + self.norm1.weight * 1
                return self.norm2(x)

        layer, x = Positions(), torch.randn(2, 5, SIZE)
        model, report = patched(layer)
        assert report.counts()[NAME] == 1
        calls.taken()
        torch.testing.assert_close(run(model, x), run(layer, x), rtol=1e-5, atol=1e-5)
        assert calls.taken() == (0, 0)

    def test_a_norm_whose_kernel_does_not_serve_under_autocast(self, calls):
        found = Recognised(
            Formula("rms_norm", 0.0, "llama"), Eps("eps"), weighted=True, biased=False, not_autocast=True
        )
        add, fork = _joined(found)
        norm, x = RMSNorm(), torch.randn(5, SIZE)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(add(norm, x, x)[0], norm(x + x))
            assert torch.equal(fork(norm, x)[0], norm(x))
        assert calls.taken() == (0, 0)
        add(norm, x, x), fork(norm, x)
        assert calls.taken() == (1, 1)


class TestLeftAlone:
    def skipped(self, layer):
        return [entry.reason for entry in plan(layer).skipped if entry.kind == NAME]

    def test_a_forward_on_the_instance(self):
        layer = PreNorm()
        layer.forward = lambda x: x
        assert self.skipped(layer) == ["its forward is set on the instance, as device hooks and kernelize do"]

    def test_a_kernel_that_is_wrong_in_one_of_its_results(self, monkeypatch):
        real = kernels.rms_norm_and_residual

        def wrong(x, *args, **options):
            y, residual = real(x, *args, **options)
            return y, residual.detach() + 0 * x

        monkeypatch.setattr(kernels, "rms_norm_and_residual", wrong)
        (reason,) = self.skipped(PreNorm())
        assert reason.startswith("gradient differs by")

    def test_a_source_that_is_not_what_runs(self):
        class Changed(PreNorm):
            forward = PreNorm.forward

        forward = Changed.forward
        renamed = forward.__code__.replace(
            co_consts=tuple(0.5 if each == 0.25 else each for each in forward.__code__.co_consts),
            co_names=tuple("block1" if each == "block2" else each for each in forward.__code__.co_names),
        )
        Changed.forward = type(forward)(renamed, forward.__globals__, "forward", None)
        assert joints_of(Changed.forward) == Joints()
        made = {}
        exec("def forward(self, x):\n    r = x\n    x = self.norm1(x)\n    return r + x", made)
        assert joints_of(made["forward"]) == Joints()

    def test_a_decorator_that_hides_what_it_decorates(self):
        class Hidden(PreNorm):
            def forward(self, x):
                return {"forward": PreNorm.forward}["forward"](self, x)

        Hidden.forward.__wrapped__ = PreNorm.forward
        assert self.skipped(Hidden()) == ["a decorator of its forward hides what it decorates"]

    def test_switched_off(self):
        for options in ({"fused_add_rms_norm": False}, {"rms_norm": False}):
            assert NAME not in plan(PreNorm(), **options).counts()
        with pytest.raises(TypeError, match=NAME):
            plan(PreNorm(), fused_add_rms_norm=1)


def test_a_compiled_layer_is_one_graph(calls):
    torch.compiler.reset()
    layer, x = PreNorm(), torch.randn(2, 5, SIZE)
    model, _ = patched(layer)
    expected = run(layer, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-5, atol=1e-5)


def test_tracebacks_show_the_lines_of_the_source():
    code = residual_forward.joined(PreNorm.forward).__code__
    assert code.co_filename == __file__
    assert {line for *_, line in code.co_lines() if line} <= {
        line for *_, line in PreNorm.forward.__code__.co_lines() if line
    }
