"""``recompute``: the same gradients, bit for bit, from fewer kept tensors."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import HIDDEN, sequences, tiny_llama
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from liger_trainer import apply_liger_kernel, is_patched, plan, revert
from liger_trainer.patching import recompute

ROWS, LENGTH = 2, 13
INTERMEDIATE, LAYERS = 48, 2
LORA = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "up_proj", "down_proj"]}


class Made(TorchDispatchMode):
    """Counts the bytes of what operations made inside and something still keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def kept(self, model: nn.Module | None = None) -> int:
        """The bytes of what is kept by now, without model's parameters, of which there are views."""
        gc.collect()
        owned = set() if model is None else {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(size for key, (storage, size) in self.storages.items() if key not in owned and not storage.expired())


def batch() -> dict[str, torch.Tensor]:
    rows = sequences(ROWS, LENGTH)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bytes_kept(model: nn.Module) -> int:
    """What a forward leaves for the backward."""
    with Made() as made:
        loss = model(**batch()).loss
    kept = made.kept()
    del loss
    return kept


def assert_same_bits(model: Any, recompute: str = "cheap", **options: Any) -> Any:
    """Compare the gradients of a patched copy of model that rebuilds with those of one that keeps; return the first."""
    keeps, rebuilds = model, copy.deepcopy(model)
    apply_liger_kernel(keeps, **options)
    apply_liger_kernel(rebuilds, recompute=recompute, **options)
    expected, found = gradients(keeps), gradients(rebuilds)
    assert expected.keys() == found.keys()
    assert expected
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    return rebuilds


# What of a layer is not kept, in numbers a token: two norms' results, and the product. (The last norm's result is not
# kept by the fused head.)
NOT_KEPT = {"norms": 2 * HIDDEN, "cheap": 2 * HIDDEN + INTERMEDIATE}


@pytest.mark.parametrize("option", NOT_KEPT)
def test_llama_keeps_no_norm_and_no_product(option):
    model = tiny_llama().train()
    rebuilds = assert_same_bits(model, option)
    assert bytes_kept(model) - bytes_kept(rebuilds) == LAYERS * ROWS * LENGTH * NOT_KEPT[option] * 4


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
        ("qwen3", {"head_dim": 8}),
        ("mixtral", {"num_local_experts": 4}),
        ("olmo2", {}),
        ("gpt_neox", {}),
    ],
)
@pytest.mark.parametrize("option", NOT_KEPT)
def test_other_layers(model_type, config, option):
    small = {
        "vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**small, **config})).train()
    kept = copy.deepcopy(model)
    rebuilds = assert_same_bits(model, option)
    apply_liger_kernel(kept)
    saved = bytes_kept(kept) - bytes_kept(rebuilds)
    # OLMo 2 norms what its blocks give and not what they are given: no projection keeps that.
    assert saved == 0 if (model_type, option) == ("olmo2", "norms") else saved > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora(dropout):
    model = get_peft_model(tiny_llama(), LoraConfig(**{**LORA, "lora_dropout": dropout})).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert_same_bits(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_what_it_kept(reentrant):
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    rebuilds = assert_same_bits(model)
    kept = []
    for each in (model, rebuilds):
        # At the end of the forward, and not behind it: nothing of a finished segment may wait there either.
        with Made() as made:
            handle = each.lm_head.register_forward_pre_hook(lambda *_, made=made: kept.append(made.kept()))
            each(**batch())
            handle.remove()
    assert kept[0] == kept[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(dtype):
    model = tiny_llama().to(dtype).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert_same_bits(model)


@pytest.mark.parametrize("option", NOT_KEPT)
def test_copies_that_autocast_makes_for_each_projection(option):
    model = tiny_llama().train()
    with torch.autocast("cpu", torch.bfloat16):
        rebuilds = assert_same_bits(model, option)
        # In each layer the norms' results for five projections, not two, in half precision.
        saved = LAYERS * ROWS * LENGTH * (3 * HIDDEN + NOT_KEPT[option]) * 2
        assert bytes_kept(model) - bytes_kept(rebuilds) == saved


def test_copies_that_adapters_make():
    """Adapters in fp32 on a model in half precision keep their inputs in fp32."""
    model = get_peft_model(tiny_llama().to(torch.bfloat16), LoraConfig(**LORA)).train()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    rebuilds = assert_same_bits(model)
    # The base weights are frozen and keep no input: what is saved are the inputs of q, up and down, but for the first
    # q's, which depends on nothing that is trained.
    numbers = LAYERS * (2 * HIDDEN + INTERMEDIATE) - HIDDEN
    assert bytes_kept(model) - bytes_kept(rebuilds) == ROWS * LENGTH * numbers * 4


@pytest.mark.parametrize("tokens", [5, 13])
def test_chunks_of_an_mlp(tokens):
    model = tiny_llama().train()
    rebuilds = assert_same_bits(model, mlp_chunk_tokens=tokens)
    # Both norms' results, the second of which the chunks keep by their rows.
    assert bytes_kept(model) - bytes_kept(rebuilds) == LAYERS * ROWS * LENGTH * 2 * HIDDEN * 4


def test_what_a_layer_of_llama_3_2_1b_keeps():
    """In bytes a layer and token, in bf16: the figures of docs/performance.md."""
    tokens = 8

    def kept(n_layers: int, **options: Any) -> int:
        config = AutoConfig.for_model(
            "llama", vocab_size=128, hidden_size=2048, intermediate_size=8192, num_hidden_layers=n_layers,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(0.01)
        if options:
            apply_liger_kernel(model, check=False, **options)
        ids = torch.arange(tokens)[None]
        with Made() as made:
            loss = model(input_ids=ids, labels=ids).loss
        return made.kept(model) if loss is not None else 0

    h, i, kv, heads = 2048, 8192, 512, 32
    two_roots, log_sum_exp = 2 * 4, heads * 4
    # The stream before each norm, q, k, v, what attention gives, gate and up.
    least = 2 * (2 * h + h + 2 * kv + h + 2 * i) + two_roots + log_sum_exp
    assert least == 51_336
    expected = {"cheap": least, "norms": least + 2 * i, None: least + 2 * (2 * h + i)}
    assert (expected["norms"], expected[None]) == (67_720, 75_912)
    for option, bytes_a_token in expected.items():
        a_layer = kept(2, recompute=option) - kept(1, recompute=option)
        assert a_layer / tokens == bytes_a_token
    assert (kept(2) - kept(1)) / tokens == 108_680


def test_frozen_parts():
    model = tiny_llama().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    assert_same_bits(model)


def test_a_second_backward():
    model = tiny_llama().train()
    apply_liger_kernel(model, recompute="cheap")
    loss = model(**batch()).loss
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    # A graph that runs in part leaves recipes that not all have had.
    torch.autograd.grad(loss, model.model.layers[1].self_attn.q_proj.weight, retain_graph=True)
    for again, before in zip(torch.autograd.grad(loss, parameters), first, strict=True):
        assert torch.equal(again, before)


def test_what_was_changed_in_place_is_an_error():
    model = tiny_llama().train()
    apply_liger_kernel(model, recompute="cheap")
    kept = []
    hook = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, out: kept.append(out))
    loss = model(**batch()).loss
    hook.remove()
    kept[0].detach().mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_the_hooks_of_others_stay_the_only_ones():
    model = tiny_llama().train()
    kept = []
    for options in ({}, {"recompute": "cheap"}):
        apply_liger_kernel(model, **options)
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.nbytes
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            gradients(model)
            assert torch._C._autograd._top_saved_tensors_default_hooks(False)[0] is count
    assert kept[0] == kept[1]


class Toy(nn.Module):
    """``use(y)`` with a y that can be made again."""

    def __init__(self, function, use):
        super().__init__()
        self.function = function
        self.use = use
        self.made = 0
        recompute._Hooks(self).apply()

    def again(self, x):
        self.made += 1
        return self.function(x)

    def forward(self, x):
        with torch.no_grad():
            value = self.function(x)
        y = x * 0 + value  # depends on x and keeps nothing that is looked at here
        return self.use(recompute.rebuildable(y, self.again, x))


def _cast_and_changed(y):
    copied = y.double()
    copied.detach().mul_(2)  # which its history does not say
    return copied**2


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y[:, :3] ** 2,
        lambda y: y[:, ::2] ** 2,
        lambda y: y.transpose(0, 1) ** 2,
        lambda y: (y * 2).double() ** 2,
        _cast_and_changed,
    ],
    ids=["slice", "step", "transposed", "cast of something else", "cast and changed"],
)
def test_parts_and_other_casts_are_kept(use):
    x = torch.randn(1, 7, requires_grad=True)
    toy = Toy(torch.exp, use)
    if toy.forward(x).shape[0] == 7:
        x = torch.randn(3, 7, requires_grad=True)
    toy(x).sum().backward()
    assert toy.made == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y[1:3] ** 2,
        lambda y: y.split(2)[1] ** 2,
        lambda y: y.double() ** 2,
        lambda y: y.view(5, 1, 7).double().view(7, 5) ** 2,
    ],
    ids=["rows", "split", "cast", "cast between views"],
)
def test_rows_and_casts_are_rebuilt(use):
    x = torch.randn(5, 7, requires_grad=True)
    toy = Toy(torch.exp, use)
    y = x.detach().exp().requires_grad_()
    (expected,) = torch.autograd.grad(use(y).sum(), y)
    node = toy(x).sum().grad_fn.next_functions[0][0]  # of the power
    assert isinstance(node._raw_saved_self.data[0], recompute._Recipe)
    found = recompute._unpack(node._raw_saved_self.data)
    assert toy.made == 1
    torch.testing.assert_close(2 * found.sum().float(), expected.sum().float(), rtol=1e-5, atol=1e-5)


