"""What a launch must look like: it follows from the call and from what the compiler says of the kernel.

Nothing is taken from the launcher, which is under test. A launch must also equal that of ``kernel[grid](...)``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from emulation import Emulation, Launch, Parameter
from torch import Tensor
from triton.runtime import JITFunction

from reroute_kernels.triton_kernels.launch import SpecializedKernel

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "i8",
}
Call = tuple[SpecializedKernel, tuple[int, int, int], tuple[Any, ...]]


def check(launch: Launch, call: Call) -> None:
    """``launch`` is what ``call`` asks for, by a kernel that was compiled for such arguments."""
    (variant, grid, arguments), kernel = call, launch.kernel
    names = variant._kernel.arg_names[: len(arguments)]
    shape = launch.grid, launch.block, launch.shared, launch.attributes
    threads = 32 * variant._options["num_warps"]
    assert kernel.name == variant._kernel.__name__, f"launched {kernel.name} in place of {variant._kernel.__name__}"
    assert kernel.threads == threads, f"a kernel of {kernel.threads} threads in place of {threads}"
    assert shape == (grid, (threads, 1, 1), kernel.shared, 0), f"grid, block, shared memory and attributes: {shape}"
    strangers = {parameter.name for parameter in kernel.parameters} - set(names)
    assert not strangers, f"parameters {strangers} are not arguments"
    for name, argument in zip(names, arguments, strict=True):
        found = [(p, v) for p, v in zip(kernel.parameters, launch.values, strict=False) if p.name == name]
        wanted = [value for value in flat(argument) if value is not None]
        if len(found) < len(wanted):  # a 1 may be a constant of the kernel
            wanted = [value for value in wanted if not (type(value) is int and value == 1)]
        assert len(found) == len(wanted), f"{name}: {len(found)} parameters for {argument}"
        for (parameter, value), expected in zip(found, wanted, strict=True):
            assert fits(parameter, expected), f"{parameter} is not for {expected}"
            assert value == packed(expected, parameter.bytes), f"{name}: {value.hex()} is not {expected}"
    scratch = launch.values[len(kernel.parameters) :]
    assert scratch == (bytes(8),) * kernel.scratch, f"scratch memory: {scratch}"


def flat(argument: Any) -> Iterator[Any]:
    """The leaves of nested tuples."""
    if isinstance(argument, tuple):
        yield from chain.from_iterable(map(flat, argument))
    else:
        yield argument


def fits(parameter: Parameter, value: Any) -> bool:
    """Whether the kernel's code is right for ``value``: its type, width and divisibility."""
    number = value
    if isinstance(value, Tensor):
        number, kind = value.data_ptr(), f"*{TYPES[value.dtype]}"
    elif isinstance(value, float):
        kind = "f32"
    elif isinstance(value, bool):
        kind = "i1"
    else:
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return parameter.type == kind and not (parameter.divisible and number % 16)


def packed(value: Any, size: int) -> bytes:
    """As a kernel reads it."""
    if isinstance(value, float):
        return struct.pack("<f", value)
    number = value.data_ptr() if isinstance(value, Tensor) else value
    return int(number % 2 ** (8 * size)).to_bytes(size, "little")


def launched(gpu: Emulation, launch: Callable[..., object], *arguments: Any) -> Launch:
    """The one launch of a call."""
    before = len(gpu.launches)
    launch(*arguments)
    (one,) = gpu.launches[before:]
    return one


def run(gpu: Emulation, call: Call) -> Launch:
    """Launch by the variant, checked."""
    variant, grid, arguments = call
    launch = launched(gpu, variant, grid, *arguments)
    check(launch, call)
    assert launch == launched(
        gpu, lambda: variant._kernel[grid](*arguments, **variant.constants, **variant._options)
    ), "Triton itself would launch another kernel"
    return launch


def run_cached(gpu: Emulation, call: Call) -> None:
    """As ``run``, of a call whose kernel is known: the variant must not ask Triton again."""
    variant, grid, arguments = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", None)
        launch = launched(gpu, variant, grid, *arguments)
    check(launch, call)
    assert launch == run(gpu, call)


@contextmanager
def checked(gpu: Emulation) -> Iterator[list[Launch]]:
    """Check every launch of a variant in the block; they are listed."""
    launch, launches = SpecializedKernel.__call__, []

    def run(variant: SpecializedKernel, grid: tuple[int, int, int], *arguments: Any) -> None:
        launches.append(launched(gpu, launch, variant, grid, *arguments))
        check(launches[-1], (variant, grid, arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecializedKernel, "__call__", run)
        yield launches


def calls_of(launch: Callable[[], object]) -> list[Call]:
    """The calls of variants that ``launch`` makes, not carried out."""
    calls: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SpecializedKernel, "__call__", lambda variant, grid, *arguments: calls.append((variant, grid, arguments))
        )
        launch()
    return calls
