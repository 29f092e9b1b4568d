from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import pytest
import torch

from reroute_kernels import BackendUnavailable, check_backend, dispatch, reference, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("REROUTE_BACKEND", raising=False)
    dispatch._resolve.cache_clear()
    yield
    dispatch._resolve.cache_clear()


class Machine:
    """A GPU of this kind and architecture, in Triton's words, that compiles and launches nothing; "broken" has none.

    ``launched`` names kernels, and ``used`` devices.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        from reroute_kernels.triton_kernels.offline import _driver

        backend, _, arch = gpu.partition(":")
        self._driver = _driver(int(arch) if arch.isdigit() else 90)
        self._driver.launches = []
        self.used: list[torch.device] = []

        def target() -> Any:
            if gpu == "broken":
                raise RuntimeError("Failed to find C compiler")
            return GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32)

        @contextmanager
        def on(device: torch.device) -> Iterator[None]:
            self.used.append(device)
            yield  # tensors are made on the CPU

        monkeypatch.setattr(driver, "_active", self._driver, raising=False)
        monkeypatch.setattr(self._driver, "get_current_target", target)
        monkeypatch.setattr(dispatch, "_on", on)

    @property
    def launched(self) -> list[str]:
        return sorted(launch.kernel for launch in self._driver.launches)


def all_kernels() -> list[str]:
    """Names of the functions that are launched, in any file."""
    from reroute_kernels import triton_kernels

    names = [file.name for file in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}.")]
    return sorted(
        kernel for name in names for kernel in vars(importlib.import_module(name)) if kernel.endswith("_kernel")
    )


@overload
def pretend(monkeypatch: pytest.MonkeyPatch, gpu: str, installed: str) -> Machine: ...
@overload
def pretend(monkeypatch: pytest.MonkeyPatch, gpu: str | None, installed: str | None) -> Machine | None: ...
def pretend(monkeypatch: pytest.MonkeyPatch, gpu: str | None, installed: str | None) -> Machine | None:
    """This machine has this GPU and this release of triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    if installed is None:
        monkeypatch.setitem(sys.modules, "triton", None)  # what makes an import fail
        return None
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", installed)
    return None if gpu is None else Machine(monkeypatch, gpu)


def test_torch_is_the_reference() -> None:
    backend = resolve("torch", CUDA)
    assert (backend.name, backend.reason) == ("torch", "asked for")
    for operation in ("defer", "admit", "select", "score_topk"):
        assert getattr(backend, operation) is getattr(reference, operation)


@pytest.mark.parametrize(
    ("device", "gpu", "installed", "why"),
    [
        (CPU, "cuda:90", "3.7.1", "these are on cpu"),
        (CUDA, None, "3.7.1", "PyTorch finds no CUDA device"),
        (CUDA, "cuda:90", None, "triton cannot be imported"),
        (CUDA, "cuda:90", "3.5.1", "needs triton 3.6 or newer and this is 3.5.1"),
        (CUDA, "broken", "3.7.1", r"driver does not start \(RuntimeError: Failed to find C compiler\)"),
        (CUDA, "hip:gfx942", "3.7.1", "made for NVIDIA GPUs and this is hip"),
        (CUDA, "cuda:75", "3.7.1", "needs compute capability 8.0 or newer and this is 7.5"),
        (CUDA, "cuda:990", "3.7.1", r"do not start here: ptxas fails \(RuntimeError: ptxas.* 'sm_990a' is not defined"),
    ],
)
def test_auto_says_why_it_is_torch_and_triton_why_it_cannot(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, gpu: str | None, installed: str | None, why: str
) -> None:
    pretend(monkeypatch, gpu, installed)
    backend = resolve("auto", device)
    assert backend.name == "torch"
    assert re.search(why, backend.reason)
    with pytest.raises(BackendUnavailable, match=why) as caught:
        resolve("triton", device)
    assert "use backend='torch' or 'auto'" in str(caught.value)


def test_a_check_leaves_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may choose its GPU, or fork, after it has asked for routing."""
    pretend(monkeypatch, "broken", "3.7.1")
    for name in dispatch.BACKENDS:
        check_backend(name)
    with pytest.raises(BackendUnavailable, match="does not start"):
        resolve("triton", CUDA)
    pretend(monkeypatch, None, "3.7.1")
    with pytest.raises(BackendUnavailable, match="finds no CUDA device"):
        check_backend("triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        check_backend("cuda")


def test_auto_is_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a release that is newer than any known one, once each kernel has started."""
    machine = pretend(monkeypatch, "cuda:90", "3.10.0+git1")
    backend = resolve("auto", CUDA)
    assert (backend.name, backend.reason) == ("triton", "tensors are on cuda")
    assert machine.launched == all_kernels()
    assert resolve("triton", CUDA).defer is backend.defer is torch.ops.reroute_kernels.defer.default


