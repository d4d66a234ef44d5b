"""``plan``: memory, the command line, models without weights, and the check that waits for the first forward."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from liger_trainer import apply_liger_kernel, is_patched, kernels, plan, revert
from liger_trainer.__main__ import main
from liger_trainer.patching.apply import _verify_where_it_runs

ROWS, LENGTH, VOCAB = 3, 11, 97


class TestMemory:
    def test_norms_and_mlps_save_what_autograd_keeps_less(self, tiny):
        """Counted on the real model, on real tensors: all that its layers keep, with a kind replaced and without."""
        model = tiny("Qwen3", num_hidden_layers=1)
        options = {"rope": False, "fused_linear_cross_entropy": False}
        report = plan(model, batch=ROWS, length=LENGTH, **options)
        before = kept(model)
        apply_liger_kernel(model, **options)
        real = before - kept(model)
        assert report.saves == sum(entry.saves for entry in report.replaced) > 0
        # A tensor that two neighbours keep goes only when both let it go; parts by themselves can't know.
        assert 0.75 * real <= report.saves <= 1.25 * real

    def test_the_head(self, tiny):
        model = tiny("Llama").bfloat16()
        report = plan(model, batch=ROWS, length=LENGTH, tile_bytes=1000)
        (head,) = (entry for entry in report.replaced if entry.kind == "fused_linear_cross_entropy")
        assert head.saves == ROWS * LENGTH * VOCAB * (2 + 4 + 4) - 1000

    def test_grows_with_the_step_and_touches_nothing(self, tiny, untouched):
        model = tiny("Gemma2")
        check = untouched(model)
        small, large = (plan(model, batch=2, length=length, tile_bytes=1) for length in (8, 16))
        check()
        assert small == large == plan(model, tile_bytes=1)
        assert large.saves == pytest.approx(2 * small.saves, rel=0.01)

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            ({"batch": 2}, "given together or not at all, got batch=2, length=None"),
            ({"batch": 0, "length": 3}, "batch must be an int of at least 1, got 0"),
            ({"batch": 1, "length": 2.5}, r"length must be an int of at least 1, got 2\.5"),
        ],
    )
    def test_wrong_steps(self, tiny, step, message):
        with pytest.raises(ValueError, match=message):
            plan(tiny("Llama"), **step)


def kept(model) -> int:
    """The bytes of distinct tensors, parameters apart, that a forward of model's layers keeps."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.model(input_ids=ids)
    total = sum(storage.nbytes() for storage in storages.values())
    del outputs
    gc.collect()
    return total


