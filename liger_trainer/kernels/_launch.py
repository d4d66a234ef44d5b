"""Launching a Triton kernel in a few microseconds.

``kernel[grid](...)`` binds the arguments, reads settings from the environment and writes the launch options out as a
string before it finds the compiled kernel, which for small tensors takes the host longer than the device takes to run
it. A kernel that was launched once is found here by what Triton compiles for, and handed its pointers as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import HAS_TRITON, INTERPRETED, triton

__all__ = ["launch"]

_compiled: dict[tuple[Any, ...], Any] = {}  # by what Triton compiles for
_of_numbers: dict[tuple[Any, ...], Any] = {}  # the same by the integers themselves, which is found faster
_MOST_NUMBERS = 4096
_INT32 = range(-(2**31), 2**31)


def _specialized(argument: Any, parameter: Any) -> Any:
    """What Triton compiles for of an integer: whether it is 1, a multiple of 16, and longer than 32 bits.

    Of a parameter named in ``do_not_specialize`` it is only whether it is longer.
    """
    if argument.__class__ is not int:
        return argument
    kind = 0 if parameter.do_not_specialize else 1 if argument == 1 else 0 if argument % 16 else 16
    return kind if argument in _INT32 else ~kind


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Tensor | float | None, ...],
    constants: tuple[Any, ...],
    *,
    num_warps: int,
) -> None:
    """Launch a ``@triton.jit`` function on the device of its first argument.

    Args:
        kernel: the function. Its parameters are ``arguments`` and then, all ``tl.constexpr``, ``constants``.
        grid: number of programs along each axis.
        arguments: tensors of one device, numbers and None; the first is a tensor.
        constants: hashable values.
        num_warps: warps a program.
    """
    first: Tensor = arguments[0]  # type: ignore[assignment]
    index = first.get_device()
    if INTERPRETED or not HAS_TRITON or index < 0:
        kernel[grid](*arguments, *constants, num_warps=num_warps)
        return
    if index != torch.accelerator.current_device_index():  # Triton launches on the current device
        with torch.accelerator.device_index(index):
            launch(kernel, grid, arguments, constants, num_warps=num_warps)
        return
    key: list[Any] = [kernel.fn, index, num_warps, constants]
    values: list[Any] = []
    pointers = 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            pointer = argument.data_ptr()
            pointers |= pointer
            key.append(argument.dtype)
            values.append(pointer)
        else:
            key.append(float if argument.__class__ is float else argument)
            values.append(argument)
    # One that is not aligned changes the compiled kernel: rare, and then Triton looks at each.
    if pointers % 16:
        kernel[grid](*arguments, *constants, num_warps=num_warps)
        return
    compiled = _of_numbers.get(exact := tuple(key))
    if compiled is None:
        found = (*exact[:4], *map(_specialized, exact[4:], kernel.params))
        compiled = _compiled.get(found)
        if compiled is None:
            _compiled[found] = kernel[grid](*arguments, *constants, num_warps=num_warps)
            return
        if len(_of_numbers) >= _MOST_NUMBERS:
            _of_numbers.clear()
        _of_numbers[exact] = compiled
    runtime = triton.knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler wants to see the launch
        compiled[grid](*arguments, *constants)
        return
    stream = triton.runtime.driver.active.get_current_stream(index)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *constants)
