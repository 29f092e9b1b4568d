"""Compile and load the kernels of a backend before the first prefill that is served, and say which they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, Literal, get_args

from torch import Tensor
from torch.nn.functional import pad

from .dispatch import Backend
from .reference import AttentionSpec, RopeTables, Selection, SelectRows

__all__ = ["LoadedKernel", "WarmUp", "load_kernels"]

Source = Literal["compiled", "from Triton's cache", "loaded before"]
"""Whether Triton compiled a kernel, found its binary in the cache on disk, or had it in this process already."""


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that is ready. ``seconds``: of its first launch in the warm-up, on the host."""

    name: str
    seconds: float
    source: Source


@dataclass(frozen=True)
class WarmUp:
    """The kernels that prefills of up to ``visual`` visual tokens and ``batch`` prompts can need, by first use.

    None where there is nothing to compile.
    """

    backend: str
    reason: str
    visual: int
    batch: int
    kernels: tuple[LoadedKernel, ...]

    @property
    def seconds(self) -> float:
        """Sum over the kernels."""
        return sum(kernel.seconds for kernel in self.kernels)

    def __str__(self) -> str:
        """A line for each kernel."""
        if not self.kernels:
            return f"nothing to compile on backend {self.backend} ({self.reason})"
        sources = [kernel.source for kernel in self.kernels]
        counts = ", ".join(f"{n} {source}" for source in get_args(Source) if (n := sources.count(source)))
        head = (
            f"{len(self.kernels)} kernels for up to {self.visual} visual tokens and batches of up to {self.batch}, "
            f"ready after {self.seconds:.2f} s: {counts}"
        )
        width = max(len(kernel.name) for kernel in self.kernels)
        lines = (f"  {k.name:{width}}  {k.seconds:5.2f} s  {k.source}" for k in self.kernels)
        return "\n".join((head, *lines))


def load_kernels(backend: Backend, visual: int, batch: int, prefills: Callable[[Backend], None]) -> WarmUp:
    """Run ``prefills`` on a backend that loads whatever prompts of up to ``visual`` visual tokens can need.

    Prompts of a few tokens are enough: each of their selections is made once for every length of a row that a kernel
    is compiled for. They come one by one, and in a batch too if ``batch`` is more than 1.
    """
    kernels = [] if backend.name == "torch" else _loaded_by(lambda: prefills(_at_every_width(backend, visual)))
    return WarmUp(backend.name, backend.reason, visual, batch, tuple(kernels))


def _at_every_width(backend: Backend, visual: int) -> Backend:
    """``backend``, which selects once more from rows padded to each width that has a kernel of its own."""
    from .triton_kernels.select import row_classes

    def padded(rows: Tensor, value: float) -> list[Tensor]:
        gaps = (width - rows.shape[1] for width in row_classes(visual))
        return [pad(rows, (0, gap), value=value) for gap in gaps if gap > 0]

    def select(scores: Tensor, rows: SelectRows) -> Selection:
        selection = backend.select(scores, rows)
        for wide, candidates in zip(padded(scores, -float("inf")), padded(rows.candidates, -1), strict=True):
            backend.select(wide, rows._replace(candidates=candidates))
        return selection

    def score_topk(query: Tensor, keys: Tensor, tables: RopeTables, rows: SelectRows, spec: AttentionSpec) -> Selection:
        selection = backend.score_topk(query, keys, tables, rows, spec)
        for candidates in padded(rows.candidates, -1):
            backend.score_topk(query, keys, tables, rows._replace(candidates=candidates), spec)
        return selection

    def diverse_topk(states: Tensor, rows: SelectRows) -> Selection:
        selection = backend.diverse_topk(states, rows)
        for candidates in padded(rows.candidates, -1):
            backend.diverse_topk(states, rows._replace(candidates=candidates))
        return selection

    return replace(backend, select=select, score_topk=score_topk, diverse_topk=diverse_topk)


def _loaded_by(run: Callable[[], None]) -> list[LoadedKernel]:
    """Each kernel that ``run`` launches from this thread."""
    from triton import knobs

    from .triton_kernels.launch import observing

    thread = get_ident()
    listener: Callable[..., None] | None = None
    loaded: dict[Any, LoadedKernel] = {}
    hits: list[bool] = []  # of the launch that runs now

    def compiling(**event: Any) -> None:
        if get_ident() == thread:
            hits.append(event["cache_hit"])
        if listener is not None:
            listener(**event)

    def launched(name: str, compiled: Any, seconds: float) -> None:
        if get_ident() != thread:
            return
        source: Source = "loaded before" if not hits else "from Triton's cache" if all(hits) else "compiled"
        loaded.setdefault(compiled, LoadedKernel(name, seconds, source))
        hits.clear()

    with observing(launched):
        listener, knobs.compilation.listener = knobs.compilation.listener, compiling
        try:
            run()
        finally:
            knobs.compilation.listener = listener
    return list(loaded.values())
