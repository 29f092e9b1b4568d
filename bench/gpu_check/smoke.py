"""Does each kernel compile, start and give what the torch backend gives? ``python -m bench.gpu_check.smoke``.

Prints versions as a line of JSON first, and each check before it begins, so that a launch that hangs is known. The exit
status is 0 if all is well, 2 without a GPU, 4 if a kernel does not start, and 5 if all start but a result is wrong.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable

import torch

from reroute_kernels import Backend, resolve
from reroute_kernels.testing.cases import OPERATIONS, KernelCase, KernelInputs

from .day import NO_START, NOTHING_RUN, PASSED, WRONG
from .environment import versions

__all__ = ["CHECKS", "check_all", "main"]

CASES = (KernelCase("LLaVA-1.5-7B", 576), KernelCase("Qwen2.5-VL-7B", 16384))
"""One program selects from the first, several from the second."""
NEAR = 1e-2  # of a score, relatively: what the order of fp32 sums may do is far below


def _score_topk(kernels: Backend, reference: Backend, inputs: KernelInputs) -> str:
    """The selection is exact for the kernel's own scores, whose last bits depend on the order of sums."""
    got, wanted = (OPERATIONS["score_topk"](backend, inputs) for backend in (kernels, reference))
    again = reference.select(got.scores, inputs.select_rows)
    apart = ((got.scores - wanted.scores).abs() / wanted.scores).max().item()
    if not all(map(torch.equal, got[:4], again[:4])):
        return "selects others than a stable sort of its own scores does"
    return "" if apart < NEAR else f"scores differ by {apart:.1e} from those of the torch backend"


def _diverse_topk(kernels: Backend, reference: Backend, inputs: KernelInputs) -> str:
    """Exact for the kernel's own scores. Where similarities are nearly equal picks may part, sorted scores hardly."""
    got, wanted = (OPERATIONS["diverse_topk"](backend, inputs) for backend in (kernels, reference))
    again = reference.select(got.scores, inputs.select_rows)
    if not all(map(torch.equal, got[:4], again[:4])):
        return "selects others than a stable sort of its own scores does"
    apart = (got.scores.sort(1).values - wanted.scores.sort(1).values).abs().max().item()
    return "" if apart < NEAR else f"scores differ by up to {apart:.1e} from those of the torch backend"


def _select(kernels: Backend, reference: Backend, inputs: KernelInputs) -> str:
    got, wanted = (OPERATIONS["select"](backend, inputs) for backend in (kernels, reference))
    return "" if all(map(torch.equal, got, wanted)) else "selects others than a stable sort does"


def _rows(kernels: Backend, reference: Backend, inputs: KernelInputs) -> str:
    """Defer, then admit: all bits."""
    results = []
    for backend in (kernels, reference):
        inputs.lease.pages.zero_()
        OPERATIONS["defer"](backend, inputs)
        results.append((inputs.lease.pages.clone(), *OPERATIONS["admit"](backend, inputs)))
    return "" if all(map(torch.equal, *results)) else "moves other bits than the torch backend"


def _defer_rmsnorm(kernels: Backend, reference: Backend, inputs: KernelInputs) -> str:
    results = []
    for backend in (kernels, reference):
        inputs.lease.pages.fill_(1.0)
        normed = OPERATIONS["defer_rmsnorm"](backend, inputs)
        results.append((inputs.lease.pages.clone(), normed.float()))
    (pages, got), (expected, wanted) = results
    if not torch.equal(pages, expected):
        return "moves other bits than the torch backend"
    return "" if torch.allclose(got, wanted, rtol=2e-2, atol=1e-6) else "norms differ from those of the torch backend"


Check = Callable[[Backend, Backend, KernelInputs], str]
CHECKS: dict[str, Check] = {
    "defer and admit": _rows,
    "defer_rmsnorm": _defer_rmsnorm,
    "score_topk": _score_topk,
    "select": _select,
    "diverse_topk": _diverse_topk,
}
"""What is wrong with a kernel, or nothing."""


@torch.no_grad()
def check_all(kernels: Backend, reference: Backend, device: torch.device, dtype: torch.dtype) -> int:
    """The exit status. The last line printed is the first thing that is not as it should be."""
    broken, wrong = [], []
    for case in CASES:
        inputs = KernelInputs(case, device, dtype)
        for name, check in CHECKS.items():
            print(f"{name}, {case}: ", end="", flush=True)
            start = time.perf_counter()
            try:
                found = check(kernels, reference, inputs)
            except Exception as error:
                traceback.print_exc()
                broken.append(f"{name} does not start: {type(error).__name__}: {error}".replace("\n", " "))
                continue
            print(found or "right", f"({time.perf_counter() - start:.1f} s)", flush=True)
            if found:
                wrong.append(f"{name}, {case}: {found}")
    print(*(broken or wrong or ["all kernels start and are right"])[:1])
    return NO_START if broken else WRONG if wrong else PASSED


def main() -> int:
    """The exit status."""
    if not torch.cuda.is_available():
        print(f"it needs a CUDA device, and torch {torch.__version__} finds none")
        return NOTHING_RUN
    print(json.dumps(versions()), flush=True)
    device = torch.device("cuda")
    return check_all(resolve("triton", device), resolve("torch", device), device, torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
