"""Prefills by graphs of decoders of which some layers keep a state: fillers leave nothing in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import near
from models import CACHE, TRANSFORMERS
from pictured import Pictured, Prompt
from tape import Tape
from test_replayed_pictures import GRAPHS, captured, family_of, replayed
from torch import Tensor
from transformers import DynamicCache, StaticCache

import reroute
from reroute.methods import PDrop
from reroute.rankers import LastTokenAttention
from reroute.transformers.cache import can_fill, states_in
from reroute.transformers.graphs import states

FAMILIES = pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
ROOM, TOKENS = 64, 5
GENERATION: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": TOKENS,
    "output_logits": True,
    "return_dict_in_generate": True,
}

pytestmark = pytest.mark.usefixtures("_without_gradients")


def settings_of(family: Pictured) -> dict[str, Any]:
    """One decision, behind layers that keep a state and before others."""
    from reroute.transformers import adapter_of

    adapter, ranker = adapter_of(family.tiny.model), LastTokenAttention()
    layers = [i for i in range(1, len(adapter.layers)) if adapter.may_decide(i, ranker)]
    assert any(map(adapter.is_recurrent, range(layers[0])))
    assert any(map(adapter.is_recurrent, range(layers[0], len(adapter.layers))))
    return {"schedule": reroute.Schedule(tuple(layers[:1]), (0.5,))}


def new(family: Pictured, count: int) -> list[Prompt]:
    return [family.prompt(2, 6, 2), family.prompt(5, 1, 5)][:count]


def seen(family: Pictured, count: int) -> list[Prompt]:
    return [family.prompt(4, 3, 5), family.prompt(1, 2, 4)][:count]


def same_states(mine: Any, eager: Any) -> None:
    """Layer by layer what they hold of real rows is near, and nothing that is there is missing."""
    for its, other in zip(mine.layers, eager.layers, strict=True):
        assert type(its) is type(other)
        if not hasattr(other, "conv_states"):
            assert its.keys.shape == other.keys.shape
            continue
        held, expected = states_in(its), states_in(other)
        assert held.keys() == expected.keys()
        for place, state in expected.items():
            near(held[place], state)
        for name, value in vars(other).items():
            if name not in ("conv_states", "recurrent_states", "first"):
                assert vars(its)[name] == value, name


@pytest.mark.usefixtures("tapes")
@FAMILIES
@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "extra",
    [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static"],
)
def test_generation(name: str, keep: float, count: int, extra: dict[str, Any]) -> None:
    family = family_of(name)
    settings = {"keep": 1.0} if keep == 1.0 else settings_of(family)
    if "num_beams" in extra and name == "qwen3_5" and TRANSFORMERS < (5, 19):
        pytest.skip("Transformers gives beams of such prompts the wrong pictures")
    inputs, model = family.inputs(new(family, count)), family.tiny.model
    with reroute.enable(family.tiny.model, **settings):
        eager = model.generate(**inputs, **GENERATION, **extra)
    with reroute.enable(family.tiny.model, graphs=GRAPHS, **settings) as handle:
        for _ in range(2):
            model.generate(**family.inputs(seen(family, count)), **GENERATION, **extra)
        mine = model.generate(**inputs, **GENERATION, **extra)
        assert handle.stats().graph.is_replayed, handle.stats().graph
        assert handle.stats().graph.graphs == 1
    assert torch.equal(mine.sequences, eager.sequences)
    near(torch.stack(mine.logits), torch.stack(eager.logits))
    same_states(getattr(mine, CACHE), getattr(eager, CACHE))


@pytest.mark.usefixtures("tapes")
@FAMILIES
def test_a_cache_of_the_callers(name: str) -> None:
    """Filled, emptied, and filled again: what a static one has allocated stays where it is."""
    family = family_of(name)
    settings, config = settings_of(family), family.tiny.text.config
    inputs = family.inputs(new(family, 2))
    for static in (False, True):

        def make(static: bool = static) -> Any:
            return StaticCache(config=config, max_cache_len=ROOM) if static else DynamicCache(config=config)

        mine: Any = make()
        eager: Any = make()
        with reroute.enable(family.tiny.model, **settings):
            family.tiny.model(**inputs, **{CACHE: eager})
        with captured(family, seen(family, 2), **settings) as handle:
            replayed(handle, family, {**inputs, CACHE: mine})
            same_states(mine, eager)
            arena = handle._router._replays._arena.memory.untyped_storage().data_ptr()
            places = addresses(mine)
            assert arena not in places
            if static:
                mine.reset()
                replayed(handle, family, {**inputs, CACHE: mine})
                same_states(mine, eager)
                assert addresses(mine) == places


def addresses(cache: Any) -> list[int]:
    """Of the memory of all states, and where they lie in it."""
    held = [its for layer in cache.layers if hasattr(layer, "conv_states") for its in states_in(layer).values()]
    assert held
    return [address for its in held for address in (its.untyped_storage().data_ptr(), its.data_ptr())]


@pytest.mark.usefixtures("tapes")
@FAMILIES
def test_caches_that_cannot_take_states(name: str) -> None:
    """One that has begun, one without layers for states, one of another batch."""
    family = family_of(name)
    config, width = family.tiny.text.config, family.tiny.text.config.hidden_size
    recurrent = [i for i, its in enumerate(DynamicCache(config=config).layers) if hasattr(its, "conv_states")]
    hidden = torch.zeros(1, 9, width)
    begun: Any = DynamicCache(config=config)
    static: Any = StaticCache(config=config, max_cache_len=ROOM)
    for cache in (begun, static):
        assert can_fill(cache, hidden, recurrent)
        family.tiny.model(**family.inputs(new(family, 2)), **{CACHE: cache})
        assert not can_fill(cache, hidden, recurrent)
    assert not can_fill(DynamicCache(), hidden, recurrent)
    static.reset()
    assert not can_fill(static, hidden, recurrent)
    assert can_fill(static, hidden.expand(2, -1, -1), recurrent)


@FAMILIES
def test_two_recordings_are_one(name: str, tapes: list[Tape]) -> None:
    """How many rows are real is no part of a graph."""
    family = family_of(name)
    for settings in (settings_of(family), {"keep": 1.0}):
        tapes.clear()
        for prompts in (seen, new):
            with captured(family, prompts(family, 2), **settings):
                pass
        first, second = tapes
        assert first.signature == second.signature


@pytest.mark.usefixtures("tapes")
@FAMILIES
def test_a_method(name: str) -> None:
    """Decisions of a method move to layers that can decide."""
    family = family_of(name)
    inputs = family.inputs(new(family, 2))
    with reroute.enable(family.tiny.model, method=PDrop(), keep=0.5):
        eager = family.tiny.model(**inputs)
    with captured(family, seen(family, 2), method=PDrop(), keep=0.5) as handle:
        mine = replayed(handle, family, inputs)
    valid = inputs["attention_mask"].bool()
    near(mine.logits[valid], eager.logits[valid])


# --- what each part is for ------------------------------------------------------------------------------------------


def _fillers_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(states, "picked", lambda hidden, rows: hidden)


def _not_turned_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(states.FillersFirst, "restored", lambda self, hidden: hidden)


def _not_hidden(patch: pytest.MonkeyPatch) -> None:
    start = states.FillersFirst.__init__

    def init(self: Any, is_real: Tensor) -> None:
        start(self, is_real)
        self.mask = torch.ones_like(self.mask)

    patch.setattr(states.FillersFirst, "__init__", init)


@pytest.mark.usefixtures("tapes")
@FAMILIES
@pytest.mark.parametrize("spoil", [_fillers_last, _not_turned_back, _not_hidden])
def test_it_would_be_noticed(
    name: str, spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        test_generation(name, 0.5, 1, {})


# --- what does not fit into a graph -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("tapes")
def test_assisted_generation() -> None:
    """Layers record all rows then, to give some back."""
    family = family_of("lfm2_vl")
    inputs = family.inputs(new(family, 1))
    given = {**GENERATION, "max_new_tokens": 8}
    with reroute.enable(family.tiny.model, keep=1.0, graphs=GRAPHS) as handle:
        expected = family.tiny.model.generate(**inputs, **given)
        for _ in range(3):
            output = family.tiny.model.generate(**inputs, **given, prompt_lookup_num_tokens=3)
        assert "not an empty DynamicCache" in handle.stats().graph.why
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.usefixtures("tapes")
@FAMILIES
def test_memory_that_cannot_be_written_is_replaced(name: str) -> None:
    """Of a cache that was filled in inference mode and emptied."""
    family = family_of(name)
    inputs = family.inputs(new(family, 2))
    cache: Any = DynamicCache(config=family.tiny.text.config)
    with torch.inference_mode(), reroute.enable(family.tiny.model, **settings_of(family)):
        expected = family.tiny.model(**inputs, **{CACHE: cache}).logits.clone()
        cache.reset()
    with captured(family, seen(family, 2), **settings_of(family)) as handle:
        valid = inputs["attention_mask"].bool()
        near(replayed(handle, family, {**inputs, CACHE: cache}).logits[valid], expected[valid])


@pytest.mark.usefixtures("tapes")
@FAMILIES
def test_states_have_memory_of_their_own(name: str) -> None:
    """Layers write there, also where gradients are recorded."""
    family = family_of(name)
    inputs = family.inputs(new(family, 1))
    with captured(family, seen(family, 1), **settings_of(family)) as handle:
        cache = getattr(replayed(handle, family, inputs), CACHE)
        places = addresses(cache)[::2]
        assert len(set(places)) == len(places)
        embeds = family.tiny.model.get_input_embeddings()
        embeds.weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                positions = family.tiny.spread(torch.tensor([[inputs["input_ids"].shape[1]]]))
                family.tiny.model(input_ids=torch.tensor([[7]]), position_ids=positions, **{CACHE: cache})
        finally:
            embeds.weight.requires_grad_(False)


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("where", ["right", "between"])
def test_padding_that_is_not_at_the_beginning(name: str, where: str) -> None:
    """States and windows see where it is; elsewhere it is as if it were not there."""
    family = family_of(name)
    inputs = family.inputs([family.prompt(2, 6, 3)])
    mask = inputs["attention_mask"].clone()
    mask[:, -1 if where == "right" else 1] = 0
    inputs["attention_mask"] = mask
    settings: dict[str, Any] = {"keep": 1.0}
    with reroute.enable(family.tiny.model, **settings):
        eager = family.tiny.model(**inputs)
    with reroute.enable(family.tiny.model, graphs=GRAPHS, **settings) as handle:
        for _ in range(3):
            mine = family.tiny.model(**inputs)
        graph = handle.stats().graph
    near(mine.logits[mask.bool()], eager.logits[mask.bool()])
    sees = name in ("qwen3_5", "lfm2_vl") or (name == "gemma3" and where == "between")
    assert graph.is_replayed != sees, graph
    assert not sees or "there is padding" in graph.why
