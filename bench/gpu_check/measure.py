"""Measurements of one model: whole prefills, its layers alone, and the kernels of a routed prefill."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

import reroute
from reroute.core.schedule import Schedule
from reroute.handle import Handle
from reroute_kernels import PagedPool
from reroute_kernels.testing.cases import TEXT

from ..end_to_end.models import CACHE, twin
from ..kernels.prefill_roofline import costs, dense, schedule_of
from .capture import captured_prefill
from .lines import DENSE, VARIANTS, Deadline, Key
from .profiler import profiled
from .shapes import SHAPES, Prompt, build, fitting, memory_of_prefill, position_ids

__all__ = ["Session", "Wrong"]

Run = Callable[[], Any]
ROUNDS, LEAST = 15, 3
SECONDS = 1.0  # after which no further round begins
BUILD, START = 15.0, 5.0  # seconds on a GPU, for a model, and for a line besides its prefills: kernels may be compiled
RUNS = 8  # dense prefills that a line takes before its rounds, and to spare
MARGIN = 1.1  # of memory: allocators round up


class Wrong(Exception):
    """A prefill computed something that it may not."""


class Session:
    """One model on one device, three times on the same weights: plain, to be routed, and to be routed in graphs."""

    def __init__(
        self, model: str, device: torch.device, deadline: Deadline, capture: Callable[[Run], Run] = captured_prefill
    ) -> None:
        """Build it, with fewer layers if memory asks for that.

        Raises:
            OutOfTime: there is hardly time to build it.
        """
        self._device, self._deadline, self._capture = device, deadline, capture
        self._is_cuda = device.type == "cuda"
        self._deadline.need(BUILD * self._is_cuda)
        dtype = torch.bfloat16 if self._is_cuda else torch.float32
        self._itemsize = dtype.itemsize
        self.shape = fitting(SHAPES[model], self._free(), self._itemsize)
        self._about = {"layers": self.shape.num_layers, "of_layers": SHAPES[model].num_layers}
        self._plain = build(model, self.shape, device, dtype)
        self._routed, self._replayed = twin(self._plain), twin(self._plain)
        if self._is_cuda:  # what is there now stays: collecting garbage need not look at it again
            gc.collect()
            gc.freeze()

    def measure(self, key: Key) -> dict[str, Any]:
        """The values of a line; ``skipped`` says why there are none.

        Raises:
            OutOfTime: nothing can be said in the time that is left.
            Wrong: logits, lengths or a replay are not what they have to be.
        """
        needed, free = MARGIN * self._needed(key), self._free()
        if needed > free:
            why = f"needs about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free"
            return {**self._about, "skipped": why}
        if self._is_cuda:
            self._deadline.need(START + RUNS * dense(self.shape, key.visual, key.batch).graph[0])
        self._held = self._allocated()
        measures = {"prefill": self._prefill, "layers": self._layers, "kernels": self._kernels, "replay": self._replay}
        with torch.no_grad():
            return {**self._about, **measures[key.kind](key)}

    def clear(self) -> None:
        """Free what the last line held. RuntimeError if the device no longer answers."""
        if self._is_cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    # --- kinds of lines -------------------------------------------------------------------------------------------

    def _prefill(self, key: Key) -> dict[str, Any]:
        prompt = Prompt(self._plain, key.visual, key.batch, self._device)
        plain, ours = (functools.partial(model, **prompt.given) for model in (self._plain, self._routed))
        if key.variant in DENSE:
            return self._checked(key, plain)
        with self._routing(key) as handle:
            planning = [self._timed(lambda: handle.plan(prompt.ids))[1] for _ in range(LEAST)]
            with handle.using(handle.plan(prompt.ids)):
                values = self._checked(key, ours, plain)
            _same("the tokens kept", handle.stats().kept, (handle.schedule.counts(key.visual),) * key.batch)
        spent = asdict(costs(self.shape, handle.schedule, handle.config.action, key.visual))
        values |= {name: round(value, 4) for name, value in spent.items()}
        return values if key.mode == "graph" else {**values, "plan_ms": _ms(planning)}

    def _replay(self, key: Key) -> dict[str, Any]:
        """With ``graphs=True``, beside a dense eager prefill and the same one eagerly: all that a caller waits for."""
        prompt = Prompt(self._plain, key.visual, key.batch, self._device)
        plain, eager, ours = (
            functools.partial(model, **prompt.asked) for model in (self._plain, self._routed, self._replayed)
        )
        with self._routing(key), self._routing(key, self._replayed, graphs=reroute.Graphs(max_waste=10)) as handle:
            for _ in range(2):  # the second one is captured
                ours()
            self._check(ours(), key)
            use = handle.stats().graph
            if use is None or use.waste is None:
                raise Wrong(f"a prefill was not replayed: {use}")
            values = self._compared(key, [ours, plain, eager])
            return {**values, "waste": round(use.waste.seconds, 4), "held_gib": round(use.nbytes / 2**30, 3)}

    def _layers(self, key: Key) -> dict[str, Any]:
        """The decoder layers on so many rows each, without routing, cache or head: what these lengths cost at least."""
        decoder, whole, compact = self._plain.model.language_model, self._whole(key), self._lengths(key)
        width, dtype = self.shape.hidden, self._plain.dtype
        rows = {
            n: 0.05 * torch.randn(key.batch, n, width, device=self._device, dtype=dtype) for n in {*whole, *compact}
        }
        tables = {n: decoder.rotary_emb(x, position_ids(self._plain, *x.shape[:2])) for n, x in rows.items()}

        def run(lengths: Sequence[int]) -> None:
            for layer, n in zip(decoder.layers, lengths, strict=True):
                layer(rows[n], attention_mask=None, position_embeddings=tables[n])

        runs: list[Run] = [functools.partial(run, lengths) for lengths in (compact, whole)]
        return self._compared(key, [self._capture(r) for r in runs] if key.mode == "graph" else runs)

    def _kernels(self, key: Key) -> dict[str, Any]:
        prompt = Prompt(self._plain, key.visual, key.batch, self._device)
        with self._routing(key) as handle, handle.using(handle.plan(prompt.ids)):
            for _ in range(2):
                self._routed(**prompt.given)
            return profiled(lambda: self._routed(**prompt.given))

    @contextmanager
    def _routing(self, key: Key, model: Any = None, **settings: Any) -> Iterator[Handle]:
        """With a pool of its own: its memory is that of this line. Of a dense variant everything is kept."""
        model = self._routed if model is None else model
        if key.variant in DENSE:
            with reroute.enable(model, keep=1.0, **settings) as handle:
                yield handle
            return
        action, _ = VARIANTS[key.variant]
        pool = PagedPool(self.shape.hidden, self._plain.dtype, self._device)
        given: dict[str, Any] = {"action": action, "backend": key.backend, "pool": pool, **settings}
        with reroute.enable(model, schedule=self._schedule(key), **given) as handle:
            _same("the backend", handle.backend.name, key.backend)
            yield handle

    # --- lengths and memory ---------------------------------------------------------------------------------------

    def _schedule(self, key: Key) -> Schedule:
        return schedule_of(self.shape.num_layers, *VARIANTS[key.variant])

    def _whole(self, key: Key) -> list[int]:
        return [key.visual + TEXT] * self.shape.num_layers

    def _lengths(self, key: Key) -> list[int]:
        """Rows of a sample that each layer runs, and its cache holds."""
        if key.variant in DENSE:
            return self._whole(key)
        return [TEXT + kept for kept in self._schedule(key).per_layer(key.visual, self.shape.num_layers)]

    def _needed(self, key: Key) -> int:
        """Bytes besides the weights. Graphs hold theirs side by side."""
        memory = functools.partial(memory_of_prefill, self.shape, batch=key.batch, itemsize=self._itemsize)
        whole, ours = memory(self._whole(key)), memory(self._lengths(key))
        if key.kind == "replay":
            return whole + 2 * ours  # caches are copied out
        is_alone = key.variant in DENSE or key.mode == "eager"
        return max(whole, ours) if is_alone else whole + ours

    def _free(self) -> float:
        return float(torch.cuda.mem_get_info(self._device)[0]) if self._is_cuda else float("inf")

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._is_cuda else 0

    # --- one measurement ------------------------------------------------------------------------------------------

    def _checked(self, key: Key, run: Run, *others: Run) -> dict[str, Any]:
        """Time ``run`` beside ``others`` once it is known to compute what it should."""
        logits = self._check(run(), key)
        if key.mode == "graph":
            runs = [self._capture(r) for r in (run, *others)]
            if not torch.equal(self._check(runs[0](), key), logits):
                raise Wrong("the logits of a replayed graph are not those of the eager prefill, bit for bit")
            return self._compared(key, runs)
        peak = self._peak(run)
        return {**self._compared(key, [run, *others]), **peak}

    def _check(self, output: Any, key: Key) -> torch.Tensor:
        if not bool(torch.isfinite(output.logits).all()):
            raise Wrong("some logits are not finite")
        lengths = [layer.keys.shape[-2] for layer in output[CACHE].layers]
        _same("the lengths of the cache", lengths, self._lengths(key))
        logits: torch.Tensor = output.logits.clone()
        return logits

    def _peak(self, run: Run) -> dict[str, float]:
        """What the prefill adds to the weights at most: with its cache, and with the pool if it is routed."""
        if not self._is_cuda:
            return {}
        torch.cuda.reset_peak_memory_stats()
        run()
        return {"peak_gib": round((torch.cuda.max_memory_allocated() - self._held) / 2**30, 3)}

    def _compared(self, key: Key, runs: Sequence[Run]) -> dict[str, Any]:
        """Milliseconds of the first run; of the second, which is dense, in alternation with it; and their ratio.

        A third one is the first eagerly.
        """
        rounds = list(self._rounds(runs))
        returned, ended = ([[pair[i] for pair in column] for column in zip(*rounds, strict=True)] for i in (0, 1))
        values = {"median_ms": _ms(ended[0]), "min_ms": round(1e3 * min(ended[0]), 4), "rounds": len(rounds)}
        if key.mode == "eager":
            values["host_ms"] = _ms(returned[0])
        if len(runs) > 1:
            ratios = [ours / whole for ours, whole in zip(*ended[:2], strict=True)]
            values |= {"dense_ms": _ms(ended[1]), "ratio": round(statistics.median(ratios), 4)}
        if len(runs) > 2:
            values["eager_ms"] = _ms(ended[2])
        return values

    def _rounds(self, runs: Sequence[Run]) -> Iterator[list[tuple[float, float]]]:
        """For each round and run: seconds until the call returned, and until the device was done.

        A first round warms up and does not count. OutOfTime where there is no time for the fewest rounds.
        """
        longest = sum(self._timed(run)[1] for run in runs)
        end = time.monotonic() + SECONDS
        for done in range(ROUNDS):
            has_time = self._deadline.left > 2 * longest
            if done >= LEAST and not (has_time and time.monotonic() < end):
                return
            self._deadline.need(2 * longest)
            seconds = [self._timed(run) for run in runs]
            longest = max(longest, sum(ended for _, ended in seconds))
            yield seconds

    def _timed(self, run: Run) -> tuple[float, float]:
        """Seconds until the call returned, and until the device was done. What it returned is freed after that."""
        self._synchronize()
        start = time.perf_counter()
        result = run()
        returned = time.perf_counter() - start
        self._synchronize()
        ended = time.perf_counter() - start
        del result
        return returned, ended

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Wrong(f"{what} should be {expected} and came out as {found}")


def _ms(seconds: Sequence[float]) -> float:
    """Their median, in milliseconds."""
    return round(1e3 * statistics.median(seconds), 4)
