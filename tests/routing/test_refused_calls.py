"""A call that is refused, or a crop, leaves the cache, the pool and the model as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from models import CACHE, Sample, Tiny
from oracle import Rules, predict
from support import FEW, cache_of, close, enable, generate, schedule, state_of, unchanged
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from unfit_models import MODELS, decoder, whole

import reroute
from reroute.errors import RerouteError, UnsupportedCacheError
from reroute.rankers import RankInputs, ScoreRanker
from reroute_kernels import PagedPool

# --- crop ---------------------------------------------------------------------------------------------------------


def caches(few: Tiny) -> dict[str, tuple[Any, int]]:
    """Routed ones, and how many of their tokens may go."""
    samples = [few.prompt(0, 5, few.grid, 4), few.prompt(1, 1, few.grid, 2, few.grid, 3), few.prompt(2, 9)]

    def of(prompts: list[Sample], side: str = "left") -> Any:
        return cache_of(few.model(**few.inputs(prompts, side, positions=True), use_cache=True))

    made: dict[str, tuple[Any, int]] = {"a prompt": (of(samples[:1]), 4), "a batch": (of(samples), 3)}
    longer = of(samples[:1])
    few.model(**few.follow(samples[:1], [few.prompt(3, 5)]), **{CACHE: longer})
    made["a later turn"] = longer, 9
    again = of(samples[:1])
    few.model(**few.follow(samples[:1], [few.prompt(3, 2, few.grid, 6)]), **{CACHE: again})
    made["a later picture"] = again, 6
    handle = reroute.handle_of(few.model)
    assert handle is not None
    with handle.at(schedule=reroute.Schedule((0,), (0.5,))):
        other = of(samples[:1])
    with handle.at(schedule=reroute.Schedule((2,), (0.5,))):  # the first two layers are not routed again
        few.model(**few.follow(samples[:1], [few.prompt(3, 2, few.grid, 6)]), **{CACHE: other})
    made["a later picture with other routing layers"] = other, 6
    moved = of(samples)
    moved.reorder_cache(torch.tensor([1, 0, 0]))
    made["moved samples"] = moved, 3
    cropped = of(samples[:1])
    cropped.crop(-3)
    made["cropped before"] = cropped, 1
    made["padded on the right"] = of(samples[:2], "right"), 3
    return made


@pytest.mark.parametrize("action", ["route", "remove"])
def test_what_is_cropped_is_cropped_in_every_layer(few: Tiny, action: Any) -> None:
    """Or in none: refused in the last layer, it would be done in those before."""
    with enable(few, Rules(FEW.layers, FEW.ratios, action)):
        for name, (cache, newest) in caches(few).items():
            before, length = state_of(cache), cache.get_seq_length()
            for tokens in (-newest - 1, -length, -length - 1, 1, length, 10**6):
                with pytest.raises(UnsupportedCacheError, match=rf"only its {newest} tokens .* crop\(-{newest}\)"):
                    cache.crop(tokens)
                unchanged(cache, before)
            cache.crop(0)
            unchanged(cache, before)
            cache.crop(-newest)
            lengths = {cache.get_seq_length(layer) for layer in range(few.num_layers)}
            assert lengths == {length - newest}, name
            with pytest.raises(UnsupportedCacheError, match=r"only its 0 tokens"):
                cache.crop(-1)


# --- calls --------------------------------------------------------------------------------------------------------


class Refused:
    """A routed model with a conversation that has begun, and calls of it that are refused."""

    def __init__(self, few: Tiny, handle: Any, pool: PagedPool) -> None:
        self.few, self.handle, self.pool = few, handle, pool
        self.before, self.new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 2, few.grid, 5)
        self.given = few.inputs([self.new], positions=True)
        self.follow = few.follow([self.before], [self.new])
        self.cache = cache_of(few.model(**few.inputs([self.before], positions=True), use_cache=True))
        self.empty = DynamicCache()
        self.expected = few.model(**self.given).logits

    def check(self, name: str, call: Callable[[], Any], cache: Any) -> None:
        """``call`` is refused before anything is changed."""
        model = self.few.model
        held, parts, pages = state_of(cache), whole(model), self.pool.stats()
        count = self.handle.totals()
        with pytest.raises(RerouteError):
            call()
        unchanged(cache, held)
        assert whole(model) == parts, name
        assert self.pool.stats() == pages, name
        assert self.handle.totals() == count, name
        assert reroute.handle_of(model) is self.handle, name

    def goes_on(self) -> None:
        """As if nothing had been refused."""
        assert torch.equal(self.few.model(**self.given).logits, self.expected)
        logits = self.few.model(**self.follow, **{CACHE: self.cache}).logits
        close(logits[0], predict(self.few, [self.before, self.new], FEW).logits[-len(self.new) :])


@pytest.fixture
def refusing(few: Tiny) -> Refused:
    pool = PagedPool(64, torch.float32, "cpu")
    return Refused(few, enable(few, FEW, pool=pool), pool)


def arguments_that_are_refused(few: Tiny, given: dict[str, Tensor], past: int) -> dict[str, dict[str, Any]]:
    """Instead of some of ``given``, after ``past`` tokens."""
    length = given["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, past + length, dtype=torch.bool).tril(past)
    restarts = torch.cat([torch.arange(length - 5), torch.arange(5)])[None]
    borders = torch.tensor([0, 5, length])
    end = int((given["input_ids"][0] == models.PICTURE).nonzero().max()) + 1
    by_token = [name for name in ("input_ids", "position_ids", "mm_token_type_ids") if name in given]
    until_the_picture: dict[str, Any] = {name: given[name][..., :end] for name in by_token}
    return {
        "a prepared mask": {"attention_mask": mask},
        "masks by name": {"attention_mask": {"full_attention": mask}},
        "packed": {"attention_mask": None, "position_ids": restarts.expand(3, 1, -1) if few.is_qwen else restarts},
        "borders": {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders},
        "sequence numbers": {"seq_idx": torch.zeros(1, length, dtype=torch.int32)},
        "a number for each token": {"gate": torch.ones(1, length)},
        "a number for each key": {"gate": torch.ones(1, past + length)},
        "no question": {**until_the_picture, "attention_mask": torch.ones(1, past + end, dtype=torch.long)},
    }


def test_arguments_that_are_refused(refusing: Refused) -> None:
    """Of a new conversation, and in one that goes on; of the model and of its base."""
    few = refusing.few
    for given, cache in ((refusing.given, refusing.empty), (refusing.follow, refusing.cache)):
        for name, changes in arguments_that_are_refused(few, given, cache.get_seq_length()).items():
            arguments = {key: value for key, value in {**given, **changes}.items() if value is not None}
            for call in (few.model, few.model.model):
                refusing.check(name, lambda: call(**arguments, **{CACHE: cache}), cache)  # noqa: B023
    refusing.goes_on()


def test_caches_that_are_refused(refusing: Refused) -> None:
    few, config = refusing.few, refusing.few.model.config.get_text_config()
    sliding = DynamicCache()
    sliding.layer_class_to_replicate = None
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(few.num_layers)]
    static = StaticCache(config=config, max_cache_len=64)
    static.layers[2] = StaticSlidingWindowLayer(max_cache_len=64, sliding_window=8)
    for cache in (static, sliding):
        for call in (few.model, few.model.model):
            refusing.check(type(cache).__name__, lambda: call(**refusing.given, **{CACHE: cache}), cache)  # noqa: B023
    refusing.goes_on()


def test_plans_that_are_refused(refusing: Refused) -> None:
    """For calls of another shape, after another cache, with labels that they do not know."""
    few, handle = refusing.few, refusing.handle
    ids, mask = refusing.given["input_ids"], refusing.given["attention_mask"]
    plans = {
        "a shorter one": handle.plan(ids[:, :-1], mask[:, :-1]),
        "for two samples": handle.plan(ids.repeat(2, 1), mask.repeat(2, 1)),
        "for a later turn": handle.plan(
            refusing.follow["input_ids"], refusing.follow["attention_mask"], refusing.cache
        ),
        "without labels": handle.plan(ids, mask),
    }
    for name, plan in plans.items():
        labels = {"labels": ids} if name == "without labels" else {}

        def call() -> None:
            with handle.using(plan):  # noqa: B023
                few.model(**refusing.given, **labels, **{CACHE: refusing.empty})  # noqa: B023

        refusing.check(name, call, refusing.empty)
    bad = arguments_that_are_refused(few, refusing.given, 0)["no question"]
    refusing.check("a plan itself", lambda: handle.plan(bad["input_ids"]), refusing.empty)
    refusing.goes_on()


def test_generations_that_are_refused(refusing: Refused) -> None:
    """In chunks, and what its forwards refuse."""
    few, given = refusing.few, refusing.few.inputs([refusing.new])
    cut = {**given, **arguments_that_are_refused(few, given, 0)["no question"]}
    static = StaticCache(config=few.model.config.get_text_config(), max_cache_len=64)
    static.layers[2] = StaticSlidingWindowLayer(max_cache_len=64, sliding_window=8)
    cases: dict[str, tuple[dict[str, Any], Any]] = {
        "chunks": ({**given, "prefill_chunk_size": 8}, refusing.empty),
        "no question": (cut, refusing.empty),
        "a static cache with windows": (given, static),
    }
    for name, (arguments, cache) in cases.items():
        refusing.check(name, lambda: generate(few, arguments, 2, **{CACHE: cache}), cache)  # noqa: B023
    refusing.goes_on()


SINCE = (
    "attention with unknown masks",
    "a wrapped layer",
    "a layer without its norm",
    "a layer without attention",
    "attention without queries",
    "attention without keys",
    "a layer listed twice",
)
"""What may become of a model that is routed."""


@pytest.mark.parametrize("case", SINCE)
def test_models_that_have_changed_since(refusing: Refused, case: str) -> None:
    """What would be refused by ``enable`` is refused at the next call."""
    few = refusing.few
    with MODELS[case](few):
        for given, cache in ((refusing.given, refusing.empty), (refusing.follow, refusing.cache)):
            refusing.check(case, lambda: few.model(**given, **{CACHE: cache}), cache)  # noqa: B023
    refusing.goes_on()


# --- what shows only while layers run -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd(ScoreRanker):
    """Scores of a wrong shape."""

    def scores(self, inputs: RankInputs) -> Any:
        return [hidden.norm() for hidden in inputs.hidden]


@contextmanager
def widened(few: Tiny) -> Iterator[None]:
    """Layer 2 gives another dtype."""
    hook = lambda module, args, output: output.double()
    handle = decoder(few.model).layers[2].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


MIDWAY: dict[str, tuple[dict[str, Any], Callable[[Tiny], Any], type[Exception]]] = {
    "a full pool": (
        {"pool": PagedPool(64, torch.float32, "cpu", page_size=16, max_bytes=4096)},
        nullcontext,
        MemoryError,
    ),
    "a pool of another dtype": ({"pool": PagedPool(64, torch.float16, "cpu")}, nullcontext, RerouteError),
    "scores of another shape": ({"schedule": schedule(FEW, Odd())}, nullcontext, RerouteError),
    "another dtype in the midst": ({}, widened, RerouteError),
}


@pytest.mark.parametrize("case", MIDWAY)
def test_what_shows_only_while_layers_run(few: Tiny, case: str) -> None:
    """Then the cache of the forward is refused by all that come later; all else is as before."""
    settings, change, kind = MIDWAY[case]
    sample, cache = few.prompt(1, 2, few.grid, 5), DynamicCache()
    given = few.inputs([sample], positions=True)
    with enable(few, FEW):
        expected = few.model(**given).logits
    own = {"schedule": schedule(FEW), **settings}
    with reroute.enable(few.model, **own) as handle:
        parts = whole(few.model)
        with change(few), pytest.raises(kind):
            few.model(**given, **{CACHE: cache})
        assert whole(few.model) == parts
        assert handle.totals().prefills == 0
        held = state_of(cache)
        with pytest.raises(UnsupportedCacheError, match="half filled"):
            few.model(**few.follow([sample], [few.prompt(9, 3)]), **{CACHE: cache})
        unchanged(cache, held)
    with enable(few, FEW):
        assert torch.equal(few.model(**given).logits, expected)
