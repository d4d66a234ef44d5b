"""What the comparisons share: a tiny chat model, and short trainings of it on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))  # for tiny_chat

from tiny_chat import make_tokenizer, save_tiny_llama

from training.tasks import Training, curves


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama", make_tokenizer()))


@pytest.fixture(scope="session")
def train(tiny_model: str) -> Callable[..., dict[str, list[float]]]:
    """Curves of a short training of the tiny model, tiles of five rows of logits where it is ours."""

    def run(task: str, provider: str, **settings: Any) -> dict[str, list[float]]:
        # With a usual epsilon Adam follows the sign of a gradient, however small, and with it rounding.
        options: dict[str, Any] = {"adam_epsilon": 1e-5, "learning_rate": 3e-3}
        if provider == "ours":
            options["liger_config"] = {"tile_bytes": 5 * 509 * 4}
        settings = {"steps": 8, "batch": 4, "length": 64, **settings}
        return curves(
            Training(task, provider, model=tiny_model, student_layers=1, options=tuple(options.items()), **settings)
        )

    return run
