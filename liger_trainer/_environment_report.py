"""What ``python -m liger_trainer env`` prints: what a bug report needs to say of a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

import torch

from ._environment import DISABLE_VARIABLE
from ._self_test import self_test
from .kernels._force_torch import TORCH_VARIABLE, forced_ops
from .kernels._library import OPS
from .kernels._triton import INTERPRETED, WHY_NOT

__all__ = ["print_environment"]

PACKAGES = (
    "liger-trainer", "torch", "triton", "transformers", "accelerate", "trl", "peft", "deepspeed", "datasets",
    "flash-attn", "bitsandbytes", "liger-kernel",
)  # fmt: skip
VARIABLES = (DISABLE_VARIABLE, TORCH_VARIABLE, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "liger-trainer":  # imported from a checkout
            from . import __version__

            return f"{__version__} (not installed)"
        return "-"


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        arch = getattr(properties, "gcnArchName", "") if torch.version.hip else f"{properties.major}.{properties.minor}"
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {build}, architecture {arch}"
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return device.type


def print_environment(*, test: bool = True) -> int:
    """Print versions, devices, what serves each op, and a self-test with its verdict.

    Args:
        test: run the self-test.

    Returns:
        The exit status: 1 where an op failed its test, else 0.
    """
    device = _device()
    count = torch.accelerator.device_count() if device.type != "cpu" else 1
    print(f"{'system':<16}{platform.platform()}, Python {platform.python_version()}")
    for package in PACKAGES:
        print(f"{package:<16}{_version(package)}")
    print(f"{'device':<16}{count} x {device.type}: {_describe(device)}")
    print(f"{'Triton kernels':<16}{WHY_NOT or ('interpreted' if INTERPRETED else 'can be launched')}")
    for name in VARIABLES:
        if name in os.environ:
            print(f"{name}={os.environ[name]}")
    print(f"\nWhat serves each op on {device.type}:")
    families: dict[str, set[str]] = {}
    for op in OPS.values():
        families.setdefault(op.family, set()).add(op.implementation(device.type))
    for family, served in sorted(families.items()):
        by_request = ", by request" if family in forced_ops() else ""
        print(f"  {family:<24}{' and '.join(sorted(served))}{by_request}")
    if not test:
        return 0

    print(f"\nSelf-test on {device}, forward and backward, against float64 on the CPU:")
    start = time.perf_counter()
    results = []
    for result in self_test(device):
        results.append(result)
        outcome = "ok" if result.passed else "FAILED"
        print(
            f"  {result.op:<30}{str(result.dtype).removeprefix('torch.'):<10}error {result.error:.1e}, "
            f"at most {result.limit:.0e}: {outcome}" + (f" ({result.exception})" if result.exception else ""),
            flush=True,
        )
    failed = [f"{each.op} in {str(each.dtype).removeprefix('torch.')}" for each in results if not each.passed]
    print(f"\n{len(results)} checks in {time.perf_counter() - start:.0f} s.")
    if failed:
        print(f"VERDICT: {len(failed)} of {len(results)} checks FAILED on {device.type}: {', '.join(failed)}.")
        print(f"{TORCH_VARIABLE}=<op> has an op's torch implementation serve in its kernel's place.")
        return 1
    print(f"VERDICT: every op agrees with its reference on {device.type} ({_describe(device)}).")
    return 0
