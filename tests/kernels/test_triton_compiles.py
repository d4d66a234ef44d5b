"""Triton compiles every kernel that the ops launch, which its interpreter can't tell; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from liger_trainer.kernels._triton import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]

# A process of its own, since this one's Triton interprets. A launch there compiles for an H100 and runs nothing.
SCRIPT = """
import sys, warnings
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

warnings.simplefilter("ignore")
from liger_trainer.kernels import _launch, _library
from tests.kernels.cases import CASES, RAGGED, Sizes, run

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}
compiled, failed = set(), []


def compile_only(kernel, grid, arguments, constants, *, num_warps):
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[i] if i < len(arguments) else constants[i - len(arguments)]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
            if name in ("rows_ptr", "count_ptr"):
                value.zero_()  # what no kernel wrote must be neither an index nor a size
        elif i >= len(arguments) or value is None:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    key = (kernel.fn, num_warps, *signature.items(), *fixed.items(), *attributes)
    if key in compiled:
        return
    compiled.add(key)
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    except Exception as error:
        failed.append(f"{kernel.fn.__name__} {dict(fixed)}: {error}")


for module in list(sys.modules.values()):
    if module.__name__.startswith("liger_trainer.kernels.") and hasattr(module, "launch"):
        module.launch = compile_only
wide = Sizes(tokens=2, width=40000, classes=40000, tile_rows=2)
with _library.interpreted_kernels():
    for case in CASES:
        for sizes in (RAGGED, wide) if "norm" in case.name else (RAGGED,):
            run(case.make("cpu", torch.bfloat16, sizes))
print(f"{len(compiled)} kernels compiled")
sys.exit("\\n".join(failed) or None)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="no usable Triton")
def test_every_launch_compiles(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["TRITON_INTERPRET"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout.split()[0]) > 40
