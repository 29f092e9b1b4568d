"""Static caches of types of which some layers slide: windows that fill up, overflow and roll."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cache_kinds import ROOM
from dense import near, predict
from models import CACHE, TRANSFORMERS
from pictured import PICTURED
from test_types import ONE, TWO, batch, step
from test_windows import LAYERS, SAID, TOKENS, stored_rows, talk
from tiny_types import TinyType, build
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import reroute
from reroute.errors import UnsupportedCacheError
from reroute.transformers.cache.storage import plain_class

RATIOS = (0.4, 0.7)
WINDOWS = [4, 12, 20, 64]
"""Full before the picture ends, at a routed layer or not, while tokens are decoded, and never."""
pytestmark = pytest.mark.parametrize("kind", ["gemma3", pytest.param("cohere_compass", marks=pytest.mark.slow)])


@contextmanager
def window_of(kind: str, window: int, attention: str = "sdpa") -> Iterator[TinyType]:
    """A model whose sliding layers look back so far."""
    dense, tiny = build(kind, layers=8), build(kind, attention, layers=8)
    with pytest.MonkeyPatch.context() as patch:
        for model in (dense, tiny):
            patch.setattr(model.text.config, "sliding_window", window)
        yield tiny


@contextmanager
def routed(tiny: TinyType) -> Iterator[Any]:
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, RATIOS)) as handle:
        yield handle


def static(tiny: TinyType, room: int = ROOM) -> Any:
    return StaticCache(config=tiny.text.config, max_cache_len=room)


def answer(tiny: TinyType, given: dict[str, Tensor], cache: Any, run: Any = None) -> Tensor:
    """The logits (T, B, V) of ``TOKENS``, one by one, by the model or what calls it."""
    logits = []
    for token in TOKENS:
        inputs = step(tiny, given, token, cache)
        logits.append((run or tiny.model)(**inputs, use_cache=True).logits[:, -1])
        given = {name: inputs[name] for name in ("attention_mask", "position_ids")}
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_batch(kind: str, window: int, attention: str) -> None:
    with window_of(kind, window, attention) as tiny, routed(tiny) as handle:
        given, cache = batch(tiny, ONE, TWO), static(tiny)
        with handle.using(handle.plan(given["input_ids"], given["attention_mask"])):
            logits = tiny.model(**given, **{CACHE: cache}, use_cache=True).logits
        copied = copy.deepcopy(cache)
        after = answer(tiny, given, cache)
        assert torch.equal(answer(tiny, given, copied), after)
        for b, ids in enumerate((ONE, TWO)):
            expected = predict(build(kind, layers=8), [*ids, *TOKENS], LAYERS, RATIOS, prompt=len(ids)).logits
            near(logits[b, -len(ids) :], expected[: len(ids)])
            near(after[:, b], expected[len(ids) :])


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_later_turns(kind: str, window: int) -> None:
    """Text, a picture, text, a picture, an answer: as on a cache that keeps every row of sliding layers too."""
    with window_of(kind, window) as tiny, routed(tiny) as handle:
        cache, whole = static(tiny), DynamicCache()
        for turn in SAID:
            logits, expected = (_turn(handle, tiny, its, turn) for its in (cache, whole))
            near(logits, expected)
            cache = pickle.loads(pickle.dumps(cache)) if len(turn[0]) == 3 else cache


def _turn(handle: Any, tiny: TinyType, cache: Any, turn: list[list[int]]) -> Tensor:
    past = int(cache.get_seq_length())
    ids, mask = torch.tensor(turn), torch.ones(1, past + len(turn[0]), dtype=torch.long)
    positions = tiny.spread(torch.arange(past, mask.shape[1])[None])
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, CACHE: cache}
    with handle.using(handle.plan(ids, mask, cache) if len(turn[0]) > 1 else None):
        logits: Tensor = tiny.model(**given, use_cache=True).logits
    return logits


@torch.no_grad()
def test_what_is_allocated(kind: str) -> None:
    """A window, or, where all that may come is shorter than that, less by what was deferred; as a reset cache again."""
    room = len(TWO) + len(TOKENS)
    for window in (6, 64):
        with window_of(kind, window) as tiny, routed(tiny) as handle:
            cache, expected = static(tiny, room), talk(handle, tiny, DynamicCache(), [[TWO]])
            near(talk(handle, tiny, cache, [[TWO]]), expected)
            stats = handle.stats()
            rows = [stored_rows(layer) for layer in cache.layers]
            assert rows[2] < room
            shorter = rows[2] if window > room and TRANSFORMERS >= (5, 24) else min(window, room)
            assert (rows[0], rows[3]) == (min(window, room), shorter)
            assert stats.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            answer(tiny, batch(tiny, TWO), cache)  # it fits
            memory = [layer.keys.data_ptr() for layer in cache.layers]
            cache.reset()
            assert [plain_class(layer) for layer in cache.layers] == [type(layer) for layer in static(tiny).layers]
            near(talk(handle, tiny, cache, [[TWO]]), expected)
            assert [layer.keys.data_ptr() for layer in cache.layers] == memory
            assert [stored_rows(layer) for layer in cache.layers] == rows


@torch.no_grad()
def test_tokens_are_taken_back_while_no_row_was_dropped(kind: str) -> None:
    for window in (6, 64):
        with window_of(kind, window) as tiny, routed(tiny) as handle:
            cache, draft = static(tiny, 40), [[3, 4, 5]]
            talk(handle, tiny, cache, [[TWO]])
            _turn(handle, tiny, cache, draft)
            if window < 40 or TRANSFORMERS < (5, 24):
                with pytest.raises(UnsupportedCacheError, match="cannot give tokens back"):
                    cache.layers[3].crop(-2)
                continue
            cache.crop(-2)
            logits = _turn(handle, tiny, cache, [[7]])
            expected = predict(build(kind, layers=8), [*TWO, 3, 7], LAYERS, RATIOS, prompt=len(TWO)).logits
            near(logits[0], expected[-1:])


@torch.no_grad()
def test_generation(kind: str) -> None:
    """With pictures, and beams that change places."""
    if kind not in PICTURED:
        pytest.skip("no pictures for it")
    family = PICTURED[kind]()
    prompts = [family.prompt(0, 3, 5), family.prompt(1, 2, 4)]

    def generate(**settings: Any) -> Any:
        given = {"do_sample": False, "max_new_tokens": 10, "disable_compile": True, **settings}
        return family.tiny.model.generate(**family.inputs(prompts), **given).tolist()

    with reroute.enable(family.tiny.model, schedule=reroute.Schedule((2, 4), (0.5, 0.3))):
        for beams in (1, 3):
            static = generate(num_beams=beams, cache_implementation="static")
            assert static == generate(num_beams=beams)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps(kind: str) -> None:
    """One graph more than without routing, for the steps between: windows of dense layers are full, others not yet."""
    with window_of(kind, 20) as tiny:
        given, found, graphs = batch(tiny, ONE, TWO), [], []
        call: Any = torch.compile(tiny.model.__call__, fullgraph=True, backend="eager")
        for keep in ({"keep": 1.0}, {"schedule": reroute.Schedule(LAYERS, RATIOS)}):
            with reroute.enable(tiny.model, **keep) as handle:
                torch.compiler.reset()
                counters.clear()
                for run in (tiny.model, call):
                    cache = static(tiny)
                    with handle.using(handle.plan(given["input_ids"], given["attention_mask"])):
                        tiny.model(**given, **{CACHE: cache}, use_cache=True)
                    found.append(answer(tiny, given, cache, run))
                near(found[-1], found[-2])
                graphs.append(counters["stats"]["unique_graphs"])
        torch.compiler.reset()
    assert graphs == [2, 3]
