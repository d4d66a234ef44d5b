"""Where Triton can't serve, the import works, one warning says so, and the torch implementations compute the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_trainer.kernels import _triton

SCRIPT = """
import sys, warnings
sys.modules["triton"] = None  # import triton raises ImportError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, liger_trainer
    from transformers import LlamaConfig, LlamaForCausalLM
    from liger_trainer import kernels, modules
ours = [str(w.message) for w in caught if "liger_trainer" in str(w.message)]
assert len(ours) == 1 and "triton is not importable" in ours[0], ours
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2))
ids = torch.arange(2 * 9).view(2, 9)
def step():
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]
loss, gradients = step()
assert liger_trainer.apply_liger_kernel(model, tile_bytes=5 * 97 * 4).counts() == {
    "rms_norm": 5, "fused_add_rms_norm": 2, "mlp": 2, "rope": 2, "fused_linear_cross_entropy": 1}
patched_loss, patched_gradients = step()
torch.testing.assert_close(patched_loss, loss)
torch.testing.assert_close(patched_gradients, gradients, rtol=1e-4, atol=1e-6)
"""


def test_without_the_package():
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in (_triton._why_not() or "")
    (tmp_path / "gcc").touch(mode=0o755)
    assert _triton._why_not() is None
