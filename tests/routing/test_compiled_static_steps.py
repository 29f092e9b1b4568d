"""Compiled steps on static caches as CUDA graphs need them: what they write stays where it is, and shapes are few."""

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
from replays import GRAPHS, capture, replayed, route
from support import close, enable, frames, generate, new_tokens
from tape import Tape
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from transformers import CompileConfig, StaticCache

RULES = Rules((1, 3), (0.5, 0.25))
LAYERS, ROOM, TOKENS = 5, 64, (5, 6)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_compiler")]


class Graphs:
    """A backend that runs graphs as they are, and notes of each what Inductor looks at before it records one.

    - ``nodes``: how often each operation is in it.
    - ``moving``: inputs that it writes, and that nobody has promised to leave where they are. With such a one Inductor
      records nothing.
    - ``addresses``: of inputs that were promised to stay, call by call. If one moves, Inductor records anew.
    - ``shapes``: of all inputs, call by call. There is a recording of each.
    """

    def __init__(self) -> None:
        self.nodes: list[Counter[str]] = []
        self.moving: list[set[int]] = []
        self.addresses: list[tuple[int, ...]] = []
        self.shapes: list[tuple[Any, ...]] = []
        self.backend = aot_autograd(fw_compiler=self._compile)

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self  # Transformers copies settings

    def _compile(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        facts: Any = TracingContext.get().fw_metadata
        self.nodes.append(Counter(str(node.target) for node in module.graph.nodes))
        static = set(facts.static_input_indices)
        self.moving.append(set(facts.mutated_inp_runtime_indices) - static)

        def run(given: Any) -> Any:
            self.addresses.append(tuple(given[i].data_ptr() for i in sorted(static)))
            self.shapes.append(tuple(tuple(its.shape) for its in given if isinstance(its, torch.Tensor)))
            return module(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def tiny_of(name: str) -> Tiny:
    return models.llava(layers=LAYERS) if name == "llava" else models.qwen(layers=LAYERS)


def static(tiny: Tiny) -> Any:
    return StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=ROOM)


def decoded(tiny: Tiny, call: Callable[..., Any], sample: Sample, cache: Any) -> None:
    """Two right steps after ``sample``, which ``cache`` holds."""
    before, logits = sample, []
    for token in TOKENS:
        given = tiny.follow([before], [text(token)])
        given["position_ids"] = given["position_ids"].contiguous()
        given["attention_mask"] = torch.arange(ROOM)[None, None, None] <= len(before)  # of one shape, as generate's
        logits.append(call(**given, **{CACHE: cache}).logits[0])
        before = before + text(token)
    close(torch.cat(logits), predict(tiny, sample, RULES, then=TOKENS).logits[-len(TOKENS) :])


def prompts(tiny: Tiny, count: int) -> list[Sample]:
    return [tiny.prompt(seed, 3 + seed, tiny.grid, 4) for seed in range(count)]


@pytest.mark.parametrize("graphs", [False, GRAPHS], ids=["eager prefills", "replayed prefills"])
@pytest.mark.parametrize("name", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_what_is_written_stays(name: str, graphs: Any, tapes: list[Tape]) -> None:
    """One graph, whose memory lies where it lay, for as long as a cache is emptied and filled again.

    Stages take their columns of the mask once, however many layers they have.
    """
    tiny, notes = tiny_of(name), Graphs()
    call = torch.compile(tiny.model.__call__, fullgraph=True, backend=notes.backend)
    cache = static(tiny)
    with route(tiny, RULES, graphs=graphs) as handle:
        if graphs:
            capture(tiny, prompts(tiny, 1))
        for sample in prompts(tiny, 3):
            run = functools.partial(replayed, handle, tiny) if graphs else called(tiny)
            run(tiny.inputs([sample], positions=True), **{CACHE: cache})
            decoded(tiny, call, sample, cache)
            cache.reset()
    assert notes.moving == [set()]
    assert len(notes.addresses) == 3 * len(TOKENS)
    assert len(set(notes.addresses)) == len(set(notes.shapes)) == 1
    assert len(notes.addresses[0]) > 3 * LAYERS  # keys, values, counts; and weights
    assert notes.nodes[0]["aten.gather.default"] == 2


def called(tiny: Tiny) -> Callable[..., Any]:
    return lambda inputs, **given: tiny.model(**inputs, **given)


def test_pictures_of_any_number() -> None:
    """Two graphs, of the first shapes and of any, where the plain model has one. Few shapes are to be recorded.

    There are three for six prompts, and the length of their text makes no difference.
    """
    tiny, notes, rules = tiny_of("llava"), Graphs(), Rules((1, 3), (0.75, 0.5))
    config: Any = CompileConfig(backend=notes.backend, fullgraph=True)
    vars(config).update(mode=None, _compile_all_devices=True)  # as tests of Transformers do
    with enable(tiny, rules):
        for pictures, words in ((6, 5), (1, 4), (5, 2), (3, 3), (2, 1), (4, 4)):
            parts: list[Any] = [tiny.grid, 1] * pictures
            sample = tiny.prompt(0, 5, *parts, words)
            output = generate(tiny, [sample], 4, cache_implementation="static", compile_config=config)
            expected = predict(tiny, sample, rules, then=new_tokens(output, len(sample))[:-1]).logits
            close(torch.stack(output.logits)[:, 0], expected[-4:])
    assert notes.moving == [set()] * 2
    assert len(set(notes.shapes)) == 3
    assert all(nodes["aten.gather.default"] == 2 for nodes in notes.nodes)


def test_a_step_runs_nothing_of_routing() -> None:
    """No function of it, whatever the number of layers: it is in the graph."""
    tiny, notes = tiny_of("llava"), Graphs()
    call: Any = torch.compile(tiny.model.__call__, fullgraph=True, backend=notes.backend)
    sample, cache = prompts(tiny, 1)[0], static(tiny)
    with enable(tiny, RULES):
        tiny.model(**tiny.inputs([sample], positions=True), **{CACHE: cache})
        decoded(tiny, call, sample, cache)
        step = tiny.follow([sample], [text(5)])
        step["attention_mask"] = torch.ones(1, 1, 1, ROOM, dtype=torch.bool)
        step["position_ids"] = step["position_ids"].contiguous()
        # What is compiled has the name of the function that it stands for.
        assert frames(lambda: call(**step, **{CACHE: cache})) == {"reroute.transformers.entrances.forward": 1}
    assert len(notes.nodes) == 1