def test_kernels_are_tried_once_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, second = pretend(monkeypatch, "cuda:90", "3.7.1"), torch.device("cuda", 1)
    for device in (CUDA, second, CUDA, second):
        resolve("auto", device)
    assert machine.used == [CUDA, second]
    assert machine.launched == sorted(2 * all_kernels())


def no_feature() -> None:
    """A kernel that no release compiles, behind a call."""
    import triton
    import triton.language as tl

    @triton.jit
    def helper(x):  # type: ignore[no-untyped-def]
        tl.store(x + tl.arange(0, 3), 1.0)

    @triton.jit
    def kernel(x):  # type: ignore[no-untyped-def]
        helper(x)

    kernel[(1,)](torch.zeros(4))


def no_resources() -> None:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300_000, 232_448, "shared memory")


def no_assembler() -> None:
    """Triton's message is the whole log, and a command with paths of this machine."""
    from triton.runtime.errors import PTXASError

    log = "ptxas fatal : Unsupported .version 9.9; current version is '8.8'\n"
    raise PTXASError(
        f"Internal Triton PTX codegen error\n`ptxas` stderr:\n{log}Repro command: /usr/bin/ptxas -lineinfo"
    )


def no_compiler() -> None:
    subprocess.run(["/bin/false", *(f"-I{'include/' * 9}{i}" for i in range(9))], check=True)


@pytest.mark.parametrize(
    ("launch", "why"),
    [
        (no_feature, "(ValueError: arange's range must be a power of 2)"),
        (no_resources, "OutOfResources: out of resource: shared memory, Required: 300000, Hardware limit: 232448."),
        (no_assembler, "Unsupported .version 9.9; current version is '8.8')"),
        (no_compiler, "CalledProcessError: Command '['/bin/false', '-Iinclude/"),
    ],
)
def test_a_kernel_that_does_not_start_is_found_before_a_prefill(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, launch: Callable[[], None], why: str
) -> None:
    """Although the first ones do. The reason is that of the compiler, on one short line, and logged once."""
    pretend(monkeypatch, "cuda:90", "3.7.1")
    from reroute_kernels.triton_kernels import catalogue

    cases = (*catalogue.SMALLEST[:1], catalogue.Case("score_topk", launch))
    monkeypatch.setattr(catalogue, "SMALLEST", cases)
    with caplog.at_level(logging.INFO, logger="reroute"):
        backend = resolve("auto", CUDA)
        assert resolve("auto", CUDA) is backend
    assert backend.name == "torch"
    assert backend.reason.startswith("triton cannot run: its kernels do not start here: score_topk fails (")
    assert why in backend.reason
    assert "\n" not in backend.reason
    assert len(backend.reason) < 320
    assert caplog.messages == [f"backend torch on cuda:0: {backend.reason}"]
    with pytest.raises(BackendUnavailable, match=re.escape(why)) as caught:
        resolve("triton", CUDA)
    assert caught.value.__cause__ is not None  # with all that the compiler said


def test_no_memory_says_nothing_about_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda:90", "3.7.1")
    from reroute_kernels.triton_kernels import catalogue

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "SMALLEST", (catalogue.Case("defer", full),))
        with pytest.raises(torch.OutOfMemoryError):
            resolve("auto", CUDA)
    assert resolve("auto", CUDA).name == "triton"


def test_unknown_names_list_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'cuda'; known: 'auto', 'torch', 'triton'"):
        resolve("cuda", CPU)
    monkeypatch.setenv("REROUTE_BACKEND", "nope")
    with pytest.raises(ValueError, match=r"'nope' \(from REROUTE_BACKEND\)"):
        resolve("auto", CPU)


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REROUTE_BACKEND", "torch")
    assert resolve("triton", CPU).reason == "REROUTE_BACKEND asks for it"
    monkeypatch.setenv("REROUTE_BACKEND", "triton")
    with pytest.raises(BackendUnavailable):
        resolve("torch", CPU)
    monkeypatch.setenv("REROUTE_BACKEND", "")
    assert resolve("torch", CPU).name == "torch"


def test_decided_and_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None, None)
    with caplog.at_level(logging.INFO, logger="reroute"):
        first = resolve("auto", CPU)
        assert resolve("auto", CPU) is first
        assert len(caplog.messages) == 1
        assert "torch on cpu" in caplog.messages[0]
        assert first.reason in caplog.messages[0]
        resolve("auto", CUDA)
        resolve("torch", CPU)
        assert len(caplog.messages) == 3


def test_triton_is_never_imported() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import reroute_kernels as r; r.resolve('auto', torch.device('cpu'))\n"
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
