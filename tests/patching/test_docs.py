"""The code in docs/adding-a-recogniser.md runs, and does what the page says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from liger_trainer import kernels
from liger_trainer.patching import apply as apply_module
from liger_trainer.patching import apply_liger_kernel, is_patched, revert
from liger_trainer.patching.options import Options
from tests.census.examine import build

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-recogniser.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def block(word):
    (found,) = (each for each in BLOCKS if word in each)
    return found


class SquaredReLU(nn.Module):
    def forward(self, hidden):
        return torch.relu(hidden).pow(2)


class CubedReLU(nn.Module):
    def forward(self, hidden):
        return torch.relu(hidden).pow(3)


@pytest.fixture
def recogniser(monkeypatch):
    calls = []

    def relu_squared(x):
        calls.append(x.shape)
        return torch.relu(x).square()

    monkeypatch.setattr(kernels, "relu_squared", relu_squared, raising=False)
    monkeypatch.setattr(Options, "relu_squared", True, raising=False)
    module = types.ModuleType("liger_trainer.patching.relu_squared")
    module.__package__ = "liger_trainer.patching"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("def recognise(model, options):\n"), vars(module))
    monkeypatch.setattr(apply_module, "RECOGNISERS", [*apply_module.RECOGNISERS, module])
    return SimpleNamespace(module=module, calls=calls)


def test_the_recogniser(recogniser):
    model = nn.Sequential(SquaredReLU(), nn.SiLU(), CubedReLU(), nn.Dropout(0.1))
    report = apply_liger_kernel(model)
    assert report.counts() == {"relu_squared": 1}
    assert [(entry.path, entry.class_name) for entry in report.skipped] == [("2", "CubedReLU")]
    assert "output differs by" in report.skipped[0].reason
    recogniser.calls.clear()
    x = torch.randn(3, 7)
    assert torch.equal(model[0](hidden=x), SquaredReLU()(x))
    assert recogniser.calls == [(3, 7)]
    revert(model)
    assert type(model[0]) is SquaredReLU
    assert not is_patched(model)


def test_the_census_on_a_model_of_ones_own(capsys):
    exec(block("compare(model.train()"), {"model": build("causal", "mistral")})
    assert "MistralMLP" in capsys.readouterr().out


def test_the_formula_is_the_one_in_the_code():
    source = Path(apply_module.norm.__file__).read_text(encoding="utf-8")
    blocks = [block(word) for word in ("rounds_root: bool", "h = x * root.to", "...,\n")]
    lines = [line.strip() for each in blocks for line in each.splitlines()]
    assert len(lines) > 6
    for line in lines:
        assert line in source or line == "...,"