def test_as_many_as_have_kept_it_share_it():
    x = torch.randn(4, 7, requires_grad=True)
    weights = [torch.randn(7, 5, requires_grad=True) for _ in range(3)]
    toy = Toy(torch.exp, lambda y: [y @ weight for weight in weights])
    outputs = toy(x)
    recipe = weakref.ref(next(iter(_recipes(outputs[0]))))
    for made, (output, weight) in enumerate(zip(outputs, weights, strict=True)):
        (gradient,) = torch.autograd.grad(output.sum(), weight, retain_graph=True)
        torch.testing.assert_close(gradient, x.detach().exp().t() @ torch.ones(4, 5))
        assert toy.made == 1
        assert (recipe()._value is None) == (made == 2)
    torch.autograd.grad(outputs[0].sum(), weights[0])
    assert toy.made == 2


def _recipes(output):
    """The recipes among what a matrix product's node keeps."""
    return [
        packed[0]
        for packed in (output.grad_fn._raw_saved_self.data, output.grad_fn._raw_saved_mat2.data)
        if isinstance(packed[0], recompute._Recipe)
    ]


def test_it_is_made_in_the_autocast_state_of_the_forward():
    x = torch.randn(4, 4, requires_grad=True)
    dtypes = []

    def function(x):
        y = x.detach() @ x.detach()
        dtypes.append(y.dtype)
        return y

    toy = Toy(function, lambda y: y**2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = toy(x).sum()
    loss.backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_a_graph_that_is_dropped_leaves_nothing():
    model = tiny_llama().train()
    apply_liger_kernel(model, recompute="cheap")
    with Made() as made:
        loss = model(**batch()).loss
    assert made.kept(model) > 0
    del loss
    assert made.kept(model) == 0


def test_an_error_in_the_forward_leaves_no_hooks():
    model = tiny_llama().train()
    apply_liger_kernel(model, recompute="cheap")
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10_000))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert gradients(model)


