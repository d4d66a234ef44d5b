from __future__ import annotations

import dataclasses
import io
import itertools
import json

import pytest
import rich.console
import torch
from torch import nn

from liger_trainer.patching import LeftAlone, Replaced, Report, apply_liger_kernel, class_swap, is_patched, plan, revert
from liger_trainer.patching import apply as apply_module
from liger_trainer.patching.recogniser import ClassSwap

NO_HEAD = {"fused_linear_cross_entropy": False}


def test_unknown_option(tiny, untouched):
    model = tiny("Llama")
    check = untouched(model)
    with pytest.raises(TypeError, match=r"unknown option 'rmsnorm'.*rope, rms_norm, layer_norm, mlp"):
        apply_liger_kernel(model, rmsnorm=True)
    with pytest.raises(TypeError, match="unknown option 'swiglu'"):
        plan(model, swiglu=True)
    check()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rope": 1}, TypeError, "option rope must be True or False, got 1"),
        ({"mlp": None}, TypeError, "option mlp"),
        ({"tile_bytes": "512MiB"}, TypeError, "tile_bytes must be an int or None, got '512MiB'"),
        ({"tile_bytes": 0}, ValueError, "tile_bytes must be at least 1, got 0"),
        ({"cross_entropy": True}, ValueError, "exclude each other"),
    ],
)
def test_wrong_options(tiny, options, error, message):
    model = tiny("Llama")
    with pytest.raises(error, match=message):
        apply_liger_kernel(model, **options)
    assert not is_patched(model)


@pytest.mark.parametrize("model", [None, "meta-llama/Llama-3.2-1B", torch.ones(1), nn.Linear])
def test_not_a_module(model):
    for function in (apply_liger_kernel, plan, is_patched):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
            function(model)
    error, message = TypeError, r"model must be a torch\.nn\.Module, got"
    if isinstance(model, str):  # a model type can be reverted
        error, message = ValueError, "model type must be one that transformers has, got 'meta-llama"
    with pytest.raises(error, match=message):
        revert(model)


def test_nothing_to_replace():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="Sequential has no part that liger_trainer can replace"):
        apply_liger_kernel(model)
    assert not is_patched(model)
    assert plan(model) == Report()


def test_nothing_to_replace_names_what_was_left_alone():
    class DoubledRMSNorm(nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="norm.*DoubledRMSNorm.*none of the known norm formulas"):
        apply_liger_kernel(nn.ModuleDict({"norm": DoubledRMSNorm(8, eps=1e-5)}))


@pytest.mark.parametrize("kind", ["rope", "rms_norm", "mlp", "fused_add_rms_norm"])
def test_every_part_can_be_left_out(tiny, kind):
    model = tiny("Llama")
    everything = apply_liger_kernel(model, **NO_HEAD).counts()
    assert apply_liger_kernel(model, **{kind: False}, **NO_HEAD).counts() == {
        name: count for name, count in everything.items() if kind not in name
    }
    assert revert(model) is model


def test_layer_norm_option():
    model = nn.Sequential(nn.LayerNorm(12), nn.RMSNorm(12))
    assert apply_liger_kernel(model).counts() == {"layer_norm": 1, "rms_norm": 1}
    assert apply_liger_kernel(model, layer_norm=False).counts() == {"rms_norm": 1}
    assert type(model[0]) is nn.LayerNorm


def test_applying_twice_is_applying_once(tiny, untouched):
    model = tiny("Llama")
    report = apply_liger_kernel(model, **NO_HEAD)
    check = untouched(model)
    assert apply_liger_kernel(model, **NO_HEAD) is report
    check()
    revert(model)
    assert apply_liger_kernel(model, **NO_HEAD) == report


def test_reverting_an_unpatched_model_does_nothing(tiny, untouched):
    model = tiny("Llama")
    check = untouched(model)
    revert(model)
    check()


def test_a_part_reverted_by_itself_is_patched_again(tiny):
    model = tiny("Llama")
    apply_liger_kernel(model, **NO_HEAD)
    revert(model.model.layers[0])
    assert not is_patched(model.model.layers[0])
    assert is_patched(model)
    apply_liger_kernel(model, **NO_HEAD)
    assert is_patched(model.model.layers[0])


def test_a_container_that_holds_a_model(tiny, batch):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.head = tiny("Llama"), nn.Linear(48, 1)

    model = Wrapper()
    report = apply_liger_kernel(model, **NO_HEAD)
    assert report.counts() == {"rms_norm": 5, "fused_add_rms_norm": 2, "mlp": 2, "rope": 2}
    assert all(entry.path.startswith("policy.model.") for entry in report.replaced)


