"""Decoding steps on a routed cache: one graph when they are compiled, and next to nothing of Python when not."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import CACHE, Sample, Tiny, text
from oracle import Rules, predict
from support import cache_of, close, enable, frames, generate
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

import reroute

RULES = Rules((1, 2), (0.5, 0.25))
TOKENS = (5, 6, 7, 8, 9)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def three_layers(name: str) -> Tiny:
    return models.llava(layers=3) if name == "llava" else models.qwen(layers=3)


def compiled(tiny: Tiny, backend: str = "eager", *, fullgraph: bool = True) -> Any:
    function: Any = torch.compile(tiny.model.__call__, fullgraph=fullgraph, backend=backend)
    return function


def new_cache(tiny: Tiny, kind: str) -> Any:
    config = tiny.model.config.get_text_config()
    return StaticCache(config=config, max_cache_len=48) if kind == "static" else DynamicCache(config=config)


def run_steps(tiny: Tiny, samples: list[Sample], cache: Any, call: Callable[..., Any]) -> list[torch.Tensor]:
    """Logits of a prefill that is not compiled, and of steps that ``call`` runs."""
    before = samples
    logits = [tiny.model(**tiny.inputs(samples, positions=True), **{CACHE: cache}).logits[:, -1:]]
    for token in TOKENS:
        given = tiny.follow(before, [text(token)] * len(samples))
        if len(samples) == 1:
            del given["attention_mask"]
        given["position_ids"] = given["position_ids"].contiguous()
        logits.append(call(**given, **{CACHE: cache}).logits)
        before = [sample + text(token) for sample in before]
    return logits


BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "graphs"), [("static", 1), ("dynamic", 2)])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_one_graph(name: str, kind: str, graphs: int, backend: str) -> None:
    """No break, and no new graph from step to step; a dynamic cache takes one for any length after that for the first.

    So it is without routing.
    """
    tiny = three_layers(name)
    sample = tiny.prompt(0, 5, tiny.grid, 4)

    def run() -> list[torch.Tensor]:
        return run_steps(tiny, [sample], new_cache(tiny, kind), compiled(tiny, backend))

    if backend == "eager":
        run()
        assert counters["stats"]["unique_graphs"] == graphs
    with enable(tiny, RULES):
        counters.clear()
        logits = run()
        assert counters["stats"]["unique_graphs"] == graphs
    expected = predict(tiny, sample, RULES, then=TOKENS).logits[len(sample) - 1 :]
    close(torch.cat(logits, 1)[0], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_batch(name: str, kind: str) -> None:
    """With padding and fillers, of which masks are made."""
    tiny = three_layers(name)
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 7)]
    with enable(tiny, RULES):
        logits = run_steps(tiny, samples, new_cache(tiny, kind), compiled(tiny))
    for b, sample in enumerate(samples):
        close(torch.cat(logits, 1)[b], predict(tiny, sample, RULES, then=TOKENS).logits[len(sample) - 1 :])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_generation(name: str) -> None:
    """``generate`` compiles steps on static caches: in one graph for prompts with padding, and for later calls."""
    tiny = three_layers(name)
    config: Any = CompileConfig(backend="eager", fullgraph=True)
    setattr(config, "_compile_all_devices", True)  # noqa: B010  # as tests of Transformers do
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 7)]
    with enable(tiny, RULES) as handle:
        expected = generate(tiny, samples, 6, cache_implementation="static", disable_compile=True)
        for count in (1, 2):
            output = generate(tiny, samples, 6, cache_implementation="static", compile_config=config)
            assert torch.equal(output.sequences, expected.sequences)
            assert handle.stats().prefills == 1 + count
            assert counters["stats"]["unique_graphs"] == 1
    close(torch.stack(output.logits), torch.stack(expected.logits))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "graphs"), [("static", 1), pytest.param("dynamic", 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_renumbered_positions(kind: str, graphs: int, batch: int) -> None:
    """They follow from those that a step is given, and from the cache. A batch brings masks, which grow."""
    tiny = three_layers("llava")
    rules = Rules((1,), (0.5,), action="remove", position_mode="renumbered")
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 7)][:batch]
    with enable(tiny, rules):
        logits = run_steps(tiny, samples, new_cache(tiny, kind), compiled(tiny))
        assert counters["stats"]["unique_graphs"] == (graphs if batch == 1 else 2)
    for b, sample in enumerate(samples):
        close(torch.cat(logits, 1)[b], predict(tiny, sample, rules, then=TOKENS).logits[len(sample) - 1 :])


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_step() -> None:
    """States for later turns need more than masks and positions: routing then runs between compiled parts."""
    tiny = three_layers("llava")
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with enable(tiny, RULES, reopens=True):
        cache = new_cache(tiny, "dynamic")
        logits = run_steps(tiny, [sample], cache, compiled(tiny, fullgraph=False))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="reroute plans and routes"):
            compiled(tiny)(input_ids=torch.tensor([[5]]), **{CACHE: cache})
    close(torch.cat(logits, 1)[0], predict(tiny, sample, RULES, then=TOKENS).logits[len(sample) - 1 :])


# --- frames of Python ---------------------------------------------------------------------------------------------


def per_layer(measure: Callable[[Tiny], Counter[str]]) -> dict[str, float]:
    """What grows with the number of layers, and by how much for each."""
    few, many = (measure(models.llava(layers=count)) for count in (6, 14))
    grown = {name: (many[name] - few[name]) / 8 for name in many}
    return {name: count for name, count in grown.items() if count}


def test_a_step_costs_a_layer_two_frames() -> None:
    """The layer's own class lets it pass, and the cache's takes its token. No other function runs for each layer."""

    def measure(tiny: Tiny) -> Counter[str]:
        sample = tiny.prompt(0, 5, tiny.grid, 4)
        with reroute.enable(tiny.model, schedule=reroute.Schedule((1, 3), (0.5, 0.25))):
            cache = cache_of(tiny.model(**tiny.inputs([sample]), use_cache=True))
            step = functools.partial(tiny.model, input_ids=torch.tensor([[5]]), **{CACHE: cache})
            step()
            return frames(step)

    assert per_layer(measure) == {
        "reroute.transformers.entrances.__call__": 1,
        "reroute.transformers.cache.layers.update": 1,
    }


def test_a_prefill_that_keeps_all_costs_a_layer_one_frame() -> None:
    """While layers run. Stats are made of the plan afterwards."""

    def measure(tiny: Tiny) -> Counter[str]:
        given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
        with reroute.enable(tiny.model, keep=1.0):
            tiny.model(**given, use_cache=False)
            return frames(lambda: tiny.model(**given, use_cache=False))

    grown = {name: count for name, count in per_layer(measure).items() if name.startswith("reroute.transformers")}
    assert grown == {"reroute.transformers.entrances.__call__": 1}