class TestCommandLine:
    def test_json(self, tiny, tmp_path, capsys):
        tiny("Gemma2").config.save_pretrained(tmp_path)
        assert main(["plan", str(tmp_path), "--batch", "2", "--length", "16", "--json", "--no-rope"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["model"] == "Gemma2ForCausalLM"
        kinds = {"rms_norm", "fused_add_rms_norm", "mlp", "fused_linear_cross_entropy"}
        assert {entry["kind"] for entry in printed["replaced"]} == kinds
        assert (printed["batch"], printed["length"]) == (2, 16)
        assert printed["saves"] > 0

    def test_a_file_a_type_and_no_model(self, tiny, tmp_path, capsys):
        tiny("Qwen3").config.save_pretrained(tmp_path)
        assert main(["plan", str(tmp_path / "config.json")]) == 0
        assert "Qwen3ForCausalLM" in capsys.readouterr().out
        assert main(["plan", "gpt2"]) == 0
        printed = capsys.readouterr().out
        assert "GPT2LMHeadModel, 0.12 billion parameters, bfloat16" in printed
        assert "layer norm" in printed
        with pytest.raises(SystemExit) as exit_:
            main(["plan", str(tmp_path / "nothing_here")])
        assert exit_.value.code == 2
        with pytest.raises(SystemExit):
            main(["plan", "gpt2", "--dtype", "int8"])
        assert "--dtype must be a floating point dtype of torch, got 'int8'" in capsys.readouterr().err

    def test_as_a_module(self):
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-m", "liger_trainer", "plan", "gpt2"], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "LM head and loss" in done.stdout


class TestWithoutWeights:
    def patched(self, tiny, **options):
        with torch.device("meta"):
            model = tiny("Llama")
            apply_liger_kernel(model, **options)
        real = tiny("Llama")
        model.to_empty(device="cpu")
        model.load_state_dict(real.state_dict())
        for module, source in zip(model.modules(), real.modules(), strict=True):
            for name, buffer in source.named_buffers(recurse=False):
                setattr(module, name, buffer)
        return model, real

    def test_the_check_is_made_again_at_the_first_forward(self, tiny, batch, gradients, error, monkeypatch):
        model, real = self.patched(tiny)
        seen, rms_norm = [], kernels.rms_norm

        def counted(x, *args, **options):
            seen.append(x.dtype)
            return rms_norm(x, *args, **options)

        assert _verify_where_it_runs in model._forward_pre_hooks.values()
        monkeypatch.setattr(kernels, "rms_norm", counted)
        ours = gradients(model, batch)
        assert torch.bfloat16 in seen  # the check's; the model's own are fp32
        assert _verify_where_it_runs not in model._forward_pre_hooks.values()
        assert error(ours, gradients(real, batch)) < 5e-6
        seen.clear()
        gradients(model, batch)
        assert set(seen) == {torch.float32}

    def test_what_differs_by_then_goes_back(self, tiny, batch, gradients, error, monkeypatch, caplog):
        monkeypatch.setattr(logging.getLogger("liger_trainer"), "propagate", True)
        model, real = self.patched(tiny)
        monkeypatch.setattr(kernels, "swiglu", lambda gate, up: gate * up)
        assert error(gradients(model, batch), gradients(real, batch)) < 5e-6
        assert not any(is_patched(layer.mlp) for layer in model.model.layers)
        assert is_patched(model.model.norm)
        assert "mlp model.layers.0.mlp (LlamaMLP) is left alone after all: output differs" in caplog.text

    def test_what_can_not_be_compared_stays(self):
        norm = torch.nn.LayerNorm(8, device="meta")
        model = torch.nn.ModuleDict({"norm": norm})
        apply_liger_kernel(model)
        weight = norm._parameters.pop("weight")  # FSDP1 takes parameters away and puts views in their place
        (hook,) = model._forward_pre_hooks.values()
        hook(model, ())
        assert is_patched(norm)
        norm.weight = weight

    def test_copies_and_reverted_models_forget_it(self, tiny, batch):
        model, _ = self.patched(tiny)
        copied = copy.deepcopy(model)
        copied(**batch)
        assert _verify_where_it_runs not in copied._forward_pre_hooks.values()
        revert(model)
        assert not model._forward_pre_hooks

    def test_compiled_at_once(self, tiny, batch, gradients, error):
        torch.compiler.reset()
        model, real = self.patched(tiny)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in gradients(compiled, batch).items()}
        assert error(ours, gradients(real, batch)) < 5e-6


class TestUnchecked:
    def test_the_kernels_are_not_run(self, tiny, batch, gradients, error, monkeypatch):
        model = tiny("Llama")
        theirs = gradients(model, batch)

        def refuse(*args, **options):
            raise AssertionError("a kernel ran")

        with monkeypatch.context() as patch:
            patch.setattr(kernels, "rms_norm", refuse)
            report = apply_liger_kernel(model, check=False)
        assert {entry.kind for entry in report.replaced} >= {"rms_norm", "mlp", "rope"}
        norms = [entry for entry in report.replaced if entry.kind == "rms_norm"]
        assert {entry.checked for entry in norms} == {()}
        assert error(gradients(model, batch), theirs) < 5e-6
        with torch.autocast("cpu", torch.bfloat16):
            ours = gradients(model, batch)
            revert(model)
            assert error(ours, gradients(model, batch)) < 0.1
