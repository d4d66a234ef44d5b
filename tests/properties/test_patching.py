"""A model that is patched, reverted, copied, saved and loaded in any order stays the model that it was."""

from __future__ import annotations

import copy
import pickle
import tempfile

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_models import VOCAB, tiny_llama
from transformers import LlamaForCausalLM

from liger_trainer import apply_liger_kernel, is_patched, plan, revert

from .strategies import EXAMPLES

OPTIONS = [
    {},
    {"rope": False},
    {"mlp": False, "rms_norm": False},
    {"fused_linear_cross_entropy": False},
    {"fused_linear_cross_entropy": False, "cross_entropy": True},
    {"tile_bytes": 4096},
]
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(9) < 3, -100)


def outcome(model: LlamaForCausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradient of every parameter by its name."""
    loss = model(input_ids=IDS, labels=LABELS).loss
    names, parameters = zip(*model.named_parameters())
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters)))


class PatchedModel(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.model = tiny_llama()
        self.loss, self.gradients = outcome(self.model)
        self.keys = list(self.model.state_dict())
        self.classes = [type(module).__name__ for module in self.model.modules()]
        self.options: dict | None = None

    @rule(options=st.sampled_from(OPTIONS))
    def apply(self, options: dict) -> None:
        apply_liger_kernel(self.model, **options)
        self.options = options

    @rule(options=st.sampled_from([{"rope": 1}, {"swiglu": True}, {"cross_entropy": True}, {"tile_bytes": 0}]))
    def fail_to_apply(self, options: dict) -> None:
        try:
            apply_liger_kernel(self.model, **options)
        except (TypeError, ValueError):
            return
        raise AssertionError(options)

    @rule()
    def plan(self) -> None:
        report = plan(self.model)
        assert {"rms_norm", "mlp", "rope", "fused_linear_cross_entropy"} == set(report.counts())

    @rule()
    def revert(self) -> None:
        assert revert(self.model) is self.model
        self.options = None

    @rule()
    def deepcopy(self) -> None:
        copied = copy.deepcopy(self.model)
        if copied is not self.model:
            revert(self.model)  # the original's fate is not the copy's
        self.model = copied

    @rule()
    def pickle(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))
        self.options = None  # what is saved is a stock model

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.model = LlamaForCausalLM.from_pretrained(folder)
        self.options = None

    @rule()
    def exchange_weights(self) -> None:
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()), strict=True)

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def it_is_the_same_model(self) -> None:
        assert is_patched(self.model) == (self.options is not None)
        assert list(self.model.state_dict()) == self.keys
        assert [type(module).__name__ for module in self.model.modules()] == self.classes
        loss, gradients = outcome(self.model)
        if self.options is None:
            assert all(type(module).__module__.startswith(("torch", "transformers")) for module in self.model.modules())
            assert torch.equal(loss, self.loss)
        torch.testing.assert_close(loss, self.loss, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            error = (gradient - self.gradients[name]).norm() / self.gradients[name].norm()
            assert error < 1e-5, (name, error)


PatchedModel.TestCase.settings = settings(
    max_examples=max(4, EXAMPLES // 10), stateful_step_count=10, derandomize=not EXAMPLES, deadline=None, database=None
)
TestPatchedModel = PatchedModel.TestCase
