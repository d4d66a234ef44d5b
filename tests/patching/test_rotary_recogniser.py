from __future__ import annotations

import functools
import inspect
import types

import pytest
import torch
from torch import nn

from liger_trainer import kernels
from liger_trainer.patching import apply_liger_kernel, is_patched, plan, revert

OPTIONS = {"fused_linear_cross_entropy": False}
ONLY_ROPE = {"rms_norm": False, "mlp": False, "layer_norm": False, **OPTIONS}


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def half(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def heads_last(query, key, c, s, unsqueeze_dim=2):
    return half(query, key, c, s, unsqueeze_dim)


def positioned(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return half(q, k, cos, sin, unsqueeze_dim)


def without_option(q, k, cos, sin):
    return half(q, k, cos, sin)


def neighbours(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_neighbours(q) * sin, k * cos + rotate_neighbours(k) * sin


def neighbours_half_tables(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = (t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
    return neighbours(q, k, cos, sin, unsqueeze_dim)


def in_float(q, k, cos, sin, unsqueeze_dim=1):
    new_q, new_k = half(q.float(), k.float(), cos.float(), sin.float(), unsqueeze_dim)
    return new_q.to(q.dtype), new_k.to(k.dtype)


def partial(q, k, cos, sin, unsqueeze_dim=1):
    width = cos.shape[-1]
    new_q, new_k = half(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim)
    return torch.cat((new_q, q[..., width:]), -1), torch.cat((new_k, k[..., width:]), -1)


def reversed_turn(q, k, cos, sin, unsqueeze_dim=1):
    return half(q, k, cos, -sin, unsqueeze_dim)


def split(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    q, k = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
    return half(q, k, cos, sin, unsqueeze_dim)


def split_half_tables(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = (t[..., : t.shape[-1] // 2].repeat(1, 1, 2) for t in (cos, sin))
    return split(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def missing_defaults(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
    if k is None:
        return half(q, q, cos, sin, unsqueeze_dim)[0]
    return half(q, k, cos, sin, unsqueeze_dim)


def a_column_a_pair(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return turn(q), turn(k)


def complex_heads_last(xq, xk, freqs_cis):
    def turn(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs_cis[:, :, None, :]).flatten(3).type_as(x)

    return turn(xq), turn(xk)


def complex_one_table(query, key, freqs_ci):
    freqs = freqs_ci.view(1, query.shape[1], query.shape[3] // 2)
    return complex_heads_last(query, key, freqs)


def complex_conjugated(xq, xk, freqs_cis):
    return complex_heads_last(xq, xk, freqs_cis.conj())


def wrong_sign_of_the_second(q, k, cos, sin, unsqueeze_dim=1):
    return half(q, k, cos, torch.cat((sin[..., :6], -sin[..., 6:]), -1), unsqueeze_dim)


def scaled(q, k, cos, sin, unsqueeze_dim=1):
    new_q, new_k = half(q, k, cos, sin, unsqueeze_dim)
    return new_q, new_k * 1.01


def keys_detached(q, k, cos, sin, unsqueeze_dim=1):
    return half(q, k.detach(), cos, sin, unsqueeze_dim)


class Attention(nn.Module):
    head_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)


def attention(function, forward_source="    return {name}(q, k, cos, sin)\n", name="apply_rotary_pos_emb"):
    """An attention module in a module (namespace) of its own that calls function by its global name."""
    namespace = types.ModuleType("an_attention")
    vars(namespace)[name] = function
    exec("def forward(self, q, k, cos, sin):\n" + forward_source.format(name=name), vars(namespace))
    return type("Attention", (Attention,), {"forward": namespace.forward})()


def tensors(dtype=torch.float32, table_dtype=None, head_dim=12, width=None, place=1):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, head_dim, generator=generator).to(dtype) for heads in (6, 3))
    cos, sin = (torch.randn(2, 5, width or head_dim, generator=generator).to(table_dtype or dtype) for _ in range(2))
    q, k = (t if place == 1 else t.transpose(1, 2) for t in (q, k))
    return [t.requires_grad_() for t in (q, k)] + [cos, sin]


def run(function, inputs):
    outputs = function(*inputs)
    upstream = [torch.linspace(0, 99, y.numel()).cos().bfloat16().view(y.shape).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs[:2], upstream)]


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel."""
    seen, rotary = [], kernels.rotary

    def counted(*args, **options):
        seen.append(options)
        return rotary(*args, **options)

    monkeypatch.setattr(kernels, "rotary", counted)
    return seen


def assert_served(module, inputs, kernel, calls, tolerance=1e-6):
    """The module is patched with kernel, gives what it gave, and the kernel ran once."""
    theirs = run(module, inputs)
    report = apply_liger_kernel(nn.ModuleDict({"attn": module}))
    assert [(entry.path, entry.kernel) for entry in report.replaced] == [("attn", kernel)]
    calls.clear()
    assert_same(run(module, inputs), theirs, tolerance)
    assert len(calls) == 1


KNOWN = [
    (half, "rotary", 1),
    (heads_last, "rotary", 2),
    (positioned, "rotary", 1),
    (without_option, "rotary", 1),
    (neighbours, "rotary(interleaved)", 1),
    (neighbours_half_tables, "rotary(interleaved)", 1),
    (in_float, "rotary", 1),
    (partial, "rotary", 1),
    (reversed_turn, "rotary(reversed)", 1),
    (split, "rotary(interleaved, split)", 1),
    (split_half_tables, "rotary(interleaved, split)", 1),
    (missing_defaults, "rotary", 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("function", "kernel", "place"), KNOWN)
def test_known_functions(function, kernel, place, dtype, calls):
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert_served(attention(function).to(dtype), tensors(dtype, place=place), kernel, calls, tolerance)


@pytest.mark.parametrize(("function", "kernel", "place"), KNOWN)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_give_what_the_original_gives(function, kernel, place, dtypes):
    module = attention(function)
    inputs = tensors(*dtypes, place=place)
    theirs = run(module, inputs)
    apply_liger_kernel(nn.ModuleDict({"attn": module}))
    assert_same(run(module, inputs), theirs, 1e-2)


def test_narrow_tables_rotate_only_where_the_original_does(calls):
    for function, served in ((partial, 1), (half, 0)):
        module = attention(function)
        apply_liger_kernel(nn.ModuleDict({"attn": module}))
        inputs = tensors(width=8)
        calls.clear()
        if served:
            assert_same(run(module, inputs), run(function, inputs), 1e-6)
        else:
            with pytest.raises(RuntimeError):  # the original's own error
                module(*inputs)
        assert len(calls) == served


def test_what_the_kernel_does_not_take_goes_to_the_original(calls):
    source = "    return {name}(q, k, cos, sin, unsqueeze_dim=0 if cos.dim() == 2 else 1)\n"
    module = attention(half, source)
    apply_liger_kernel(nn.ModuleDict({"attn": module}))
    calls.clear()
    q, k, cos, sin = tensors()
    assert_same(module(q, k, cos[0], sin[0]), half(q, k, cos[0], sin[0], 0), 0)
    learned = cos.clone().requires_grad_()
    module(q, k, learned, sin)[0].sum().backward()
    assert learned.grad is not None
    assert not calls
    module(q, k, cos, sin)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["q", "cos"])
def test_arguments_by_name(name, calls):
    source = {
        "q": "    return {name}(k=k, q=q, sin=sin, cos=cos, unsqueeze_dim=1)\n",
        "cos": "    return {name}(q, k, sin=sin, cos=cos)\n",
    }[name]
    module = attention(half, source)
    inputs = tensors()
    apply_liger_kernel(nn.ModuleDict({"attn": module}))
    calls.clear()
    assert_same(run(module, inputs), run(half, inputs), 1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "function", [wrong_sign_of_the_second, scaled, keys_detached, lambda q, k, cos, sin: (q, k), complex_conjugated]
)
def test_what_only_looks_like_rotary_is_left_alone(function):
    three = len(inspect.signature(function).parameters) == 3
    module = attention(function, "    return {name}(q, k, cos)\n" if three else "    return {name}(q, k, cos, sin)\n")
    (entry,) = plan(nn.ModuleDict({"attn": module})).skipped
    assert entry.kind == "rope"
    assert entry.reason == "apply_rotary_pos_emb: computes none of the known rotations"


def test_other_signatures_are_left_alone():
    def single(x, cos, sin, place=1):
        return x

    source = "    return {name}(q, cos, sin), {name}(k, cos, sin)\n"
    (entry,) = plan(nn.ModuleDict({"attn": attention(single, source)})).skipped
    assert "takes (x, cos, sin, place=1), not (q, k, cos, sin)" in entry.reason


def one(x, cos, sin, unsqueeze_dim=1):
    """As Gemma 3n and Gemma 4 have it."""
    return half(x, x, cos, sin, unsqueeze_dim)[0]


def one_heads_last(hidden, cos, sin, unsqueeze_dim=2):
    return one(hidden, cos, sin, unsqueeze_dim)


def one_first_part(x, cos, sin, unsqueeze_dim=1):
    return partial(x, x, cos, sin, unsqueeze_dim)[0]


def one_last_part(x, cos, sin, unsqueeze_dim=1):
    """As DeepSeek-V4 has it."""
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
    still, turned = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    turned = neighbours(turned.float(), turned.float(), cos, sin, unsqueeze_dim)[0].to(x.dtype)
    return torch.cat([still, turned], dim=-1)


ONE_AT_A_TIME = [
    (one, "rotary", 1, (12,)),
    (one_heads_last, "rotary", 2, (12,)),
    (one_first_part, "rotary", 1, (12, 8)),
    (one_last_part, "rotary(interleaved)", 1, (6, 2)),
]
ONE_AND_ONE = "    return {name}(q, cos, sin), {name}(k, cos=cos, sin=sin, unsqueeze_dim=%d)\n"


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize(("function", "kernel", "place", "widths"), ONE_AT_A_TIME)
def test_one_tensor_at_a_time(function, kernel, place, widths, dtypes, calls):
    module = attention(function, ONE_AND_ONE % place)
    cases = [tensors(*dtypes, width=width, place=place) for width in widths]
    theirs = [run(module, inputs) for inputs in cases]
    report = apply_liger_kernel(nn.ModuleDict({"attn": module}))
    assert [(entry.path, entry.kernel) for entry in report.replaced] == [("attn", kernel)]
    calls.clear()
    for inputs, expected in zip(cases, theirs, strict=True):
        assert_same(run(module, inputs), expected, 1e-2 if torch.bfloat16 in dtypes else 1e-6)
    assert len(calls) == 2 * len(cases)


def test_one_tensor_whose_tables_are_too_narrow_goes_to_the_original(calls):
    module = attention(one, ONE_AND_ONE % 1)
    apply_liger_kernel(nn.ModuleDict({"attn": module}))
    calls.clear()
    with pytest.raises(RuntimeError):  # the original's own error
        module(*tensors(width=8))
    assert not calls


def test_one_tensor_and_learned_tables_go_to_the_original(calls):
    module = attention(one, "    return {name}(q, cos, sin, unsqueeze_dim=2), {name}(k, cos, sin, 2)\n")
    q, k, cos, sin = tensors(place=2)
    cos.requires_grad_()
    theirs = run(module, [q, k, cos, sin])
    apply_liger_kernel(nn.ModuleDict({"attn": module}))
    calls.clear()
    assert_same(run(module, [q, k, cos, sin]), theirs, 0)
    assert not calls


@pytest.mark.parametrize(
    "function", [lambda x, cos, sin, unsqueeze_dim=1: x, lambda x, cos, sin, unsqueeze_dim=1: 1.01 * one(x, cos, sin)]
)
def test_what_does_not_rotate_one_tensor_is_left_alone(function):
    (entry,) = plan(nn.ModuleDict({"attn": attention(function, ONE_AND_ONE % 1)})).skipped
    assert entry.reason == "apply_rotary_pos_emb: computes none of the known rotations"


def test_a_wrong_kernel_for_one_tensor_is_found_out(monkeypatch):
    rotary = kernels.rotary
    monkeypatch.setattr(kernels, "rotary", lambda q, k, *args, **options: rotary(1.02 * q, k, *args, **options))
    assert not plan(nn.ModuleDict({"attn": attention(one, ONE_AND_ONE % 1)})).replaced


def test_a_column_a_pair(calls):
    assert_served(attention(a_column_a_pair), tensors(width=6), "rotary", calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "rows"), [(complex_heads_last, 2), (complex_heads_last, 1), (complex_one_table, 1)]
)
def test_complex_tables(function, rows, dtype, calls):
    module = attention(function, "    return {name}(q, k, torch.complex(cos, sin))\n").to(dtype)
    module.forward.__globals__["torch"] = torch
    q, k, cos, sin = tensors(dtype, torch.float32, width=6, place=2)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert_served(module, [q, k, cos[:rows], sin[:rows]], "rotary(complex)", calls, tolerance)


def test_a_table_for_each_sequence_goes_to_the_original_that_takes_none(calls):
    module = attention(complex_one_table, "    return {name}(q, k, torch.complex(cos, sin))\n")
    module.forward.__globals__["torch"] = torch
    apply_liger_kernel(nn.ModuleDict({"attn": module}))
    calls.clear()
    with pytest.raises(RuntimeError, match="invalid for input of size"):  # the original's own error
        module(*tensors(width=6, place=2))
    assert not calls


def test_missing_keys_go_to_the_original(calls):
    module = attention(missing_defaults, "    return {name}(q, cos=cos, sin=sin), {name}(q, k, cos, sin)[1]\n")
    inputs = tensors()
    theirs = run(module, inputs)
    apply_liger_kernel(nn.ModuleDict({"attn": module}))
    calls.clear()
    assert_same(run(module, inputs), theirs, 1e-6)
    assert len(calls) == 1


def test_two_functions_in_one_forward(calls):
    source = "    q, k = {name}(q, k, cos, sin)\n    return apply_rotary_split(q, k, cos, sin)\n"
    module = attention(half, source)
    module.forward.__globals__["apply_rotary_split"] = split
    inputs = tensors()
    theirs = run(module, inputs)
    report = apply_liger_kernel(nn.ModuleDict({"attn": module}))
    assert [entry.kernel for entry in report.replaced] == ["rotary or rotary(interleaved, split)"]
    calls.clear()
    assert_same(run(module, inputs), theirs, 1e-6)
    assert len(calls) == 2
    revert(module)
    assert_same(run(module, inputs), theirs, 0)


def test_functions_of_four_arguments_that_are_no_rotary_are_passed_over():
    model = nn.ModuleDict({"attn": attention(lambda q, k, cos, sin: (q, k), name="combine")})
    assert not plan(model).skipped


def test_decorators_of_a_forward_stay(calls):
    """As those of transformers that rename an argument."""
    module, inputs = attention(half), tensors()
    theirs, seen = run(module, inputs), []

    def noting(mark):
        def decorate(function):
            @functools.wraps(function)
            def wrapper(self, *args, **kwargs):
                seen.append(mark)
                return function(self, *args, **kwargs)

            return wrapper

        return decorate

    stock = type(module).forward = noting("outer")(noting("inner")(type(module).forward))
    apply_liger_kernel(module)
    assert_same(run(module, inputs), theirs, 1e-6)
    served = len(calls)
    assert served and seen == ["outer", "inner"]
    assert inspect.signature(type(module).forward) == inspect.signature(stock)
    revert(module)
    assert type(module).forward is stock
    assert_same(run(module, inputs), theirs, 0)
    assert len(calls) == served


def test_a_forward_that_a_decorator_hides_is_left_alone():
    module = attention(half)
    inner = {"function": type(module).forward}

    @functools.wraps(inner["function"])
    def wrapper(self, *args):
        return inner["function"](self, *args)

    type(module).forward = wrapper
    (entry,) = plan(nn.ModuleDict({"attn": module})).skipped
    assert entry.reason == "apply_rotary_pos_emb: a decorator of its forward hides what it decorates"


def test_a_name_with_another_use_is_left_alone():
    source = "    self.proj.{name} = 1\n    return {name}(q, k, cos, sin)\n"
    (entry,) = plan(nn.ModuleDict({"attn": attention(half, source)})).skipped
    assert "for something else as well" in entry.reason


def test_a_forward_set_on_the_instance_is_left_alone():
    module = attention(half)
    module.forward = module.forward
    (entry,) = plan(nn.ModuleDict({"attn": module})).skipped
    assert "set on the instance" in entry.reason


def test_a_function_that_was_made_a_module():
    """The ``kernels`` package, where it is installed, makes modules of decorated functions."""

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return half(*args, **kwargs)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += inspect.signature(half).parameters.values()
    Func.forward.__signature__ = inspect.Signature(parameters)
    module, inputs = attention(Func()), tensors()
    assert apply_liger_kernel(nn.ModuleDict({"attn": module})).counts() == {"rope": 1}
    assert_same(run(module, inputs), run(half, inputs), 1e-6)
    revert(module)
    function = type(module).forward.__globals__["apply_rotary_pos_emb"]
    function.forward = half  # what kernelize does
    (entry,) = plan(nn.ModuleDict({"attn": module})).skipped
    assert "replaced by another kernel already" in entry.reason


def test_forward_keeps_its_signature_defaults_and_globals(tiny):
    model = tiny("Llama")
    attn = model.model.layers[0].self_attn
    before = type(attn).forward
    inner = inspect.unwrap(before)
    rotary_function = inner.__globals__["apply_rotary_pos_emb"]
    apply_liger_kernel(model, **ONLY_ROPE)
    after = type(attn).forward
    assert inspect.signature(after) == inspect.signature(before)
    assert inspect.unwrap(after).__globals__ is inner.__globals__
    assert inner.__globals__["apply_rotary_pos_emb"] is rotary_function
    assert after.__annotations__ == before.__annotations__
    assert inspect.unwrap(after) is not inner
    assert hasattr(after, "__wrapped__") == hasattr(before, "__wrapped__")  # decorators, as those of transformers 5.24


@pytest.mark.parametrize(
    ("patched", "compiled"),
    [([0], False), ([1], False), ([0, 2], False), ([0, 1, 2], False), ([1], True), ([0, 2], True)],
)
def test_any_subset_of_layers(tiny, batch, gradients, error, calls, patched, compiled):
    torch.compiler.reset()
    model = tiny("Phi3")
    theirs = gradients(model, batch)
    for index in patched:
        apply_liger_kernel(model.model.layers[index], **ONLY_ROPE)
    assert [is_patched(layer) for layer in model.model.layers] == [i in patched for i in range(3)]
    calls.clear()
    run_model = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in gradients(run_model, batch).items()}
    assert error(ours, theirs) < 5e-6
    if not compiled:
        assert len(calls) == len(patched)


def test_only_the_swapped_layers_of_a_compiled_model_use_the_kernel(tiny, batch, monkeypatch):
    """A wrong kernel in one layer must show, and in no other place."""
    torch.compiler.reset()
    model, rotary = tiny("Llama"), kernels.rotary
    apply_liger_kernel(model.model.layers[1], **ONLY_ROPE)
    monkeypatch.setattr(kernels, "rotary", lambda q, k, *_, **__: (2 * q, k))
    inputs = batch["input_ids"]
    expected = model(inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(kernels, "rotary", rotary)
    assert not torch.allclose(model(inputs).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_subset_of_layers_under_checkpointing(tiny, batch, gradients, error, reentrant):
    model = tiny("Llama")
    theirs = gradients(model, batch)
    apply_liger_kernel(model.model.layers[1], **ONLY_ROPE)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert error(gradients(model, batch), theirs) < 5e-6


def no_rotation(q, k, cos, sin, **options):
    return q.clone(), k.clone()


def keys_swapped(q, k, cos, sin, **options):
    return rotary(q, k, sin, cos, **options)


def no_backward(q, k, cos, sin, **options):
    new_q, new_k = rotary(q, k, cos, sin, **options)
    return new_q.detach() + q - q.detach(), new_k


rotary = kernels.rotary


@pytest.mark.parametrize("wrong", [no_rotation, keys_swapped, no_backward])
def test_a_wrong_kernel_is_found_out(tiny, monkeypatch, wrong):
    monkeypatch.setattr(kernels, "rotary", wrong)
    report = apply_liger_kernel(tiny("Llama"), **OPTIONS)
    assert report.counts() == {"rms_norm": 5, "fused_add_rms_norm": 2, "mlp": 2}
    assert [entry.kind for entry in report.skipped] == ["rope", "rope"]
