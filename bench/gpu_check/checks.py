"""Checks of routed prefills on a GPU, of a small random LLaVA: ``python -m bench.gpu_check.checks NAME``."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import reroute
from reroute.graphs import GraphUse
from reroute.handle import Handle

from ..end_to_end.models import CACHE, IMAGE_ID, QUICK, SCHEDULE, STANDARD, Size, build, inputs_of, take_encoded
from .capture import captured_prefill

__all__ = ["CHECKS", "CheckFailed", "graph", "main", "no_waiting", "replays", "static_steps"]


class CheckFailed(Exception):
    """A check found something wrong."""


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
        return _results(self.model, {"inputs_embeds": self.embeds, "use_cache": True})

    def routing(self) -> Handle:
        # Not "auto": on a GPU it is the kernels that are to be checked.
        backend = "triton" if self.ids.is_cuda else "torch"
        handle: Handle = reroute.enable(self.model, schedule=SCHEDULE, backend=backend)
        return handle


@torch.no_grad()
def graph(device: torch.device, capture: Callable[[Callable[[], Any]], Callable[[], Any]] = captured_prefill) -> str:
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
            raise CheckFailed(f"replayed and eager prefill differ in tensor {i} (0: logits, then caches) by {apart}")


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


REPLAYED = replace(STANDARD, layers=32, side=12, text=48)
"""Deep and thin: launches take most of an eager prefill. With a ninth of its tokens every stage is whole tiles."""
RUNS = 20


@torch.no_grad()
def replays(device: torch.device, size: Size = REPLAYED) -> str:
    """Prefills with ``graphs=True`` give the bits of eager ones where nothing is filled up; and how long both take."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = build(size, dtype)
    model.to(device)
    take_encoded(model)
    prompts = [_prompt(size, dtype, device, seed) for seed in range(4)]
    longer = [_prompt(replace(size, text=size.text + 64), dtype, device, seed) for seed in range(4, 6)]
    said = []
    for name, ratio in (("dense", 1.0), ("routed", 1 / 9)):
        given: dict[str, Any] = {
            "schedule": reroute.Schedule((1, 3, 5), (ratio,) * 3),
            "backend": "triton" if device.type == "cuda" else "torch",
        }
        with reroute.enable(model, **given):
            eager = [_results(model, prompt) for prompt in (*prompts, longer[1])]
            eager_ms = _milliseconds(lambda: model(**prompts[0]), device)
        with reroute.enable(model, graphs=reroute.Graphs(max_waste=10), **given) as handle:
            for prompt in prompts[:2]:  # the second one is captured
                model(**prompt)
            for prompt, expected in zip(prompts, eager[:-1], strict=True):
                use = _replay(handle, model, name, prompt, expected)
            graph_ms = _milliseconds(lambda: model(**prompts[0]), device)
            model(**longer[0])  # once the second one comes memory grows, and the graph of the shorter ones leaves
            _replay(handle, model, name, longer[1], eager[-1])
        said.append(f"{name}: eager {eager_ms:.3f} ms, replayed {graph_ms:.3f} ms, bit for bit; {use}")
    return "\n".join(said)


STEPS = replace(STANDARD, side=12)
TOKENS = 24


@torch.no_grad()
def static_steps(device: torch.device, size: Size = STEPS) -> str:
    """``generate`` with a static cache, whose steps Transformers compiles and Inductor records as CUDA graphs."""
    model: Any = build(size)  # fp32: compiled or not, the same tokens
    model.to(device)
    take_encoded(model)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    prompts = [_prompt(size, torch.float32, device, seed) for seed in range(3)]
    generate = functools.partial(model.generate, max_new_tokens=TOKENS, do_sample=False)
    compiled = functools.partial(generate, cache_implementation="static")
    said = []
    for name, ratio in (("plain", 0.0), ("routed", 0.2)):
        routing: AbstractContextManager[Any] = (
            reroute.enable(model, schedule=replace(SCHEDULE, ratios=(ratio,) * 3)) if ratio else nullcontext()
        )
        counters.clear()
        torch.compiler.reset()
        with routing:
            expected = [generate(**prompt) for prompt in prompts]
            eager_ms = _milliseconds(lambda: generate(**prompts[0]), device, 5)
            for prompt, tokens in zip(prompts, expected, strict=True):
                found = compiled(**prompt)
                if not torch.equal(found, tokens):
                    same = int((found == tokens).long().cumprod(-1).sum()) - size.length
                    raise CheckFailed(f"{name}: tokens of compiled steps part after {same} of {TOKENS}")
            static_ms = _milliseconds(lambda: compiled(**prompts[0]), device, 5)
        graphs, skips = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
        said.append(
            f"{name}: {TOKENS} tokens in {eager_ms:.1f} ms, with compiled steps {static_ms:.1f} ms; "
            f"{graphs} graphs of Dynamo, {skips} not recorded"
        )
        if not graphs or skips:
            raise CheckFailed(said[-1])
    return "\n".join(said)


def _replay(handle: Handle, model: Any, name: str, prompt: dict[str, Any], expected: list[Tensor]) -> GraphUse:
    """Check that ``prompt`` is replayed, and gives what is ``expected``."""
    replayed, use = _results(model, prompt), handle.stats().graph
    if use is None or not use.is_replayed:
        raise CheckFailed(f"a {name} prefill was not replayed: {use}")
    _equal(replayed, expected)
    return use


def _prompt(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """One of the same length, with another picture and other text."""
    generator = torch.Generator().manual_seed(seed)
    given = inputs_of(size, dtype)
    ids = torch.randint(1, 512, given["input_ids"].shape, generator=generator)
    features = given.pop("mm_encoder_outputs")["image"].pooler_output[0]
    features = torch.randn(features.shape, generator=generator).to(features.dtype) * features.std()
    given["input_ids"] = torch.where(given["input_ids"] == IMAGE_ID, IMAGE_ID, ids).to(device)
    given["pixel_values"] = features.to(device)
    return given


def _results(model: Any, given: dict[str, Any]) -> list[Tensor]:
    output = model(**given)
    layers = output[CACHE].layers
    return [output.logits, *(layer.keys for layer in layers), *(layer.values for layer in layers)]


def _milliseconds(run: Callable[[], Any], device: torch.device, runs: int = RUNS) -> float:
    """Median of a call and its results."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "graph": graph,
    "no-waiting": no_waiting,
    "replays": replays,
    "static-steps": static_steps,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what a check found; what it found wrong is raised."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.checks", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    check = parser.parse_args(arguments).check
    if not torch.cuda.is_available():
        parser.error(f"{check} needs a CUDA device, and torch {torch.__version__} finds none")
    print(CHECKS[check](torch.device("cuda")))


if __name__ == "__main__":
    main()
