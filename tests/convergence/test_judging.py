"""The rules by which a long run is judged: they let pass what differs by rounding, and refuse faults."""

from __future__ import annotations

import math
import random

import pytest

from training import tasks
from training.judging import MOST_DRIFT, MOST_EXCESS, judge, smoothed

SEEDS, WINDOW = (0, 1, 2), 10
SETTINGS = {"steps": 32, "batch": 4, "length": 32}


def test_smoothed():
    assert smoothed([1.0, 3.0, 5.0, 1.0], 2) == [2.0, 4.0, 3.0]
    assert smoothed([1.0, 3.0], 2) == [2.0]
    with pytest.raises(ValueError, match="window must be between 1 and the 2 values, got 3"):
        smoothed([1.0, 3.0], 3)


def test_numbers_of_a_verdict():
    reference = [[0.0] * 4, [1.0, 2.0, 1.0, 1.0]]  # widths 1, 2, 1, 1
    inside = judge([0.5, 0.0, 0.0, 0.0], reference, window=1)
    assert (inside.excess, inside.drift) == (0.0, pytest.approx(0.125 / 1.25))
    assert inside.passed
    above = judge([0.0, 2.5, 0.0, 0.0], reference, window=1)
    assert (above.excess, above.at) == (0.5, 1)
    below = judge([0.0, 0.0, 0.0, -0.2], reference, window=1)
    assert (below.excess, below.at, below.drift <= MOST_DRIFT) == (pytest.approx(0.2), 3, True)
    assert not above.passed and not below.passed


def test_what_cannot_be_judged():
    with pytest.raises(ValueError, match="at least two runs of the reference, got 1"):
        judge([1.0], [[1.0]], 1)
    with pytest.raises(ValueError, match=r"same number of steps, got \[1, 2\]"):
        judge([1.0], [[1.0], [1.0, 2.0]], 1)


@pytest.mark.parametrize("place", [0, 30, 99])
def test_a_run_that_is_nan_at_some_step_fails(place):
    draw = random.Random(0)
    reference = [[math.exp(-step / 50) + draw.gauss(0, 0.05) for step in range(100)] for _ in SEEDS]
    candidate = list(reference[0])
    assert judge(candidate, reference, WINDOW).passed
    candidate[place] = math.nan
    assert not judge(candidate, reference, WINDOW).passed


@pytest.fixture(scope="module")
def stock(train):
    return [train("sft", "hf", seed=seed, **SETTINGS)["loss"] for seed in SEEDS]


def test_ours_passes(train, stock):
    verdict = judge(train("sft", "ours", **SETTINGS)["loss"], stock, WINDOW)
    assert verdict.passed
    assert verdict.excess < 0.1 * MOST_EXCESS and verdict.drift < 0.1 * MOST_DRIFT  # fp32: it is not near the limit


def body_learns_nothing(model):
    """The gradient ends at the head."""
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))


def last_sequence_lost(model):
    """As where the last tile of rows is forgotten."""

    def drop(module, args, kwargs):
        kwargs["labels"] = kwargs["labels"].clone()
        kwargs["labels"][-1] = -100
        return args, kwargs

    model.register_forward_pre_hook(drop, with_kwargs=True)


def norms_not_trained(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)


def gradient_through_one_mlp_has_the_wrong_sign(model):
    model.model.layers[1].mlp.register_full_backward_hook(lambda module, into, out: (-into[0],))


FAULTS = (body_learns_nothing, last_sequence_lost, norms_not_trained, gradient_through_one_mlp_has_the_wrong_sign)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_run_fails(train, stock, fault, monkeypatch):
    load = tasks.load_model

    def load_faulty(*args):
        model, tokenizer = load(*args)
        fault(model)
        return model, tokenizer

    monkeypatch.setattr(tasks, "load_model", load_faulty)
    verdict = judge(train("sft", "hf", **SETTINGS)["loss"], stock, WINDOW)
    assert not verdict.passed, verdict
