"""Every kernel's launch parameters follow from its arguments' shapes: no run starts with a search for them."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from liger_trainer import kernels
from liger_trainer.kernels._triton import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="no usable Triton")
def test_no_kernel_is_autotuned():
    from triton.runtime import Autotuner, KernelInterface

    found = []
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, KernelInterface):
                found.append(name)
                while value is not None:  # decorators wrap one another
                    assert not isinstance(value, Autotuner), name
                    value = getattr(value, "fn", None)
    assert len(found) > 5
