"""Prefills by graphs into static caches of decoders of which some layers slide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import near
from models import CACHE
from test_replayed_pictures import GRAPHS, family_of
from test_static_windows import WINDOWS, answer, static, window_of
from test_types import ONE, TWO, batch, plan, prompt
from test_windows import LAYERS
from torch import Tensor

import reroute
from reroute.transformers.attention import MadeMask

SEEN = prompt(9, 2, 7, 2, 2, 3), prompt(10, 2, 7, 2, 2, 4)
SCHEDULE = reroute.Schedule(LAYERS, (0.4, 0.7))

pytestmark = pytest.mark.usefixtures("_without_gradients", "tapes")


def prefill(handle: Any, tiny: Any, *prompts: list[int], cache: Any = None) -> tuple[Any, Tensor, dict[str, Tensor]]:
    given, cache = batch(tiny, *prompts), static(tiny) if cache is None else cache
    with handle.using(plan(handle, given)):
        logits = tiny.model(**given, **{CACHE: cache}, use_cache=True).logits
    return cache, logits, given


def same(mine: Any, eager: Any) -> None:
    """Layer by layer the same kind with as much room and as many rows, of which the real ones are alike."""
    for its, other in zip(mine.layers, eager.layers, strict=True):
        assert type(its) is type(other)
        assert its.keys.shape == other.keys.shape
        assert torch.equal(its.cumulative_length, other.cumulative_length)
        assert its.get_seq_length() == other.get_seq_length()
        assert getattr(its, "cumulative_length_int", 0) == getattr(other, "cumulative_length_int", 0)
        assert its.max_cache_len == other.max_cache_len


@pytest.mark.usefixtures("_planned")
@pytest.mark.parametrize("keep", [None, 1.0], ids=["routed", "dense"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_cache_of_the_callers(window: int, keep: float | None) -> None:
    """Filled, gone on with, emptied and filled again, in the same memory."""
    settings: dict[str, Any] = {"schedule": SCHEDULE} if keep is None else {"keep": keep}
    with window_of("cohere2_vision", window) as tiny:
        for prompts in ([ONE], [ONE, TWO]):
            with reroute.enable(tiny.model, **settings) as handle:
                eager, expected, given = prefill(handle, tiny, *prompts)
                after = answer(tiny, given, eager)
            with reroute.enable(tiny.model, graphs=GRAPHS, **settings) as handle:
                for _ in range(2):
                    prefill(handle, tiny, *SEEN[: len(prompts)])
                mine, logits, given = prefill(handle, tiny, *prompts)
                assert handle.stats().graph.is_replayed, handle.stats().graph
                valid = given["attention_mask"].bool()
                near(logits[valid], expected[valid])
                near(answer(tiny, given, mine), after)
                same(mine, eager)
                memory = [layer.keys.data_ptr() for layer in mine.layers]
                mine.reset()
                prefill(handle, tiny, *prompts, cache=mine)
                assert handle.stats().graph.is_replayed, handle.stats().graph
                assert [layer.keys.data_ptr() for layer in mine.layers] == memory
                near(answer(tiny, given, mine), after)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("beams", [1, 3])
def test_masks_that_the_model_makes_for_generate(beams: int, batch_size: int) -> None:
    """Gemma 3's say that pictures see themselves both ways: they are inputs, as wide as the prompt."""
    family = family_of("gemma3")
    prompts = [family.prompt(0, 3, 5), family.prompt(1, 2, 4)][:batch_size]
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "disable_compile": True, "num_beams": beams}
    given |= {"cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True}
    found = []
    for graphs in (False, GRAPHS):
        with reroute.enable(family.tiny.model, graphs=graphs, schedule=reroute.Schedule((2, 4), (0.5, 0.3))) as handle:
            for _ in range(3):
                found.append(family.tiny.model.generate(**family.inputs(prompts), **given))
            assert not graphs or handle.stats().graph.is_replayed, handle.stats().graph
    eager, mine = found[0], found[-1]
    assert torch.equal(mine.sequences, eager.sequences)
    near(torch.stack(mine.logits), torch.stack(eager.logits))


def test_that_they_say_more_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MadeMask, "of_prompt", lambda *_: None)
    with pytest.raises(AssertionError):
        test_masks_that_the_model_makes_for_generate(1, 1)
