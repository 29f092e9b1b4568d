"""The host path of real CUDA without a GPU: Triton's CUDA driver and launchers, over a libcuda that runs nothing.

Everything on the host is real: specialisation, compilation, loading, the launchers and their packing of arguments.
Replaced are libcuda (libcuda.c) and what PyTorch says of devices and streams. Tensors are on the CPU.

It changes its process for good and must come before Triton's driver starts: it is for a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("libcuda.c")
SIZES = {"u64": 8, "f64": 8, "u32": 4, "f32": 4, "u16": 2, "b16": 2, "u8": 1, "b8": 1}  # of PTX types, in bytes


@dataclass(frozen=True)
class Parameter:
    """Of a compiled kernel. ``name``: of the kernel's argument; the elements of a tuple have the same one."""

    name: str
    type: str
    divisible: bool
    bytes: int


@dataclass(frozen=True)
class Kernel:
    """What the compiler's own output says of a kernel: TTIR names the parameters, PTX gives their sizes."""

    name: str
    parameters: tuple[Parameter, ...]
    scratch: int
    threads: int
    shared: int

    @classmethod
    def read(cls, name: str, files: dict[str, Any]) -> Kernel:
        """From the files of one compilation."""
        texts = {path.suffix: path.read_text() for path in map(Path, files.values()) if path.suffix != ".cubin"}
        named = _named(_found(r"(tt\.func public @.*)", texts[".ttir"]))
        entry = _found(r"(?s)(\.entry .*?\{)", texts[".ptx"])
        sizes = [SIZES[kind] for kind in re.findall(r"\.param \.(\w+)", entry)]
        parameters = tuple(Parameter(*one, size) for one, size in zip(named, sizes, strict=False))
        shared = _found(r'"shared": (\d+)', texts[".json"])
        threads = _found(r"\.reqntid (\d+)", entry)
        return cls(name, parameters, len(sizes) - len(named), int(threads), int(shared))


def _found(pattern: str, text: str) -> str:
    """The first group of the pattern, which the text must have."""
    found = re.search(pattern, text)
    assert found, f"no {pattern}"
    return found[1]


def _named(signature: str) -> list[tuple[str, str, bool]]:
    """Name, type and whether divisible by 16, of each parameter of a TTIR function."""
    pattern = r'%[\w.]+: (?:!tt\.ptr<(\w+)>|(\w+))( \{[^}]*\})? loc\("(\w+)[\w.]*"'
    found = re.findall(pattern, signature)
    assert len(found) == signature.count("%"), signature
    return [(name, f"*{to}" if to else plain, "divisibility = 16" in facts) for to, plain, facts, name in found]


@dataclass(frozen=True)
class Launch:
    """What CUDA was asked to run. ``values``: the bytes of every parameter, scratch included."""

    kernel: Kernel
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    device: int
    stream: int
    values: tuple[bytes, ...]


class _Seen(ctypes.Structure):
    """``Launch`` of libcuda.c."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("device", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    )


_Observer = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Seen))


class Emulation:
    """Two GPUs. ``launches``: what ran, in order. Set ``capability`` and ``streams`` as a test needs them."""

    def __init__(self) -> None:
        """Take the place of CUDA in this process."""
        from triton import knobs

        path = _library()
        os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
        self._cuda = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # what later asks for libcuda.so.1 gets this one
        self._cuda.emulation_stream.restype = ctypes.c_uint64
        self.launches: list[Launch] = []
        self.capability, self.device = (9, 0), 0
        self.streams = [self.stream(0), self.stream(1)]  # the current one of each device
        self._kernels: dict[int, Kernel] = {}
        self._observer = _Observer(self._observe)
        self.recording(True)
        knobs.runtime.kernel_load_end_hook.add(self._loaded)
        self.use(0)
        self._answer_for_torch()

    def stream(self, device: int, number: int = 0) -> int:
        """A stream of a device, as CUDA's handle."""
        return int(self._cuda.emulation_stream(device, number))

    def use(self, device: int) -> int:
        """Make ``device`` the current one; return which one was."""
        context = ctypes.c_void_p()
        self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self._cuda.cuCtxSetCurrent(context)
        before, self.device = self.device, device
        return before

    def recording(self, on: bool) -> None:
        """Whether launches are listed, which takes time."""
        self._cuda.emulation_observe(self._observer if on else None)

    def _answer_for_torch(self) -> None:
        torch._C._cuda_getCurrentRawStream = lambda device: self.streams[device]
        answers: dict[str, Callable[..., object]] = {
            "is_available": lambda: True,
            "device_count": lambda: len(self.streams),
            "current_device": lambda: self.device,
            "get_device_capability": lambda device=None: self.capability,
            **dict.fromkeys(("set_device", "_exchange_device", "_maybe_exchange_device"), self.use),
        }
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)

    def _loaded(self, module: int, function: int, name: str, files: dict[str, Any], digest: str) -> None:
        self._kernels[function] = Kernel.read(name, files)

    def _observe(self, seen: Any) -> None:
        launch = seen.contents
        kernel = self._kernels[launch.function]
        assert launch.name.decode() == kernel.name
        sizes = [*(parameter.bytes for parameter in kernel.parameters), *[8] * kernel.scratch]
        self.launches.append(
            Launch(
                kernel,
                launch.function,
                tuple(launch.grid),
                tuple(launch.block),
                launch.shared,
                launch.attributes,
                launch.device,
                launch.stream or 0,
                tuple(ctypes.string_at(launch.parameters[i], size) for i, size in enumerate(sizes)),
            )
        )


def _library() -> Path:
    """libcuda.so.1, compiled as Triton compiles its driver and kept where Triton keeps that."""
    from triton.backends.nvidia.driver import include_dirs
    from triton.runtime.build import _build
    from triton.runtime.cache import get_cache_manager

    headers = Path(include_dirs[0], "cuda.h").read_bytes()
    cache = get_cache_manager(hashlib.sha256(SOURCE.read_bytes() + headers).hexdigest())
    if (built := cache.get_file("libcuda.so.1")) is None:
        with tempfile.TemporaryDirectory() as folder:
            made = _build("libcuda", str(SOURCE), folder, [], list(include_dirs), [], ["-Wl,-soname,libcuda.so.1"])
            built = cache.put(Path(made).read_bytes(), "libcuda.so.1", binary=True)
    return Path(built)