def test_without_gradients_nothing_is_hooked():
    model = tiny_llama()
    apply_liger_kernel(model, recompute="cheap")
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(torch._C._autograd._top_saved_tensors_default_hooks(False))
    )
    with torch.no_grad():
        model(**batch())
    assert seen == [None]


@pytest.mark.parametrize("option", NOT_KEPT)
def test_copies_and_revert(option):
    model = tiny_llama()
    before = dict(model._forward_hooks), dict(model._forward_pre_hooks)
    report = plan(model, recompute=option)
    assert report.counts()["recompute"] == 1
    assert (model._forward_hooks, model._forward_pre_hooks) == before
    apply_liger_kernel(model, recompute=option)
    assert apply_liger_kernel(model, recompute=option).counts()["recompute"] == 1
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each in (model, copied):
        revert(each)
        assert (each._forward_hooks, each._forward_pre_hooks, each._forward_hooks_always_called) == ({}, {}, {})
        assert not is_patched(each)


def test_under_compile_the_compiler_decides():
    model = tiny_llama().train()
    apply_liger_kernel(model, recompute="cheap")
    expected = gradients(model)
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(found) == len(expected)


@pytest.mark.parametrize(("value", "error"), [("expensive", ValueError), (True, TypeError)])
def test_what_it_may_be(value, error):
    with pytest.raises(error, match="recompute must be 'norms', 'cheap' or None, got"):
        apply_liger_kernel(tiny_llama(), recompute=value)
