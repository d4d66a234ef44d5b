"""Every way of spreading a model over processes, against one process, on the same batch, with the stock model."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from tests.distributed.group import Group
from tests.distributed.training import Outcome, Run, error, train
from tests.distributed.wrappings import Wrapping

TOLERANCE = 1e-5
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed: make deepspeed")


def cases(*runs: Run, slow: bool = False) -> list[object]:
    """Parameters of a test, named by what they are; what takes minutes runs by ``pytest -m slow``."""
    marked = []
    for run in runs:
        marks = [needs_deepspeed] if run.wrapping.kind.startswith("zero") else []
        marks += [pytest.mark.slow] if slow else []
        marked.append(pytest.param(run, id=str(run), marks=marks))
    return marked


@functools.cache
def reference(run: Run) -> Outcome:
    """The stock model in one process."""
    outcome = train(replace(run, wrapping=None, patched=False, late=False, options=()))
    assert outcome is not None
    return outcome


def check(outcome: Outcome, run: Run, tolerance: float = TOLERANCE, left_alone: str = "") -> None:
    """``left_alone``: a part of the reason for which the logits are built as without us."""
    expected = reference(replace(run, wrapping=None))
    assert expected.wide and bool(outcome.wide) == bool(left_alone), "whether the logits were built"
    assert [left_alone in reason for reason in outcome.left_alone] == [True] * bool(left_alone), outcome.left_alone
    torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(expected.losses), rtol=tolerance, atol=0)
    if outcome.gradients:
        assert error(outcome.gradients, expected.gradients) < tolerance
    assert error(outcome.parameters, expected.parameters) < tolerance
    assert outcome.evaluated == pytest.approx(expected.evaluated, rel=tolerance)
    for ours, theirs in (
        (outcome.logits, expected.logits),
        (outcome.read_in_training, expected.read_in_training),
    ):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs[: len(ours)], rtol=tolerance, atol=2 * tolerance)


ROOT = [Wrapping("ddp"), Wrapping("fsdp1"), Wrapping("fsdp1", reshard=False), Wrapping("fsdp2")]
ROOT += [Wrapping("fsdp2", reshard=False), *(Wrapping(f"zero{stage}") for stage in (1, 2, 3))]
NORM = [Wrapping("fsdp2", "norm"), Wrapping("fsdp2", "norm", reshard=False)]
ALONE = [Wrapping(kind, "alone", reshard) for kind in ("fsdp1", "fsdp2") for reshard in (True, False)]
FSDP1_ALONE = ALONE[:2]
ALL = ROOT + NORM + ALONE
SOME = [Wrapping("fsdp1", "alone"), Wrapping("fsdp2"), Wrapping("fsdp2", "alone"), Wrapping("zero3")]

MATRIX = [Run(wrapping) for wrapping in ROOT + NORM + ALONE]
# FSDP1 takes tied weights apart unless one unit has both.
MATRIX += [
    Run(wrapping, tied=True) for wrapping in ROOT + NORM + ALONE if (wrapping.kind, wrapping.head) != ("fsdp1", "alone")
]


@pytest.mark.parametrize("run", cases(*MATRIX))
def test_the_same_training_on_two_processes(two_processes: Group, run: Run) -> None:
    check(two_processes.run(train, run)[0], run)


# Heads with a forward of their own, logits of single classes that are changed, losses of log-probabilities.
HEADS = ["bias", "own forward", "idefics", "chameleon", "bart", "prophetnet"]
HEADS += ["dory"] if hasattr(transformers, "DoryConfig") else []

OWN_FORWARD = ["own forward", "idefics", "dory"]


def _fits(run: Run) -> bool:
    """Whether the model itself can be spread so."""
    one_norm = run.head not in ("bart", "prophetnet")
    taken_apart = run.tied and run.adapters != "save" and run.wrapping in FSDP1_ALONE
    return (one_norm or run.wrapping.head != "norm") and not taken_apart


def _of_heads(heads: list[str], wrappings: list[Wrapping], slow: bool = False, **options: Any) -> list[object]:
    runs = (Run(wrapping, head=head, **options) for head in heads for wrapping in wrappings)
    return cases(*filter(_fits, runs), slow=slow)


@pytest.mark.parametrize(
    "run",
    [
        *_of_heads(HEADS, SOME),
        *_of_heads(HEADS, NORM[:1], tied=True),
        *_of_heads(HEADS, [each for each in ALL if each not in SOME], slow=True),
        *_of_heads(HEADS, [each for each in ALL if each != NORM[0]], slow=True, tied=True),
    ],
)
def test_heads_that_do_more_than_a_product(two_processes: Group, run: Run) -> None:
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run",
    [
        *_of_heads(HEADS[1:3], SOME, late=True),
        *_of_heads([HEADS[0], *HEADS[3:]], [Wrapping("fsdp1"), *NORM[:1], *SOME], slow=True, late=True),
    ],
)
def test_patching_heads_that_are_sharded_already(two_processes: Group, run: Run) -> None:
    hidden = run.wrapping.kind == "fsdp1" and run.head in OWN_FORWARD
    check(two_processes.run(train, run)[0], run, left_alone="FSDP1 has its parameters" if hidden else "")


FOUR = [Wrapping("ddp"), Wrapping("fsdp1", hybrid=True), Wrapping("fsdp2", "alone", hybrid=True)]


@pytest.mark.parametrize("run", cases(*map(Run, FOUR)))
def test_the_same_training_on_four_processes(four_processes: Group, run: Run) -> None:
    check(four_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run",
    cases(
        *(Run(Wrapping(kind, head, hybrid=True)) for kind in ("fsdp1", "fsdp2") for head in ("root", "alone")),
        *(Run(wrapping, silent=silent) for wrapping in ROOT + NORM + ALONE for silent in (False, True)),
        slow=True,
    ),
)
def test_the_whole_matrix_on_four_processes(four_processes: Group, run: Run) -> None:
    check(four_processes.run(train, run)[0], run)


@pytest.mark.parametrize("run", cases(*(Run(wrapping, silent=True) for wrapping in [Wrapping("ddp"), *SOME])))
def test_a_rank_without_labels(two_processes: Group, run: Run) -> None:
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run", cases(*(Run(wrapping, accumulate=2) for wrapping in [Wrapping("ddp"), Wrapping("fsdp1"), *SOME]))
)
def test_accumulation_without_synchronisation(two_processes: Group, run: Run) -> None:
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run",
    cases(
        *(Run(wrapping, adapters=adapters) for wrapping in SOME for adapters in ("lora", "head", "save")),
        Run(Wrapping("fsdp2", "norm"), adapters="save"),
        *(Run(Wrapping("ddp"), adapters=adapters) for adapters in ("head", "save")),
        Run(Wrapping("fsdp2", "norm"), adapters="head"),
    ),
)
def test_adapters(two_processes: Group, run: Run) -> None:
    pytest.importorskip("peft")
    check(two_processes.run(train, run)[0], run)


def _with_adapters(wrappings: list[Wrapping], adapters: list[str], slow: bool = False, **options: Any) -> list[object]:
    runs = (Run(wrapping, adapters=each, **options) for each in adapters for wrapping in wrappings)
    return cases(*filter(_fits, runs), slow=slow)


@pytest.mark.parametrize(
    "run",
    [
        *_with_adapters(SOME, ["head"], tied=True),
        *_with_adapters(NORM[:1], ["save", "save tied"], tied=True),
        *_with_adapters([each for each in ALL if each not in SOME], ["head"], slow=True, tied=True),
        *_with_adapters([each for each in ALL if each != NORM[0]], ["save", "save tied"], slow=True, tied=True),
        *_with_adapters(ALL, ["head", "save"], slow=True),
        *_with_adapters(ALL, ["save"], slow=True, head="own forward"),
        *_with_adapters([Wrapping("fsdp1"), *NORM[:1], *SOME], ["head", "save"], slow=True, late=True),
    ],
)
def test_adapters_of_heads(two_processes: Group, run: Run) -> None:
    pytest.importorskip("peft")
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize("run", _with_adapters([Wrapping("fsdp2")], ["head"], head="own forward"))
def test_an_adapter_on_a_head_with_a_forward_of_its_own(two_processes: Group, run: Run) -> None:
    pytest.importorskip("peft")
    check(two_processes.run(train, run)[0], run, left_alone="not a plain torch.nn.Linear")


@pytest.mark.parametrize(
    "run", cases(*(Run(wrapping, frozen=frozen) for wrapping in SOME for frozen in ("head", "body")))
)
def test_a_frozen_head_and_a_frozen_body(two_processes: Group, run: Run) -> None:
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run",
    cases(
        *(Run(wrapping, checkpointing=True) for wrapping in SOME),
        *(Run(Wrapping("fsdp2", head, cpu_offload=True)) for head in ("root", "alone")),
        *(Run(Wrapping("fsdp1", head, original_parameters=False)) for head in ("root", "alone")),
        *(Run(Wrapping("fsdp2", "norm"), options=(("recompute", option),)) for option in ("norms", "cheap")),
    ),
)
def test_what_frameworks_are_combined_with(two_processes: Group, run: Run) -> None:
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize("run", cases(*(Run(wrapping, shifted=True) for wrapping in [Wrapping("ddp"), *SOME])))
def test_labels_that_accelerate_has_shifted(two_processes: Group, run: Run) -> None:
    """As under context and sequence parallelism, where the next token may lie on another rank."""
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run", cases(*(Run(wrapping, late=True) for wrapping in [Wrapping("fsdp1"), *NORM[:1], *SOME]))
)
def test_patching_a_model_that_is_sharded_already(two_processes: Group, run: Run) -> None:
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run",
    cases(
        *(Run(wrapping, preferences=True) for wrapping in [Wrapping("fsdp1"), Wrapping("fsdp2", "norm"), *SOME]),
        *(Run(wrapping, preferences=True, adapters="head") for wrapping in SOME),
        Run(Wrapping("fsdp1", "alone"), preferences=True, adapters="save"),
    ),
)
def test_a_preference_loss_on_log_probabilities(two_processes: Group, run: Run) -> None:
    """What stands behind the TRL trainers."""
    pytest.importorskip("trl")
    check(two_processes.run(train, run)[0], run)


@pytest.mark.parametrize(
    "run", cases(*(Run(Wrapping(kind, head, bf16=True)) for kind in ("fsdp1", "fsdp2") for head in ("root", "alone")))
)
def test_bf16_is_as_near_to_fp32_as_without_us(two_processes: Group, run: Run) -> None:
    ours, theirs = (two_processes.run(train, replace(run, patched=patched))[0] for patched in (True, False))
    exact = reference(run)
    assert error(ours.gradients, exact.gradients) < 1.5 * error(theirs.gradients, exact.gradients)
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    "wrapping",
    [
        *ROOT[:5],
        *(Wrapping("fsdp1", "alone", reshard) for reshard in (True, False)),
        *(Wrapping("fsdp2", head, reshard=False) for head in ("norm", "alone")),
        pytest.param(Wrapping("zero3"), marks=needs_deepspeed),
    ],
    ids=str,
)
def test_a_step_has_the_stock_models_collectives(two_processes: Group, wrapping: Wrapping) -> None:
    ours, theirs = (two_processes.run(train, Run(wrapping, patched))[0].collectives for patched in (True, False))
    assert ours == theirs
    assert sum(ours.values()) > 0


@pytest.mark.parametrize("head", ["norm", "alone"])
def test_fsdp2_gathers_a_head_once_a_step(two_processes: Group, head: str) -> None:
    run = Run(Wrapping("fsdp2", head))
    ours, theirs = (two_processes.run(train, replace(run, patched=patched))[0].collectives for patched in (True, False))
    assert theirs.pop("c10d::_allgather_base_") - ours.pop("c10d::_allgather_base_") == 1
    assert ours == theirs
