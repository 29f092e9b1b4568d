from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

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


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: str | None, installed: str | None) -> None:
    """Of this machine: a GPU, by Triton's names of its kind and architecture, and a release of triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    if installed is None:
        monkeypatch.setitem(sys.modules, "triton", None)  # what makes an import fail
        return
    triton = pytest.importorskip("triton")

    def target() -> SimpleNamespace:
        if gpu == "broken":
            raise RuntimeError("Failed to find C compiler")
        backend, _, arch = str(gpu).partition(":")
        return SimpleNamespace(backend=backend, arch=int(arch) if arch.isdigit() else arch)

    monkeypatch.setattr(triton, "__version__", installed)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_target=target)))


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
        (CUDA, "cuda:90", "3.3.1", "needs triton 3.4 or newer and this is 3.3.1"),
        (CUDA, "broken", "3.7.1", "driver does not start .*C compiler"),
        (CUDA, "hip:gfx942", "3.7.1", "made for NVIDIA GPUs and this is hip"),
        (CUDA, "cuda:75", "3.7.1", "needs compute capability 8.0 or newer and this is 7.5"),
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
    for name in dispatch.KNOWN:
        check_backend(name)
    with pytest.raises(BackendUnavailable, match="does not start"):
        resolve("triton", CUDA)
    pretend(monkeypatch, None, "3.7.1")
    with pytest.raises(BackendUnavailable, match="finds no CUDA device"):
        check_backend("triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        check_backend("cuda")


def test_auto_is_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda:80", "3.10.0+git1")
    backend = resolve("auto", CUDA)
    assert (backend.name, backend.reason) == ("triton", "tensors are on cuda")
    assert resolve("triton", CUDA).defer is backend.defer is torch.ops.reroute_kernels.defer.default


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
