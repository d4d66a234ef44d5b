"""Every fault still finds the code that it changes: one that doesn't is planted no more, and nobody would see it."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.faults import FAULTS, Fault
from tests.mutation.run import ROOT, planted


def test_names_are_unique() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_changes_the_code_and_leaves_it_python(fault: Fault) -> None:
    text = (ROOT / "liger_trainer/kernels" / f"{fault.file}.py").read_text(encoding="utf-8")
    changed = planted(text, fault)
    assert changed != text
    ast.parse(changed)
