"""The steps of ``bench.gpu_check``. Each returns what it found, or raises ``StepFailed`` or ``StepSkipped``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import reroute
from reroute.handle import Handle

from .clock import captured
from .models import CACHE, IMAGE_ID, QUICK, SCHEDULE, build, inputs_of

__all__ = [
    "Measurement",
    "StepFailed",
    "StepSkipped",
    "benchmarks",
    "find_sanitizer",
    "graph",
    "kernel_tests",
    "no_waiting",
    "sanitizer",
]

ROOT = Path(__file__).parents[1]
SANITIZED = ("tests/kernels/test_rows.py", "tests/kernels/test_score_topk.py", "-k", "odd or ragged or broken")
Run = Callable[[Sequence[str], dict[str, str]], str]


class StepFailed(Exception):
    """A step found something wrong; ``measurements`` are what it measured nevertheless."""

    measurements: tuple[Measurement, ...] = ()


class StepSkipped(Exception):
    """A step cannot run on this machine."""


@dataclass(frozen=True)
class Measurement:
    """Microseconds of one operation on one problem: the median, and what ``bench.modelled`` expected of Triton."""

    operation: str
    problem: str
    backend: str
    mode: str
    median: float
    floor: float
    modelled: float | None


def python(arguments: Sequence[str], environment: dict[str, str]) -> str:
    """Run and return the last line of the output; ``StepFailed`` with the end of it where the exit status is not 0."""
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.strip().splitlines() or ["no output"]
    if done.returncode:
        raise StepFailed(f"{' '.join(arguments)}\n" + "\n".join(lines[-40:]))
    return lines[-1]


def kernel_tests(run: Run = python) -> str:
    """All kernel tests on the device, whole prefills through the kernels among them."""
    return run([sys.executable, *["-m", "pytest", "tests/kernels", "--executor", "cuda", "-q", "--tb=short"]], {})


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, or in the CUDA toolkit."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")


def sanitizer(tool: str, run: Run = python) -> str:
    """A few kernel tests under one tool of compute-sanitizer, every tensor an allocation of its own."""
    program = find_sanitizer()
    if program is None:
        raise StepSkipped("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    check = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    tests = [sys.executable, "-m", "pytest", *SANITIZED, "--executor", "cuda", "-q", "-x"]
    return run([*check, *tests], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


# --- routed prefills of a small random LLaVA ------------------------------------------------------------------------


class Prefills:
    """Routed prefills of one plan. They begin with embedded tokens: Transformers waits when it merges pictures."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model: Any = build(QUICK, dtype)
        self.model: Any = model.to(device)
        self.ids: Tensor = inputs_of(QUICK)["input_ids"].to(device)
        self.embeds: Tensor = self.draw(0)

    def draw(self, seed: int) -> Tensor:
        """The input of another prompt with the same plan."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 512, self.ids.shape, generator=generator).to(self.ids.device)
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        picture = torch.randn(embeds.shape, generator=generator).to(embeds) * embeds.std()
        return torch.where((self.ids == IMAGE_ID)[..., None], picture, embeds)

    def run(self) -> list[Tensor]:
        """Logits, and the keys and values of every layer."""
        output = self.model(inputs_embeds=self.embeds, use_cache=True)
        layers = output[CACHE].layers
        return [output.logits, *(layer.keys for layer in layers), *(layer.values for layer in layers)]

    def routing(self) -> Handle:
        handle: Handle = reroute.enable(self.model, schedule=SCHEDULE)
        return handle


@torch.no_grad()
def graph(device: torch.device, capture: Callable[[Callable[[], Any]], Callable[[], Any]] = captured) -> str:
    """A captured prefill gives, for other inputs of its plan, the bits of the eager one."""
    prefills, inputs = Prefills(device), 3
    with prefills.routing() as handle:
        plan = handle.plan(prefills.ids)
        assert plan is not None
        with handle.using(plan):
            replay = capture(prefills.run)
            for seed in range(1, inputs + 1):
                prefills.embeds.copy_(prefills.draw(seed))
                replayed = [tensor.clone() for tensor in replay()]
                _equal(replayed, prefills.run())
        stats = handle.stats()
    return f"{inputs} inputs, logits and KV caches bit for bit, backend {stats.backend}"


def _equal(replayed: list[Tensor], eager: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(replayed, eager, strict=True)):
        if a.shape != b.shape or not torch.equal(a, b):
            apart = (a.float() - b.float()).abs().max().item() if a.shape == b.shape else "their shapes"
            raise StepFailed(f"replayed and eager prefill differ in tensor {i} (0: logits, then caches) by {apart}")


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def no_waiting(device: torch.device, guard: Callable[[], AbstractContextManager[None]] = _waiting_is_an_error) -> str:
    """A routed prefill whose plan is made never waits for the device, its lease and its tables included."""
    prefills = Prefills(device)
    with prefills.routing() as handle:
        plans = handle.plan(prefills.ids), handle.plan(prefills.ids)
        for plan in plans:  # the first compiles
            assert plan is not None
            with handle.using(plan), guard() if plan is plans[1] else nullcontext():
                prefills.run()
        return f"{handle.stats().prefills} prefills, backend {handle.stats().backend}"


# --- benchmarks -----------------------------------------------------------------------------------------------------


def benchmarks(run: Run = python) -> list[Measurement]:
    """The micro-benchmarks, as measurements; those that passed where others failed."""
    failure = None
    with TemporaryDirectory() as folder:
        file = Path(folder, "benchmarks.json")
        try:
            run([sys.executable, *f"-m pytest bench -q --benchmark-json={file}".split()], {})
        except StepFailed as error:
            failure = error
        results = json.loads(file.read_text())["benchmarks"] if file.exists() else []
    measured = [Measurement(median=1e6 * result["stats"]["median"], **result["extra_info"]) for result in results]
    if failure is not None:
        failure.measurements = tuple(measured)
        raise failure
    return measured
