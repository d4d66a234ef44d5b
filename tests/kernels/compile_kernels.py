"""Compile, for an architecture that need not be there, every kernel that the ops launch.

    python -m tests.kernels.compile_kernels cuda 90 32 bfloat16
    python -m tests.kernels.compile_kernels hip gfx942 64 bfloat16

The ops run on the CPU with launches that compile and compute nothing. Beyond what Triton refuses, a launch fails that
has more threads, or takes more shared memory, than every GPU of the last years has.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
MOST_THREADS = 1024
SHARED_BYTES = 64 * 1024  # of Turing and of AMD's, the least


class Compiler:
    """What stands in a launch's place."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.compiled: set[Any] = set()
        self.failed: list[str] = []
        self.most_threads = self.most_shared = 0

    def __call__(self, kernel: Any, grid: Any, arguments: Any, constants: Any, *, num_warps: int) -> None:
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
        if key in self.compiled:
            return
        self.compiled.add(key)
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
        name = f"{kernel.fn.__name__} {fixed}"
        threads = num_warps * self.target.warp_size
        self.most_threads = max(self.most_threads, threads)
        if threads > MOST_THREADS:
            self.failed.append(f"{name}: {threads} threads, a block has at most {MOST_THREADS}")
        try:
            found = triton.compile(source, target=self.target, options={"num_warps": num_warps})
        except Exception as error:
            self.failed.append(f"{name}: {error}")
            return
        self.most_shared = max(self.most_shared, found.metadata.shared)
        if found.metadata.shared > SHARED_BYTES:
            self.failed.append(f"{name}: {found.metadata.shared} bytes of shared memory, at most {SHARED_BYTES}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("cuda", "hip"))
    parser.add_argument("architecture", help="90, gfx942, ...")
    parser.add_argument("warp_size", type=int)
    parser.add_argument("dtype", choices=("bfloat16", "float16", "float32"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    from liger_trainer.kernels import _library
    from tests.kernels.cases import CASES, RAGGED, Sizes, run

    if asked.backend == "hip" and torch.version.hip is None:
        torch.version.hip = "compiled for"  # some choices ask for it
    architecture = int(asked.architecture) if asked.architecture.isdigit() else asked.architecture
    compiler = Compiler(GPUTarget(asked.backend, architecture, asked.warp_size))
    for module in list(sys.modules.values()):
        if module.__name__.startswith("liger_trainer.kernels.") and hasattr(module, "launch"):
            module.launch = compiler  # type: ignore[attr-defined]
    # Blocks and warps follow the width of a row.
    wide = [Sizes(tokens=2, width=width, classes=width) for width in (2000, 8192, 20000, 40000)]
    vocabulary = Sizes(tokens=2, width=8, classes=140000)
    with _library.interpreted_kernels():
        for case in CASES:
            name = case.op.__name__
            by_width = "norm" in name or name in ("swiglu", "geglu")
            sizes_of = wide if by_width else [] if name == "rotary" else [vocabulary]
            for sizes in (RAGGED, *sizes_of):
                run(case.make("cpu", getattr(torch, asked.dtype), sizes))
    print(
        f"{len(compiler.compiled)} kernels compiled; the largest takes {compiler.most_threads} threads, "
        f"and another {compiler.most_shared} bytes of shared memory"
    )
    print(*compiler.failed, sep="\n", file=sys.stderr)
    return bool(compiler.failed)


if __name__ == "__main__":
    sys.exit(main())