@pytest.mark.parametrize("patched_before", [False, True])
def test_an_error_while_replacing_leaves_the_model_as_it_was(tiny, untouched, monkeypatch, patched_before):
    model = tiny("Llama")
    if patched_before:
        apply_liger_kernel(model, mlp=False, **NO_HEAD)
    check = untouched(model)
    calls, swap = itertools.count(), class_swap.swap

    def interrupted(module, members):
        if next(calls) == 4:
            raise KeyboardInterrupt
        swap(module, members)

    monkeypatch.setattr(class_swap, "swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_liger_kernel(model, **NO_HEAD)
    check()
    assert is_patched(model) == patched_before


def test_an_error_while_recognising_leaves_the_model_as_it_was(tiny, untouched, monkeypatch):
    class Broken:
        def recognise(self, model, options):
            raise RuntimeError("broken recogniser")

    model = tiny("Llama")
    check = untouched(model)
    monkeypatch.setattr(apply_module, "RECOGNISERS", [*apply_module.RECOGNISERS, Broken()])
    with pytest.raises(RuntimeError, match="broken recogniser"):
        apply_liger_kernel(model, **NO_HEAD)
    check()


def test_two_recognisers_do_not_replace_one_module(tiny, monkeypatch):
    class Greedy:
        def recognise(self, model, options):
            yield ClassSwap("greedy", "model.norm", "greedy", model.model.norm, lambda: {"forward": print})

    model = tiny("Llama")
    monkeypatch.setattr(apply_module, "RECOGNISERS", [*apply_module.RECOGNISERS, Greedy()])
    report = apply_liger_kernel(model, **NO_HEAD)
    assert report.skipped == (LeftAlone("greedy", "model.norm", "LlamaRMSNorm", "replaced as rms_norm already"),)


class TestReport:
    report = Report(
        (
            Replaced("rms_norm", "a", "LlamaRMSNorm", "rms_norm(llama)", ("float32",)),
            Replaced("rms_norm", "b", "LlamaRMSNorm", "rms_norm(llama)", ("float32",)),
            Replaced("mlp", "c", "LlamaMLP", "swiglu"),
        ),
        (LeftAlone("mlp", "d", "BitNetMLP", "computes something else"),),
    )

    def test_line(self):
        line = "liger_trainer replaced 2 rms_norm, 1 mlp; left alone 1 mlp (BitNetMLP: computes something else)"
        assert self.report.line() == line
        assert Report().line() == "liger_trainer replaced nothing"

    def test_table(self):
        header, norms, mlp, left = str(self.report).splitlines()
        assert header.split("  ")[0] == "part"
        assert norms.split() == ["rms_norm", "LlamaRMSNorm", "2", "RMS", "norm", "(llama)", "rms_norm", "float32"]
        assert mlp.split() == ["mlp", "LlamaMLP", "1", "silu(gate)", "*", "up", "swiglu", "no"]
        assert left.endswith("left alone: computes something else")
        starts = zip((header, norms, mlp, left), ("recognised", "RMS norm", "silu", "left"), strict=True)
        assert len({line.index(word) for line, word in starts}) == 1
        assert "saves" not in str(self.report)

    def test_memory(self):
        saves = [dataclasses.replace(entry, saves=10**8) for entry in self.report.replaced]
        report = Report(tuple(saves), self.report.skipped, batch=3, length=17)
        assert report.saves == 3 * 10**8
        assert report == self.report  # what is saved is no part of what is done
        lines = str(report).splitlines()
        assert lines[0].endswith("saves at 3 x 17")
        assert lines[1].endswith("200 MB")
        assert lines[-1].split() == ["together", "300", "MB"]

    def test_in_a_terminal(self):
        console = rich.console.Console(file=io.StringIO(), width=160)
        console.print(self.report)
        text = console.file.getvalue()
        assert "RMS norm (llama)" in text
        assert "left alone: computes something else" in text

    def test_json(self):
        loaded = json.loads(json.dumps(self.report.as_dict()))
        assert loaded["replaced"][2] == {
            "kind": "mlp",
            "path": "c",
            "class_name": "LlamaMLP",
            "kernel": "swiglu",
            "checked": [],
            "saves": None,
        }
        assert loaded["skipped"][0]["reason"] == "computes something else"


def test_the_environment_switches_it_off(tiny, monkeypatch):
    model = tiny("Llama")
    apply_liger_kernel(model)
    monkeypatch.setenv("LIGER_TRAINER_DISABLE", "1")
    assert apply_liger_kernel(model).replaced == ()
    assert not is_patched(model)
