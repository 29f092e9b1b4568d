"""Everything is checked, then everything is changed: what is refused, or fails halfway, leaves all as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from models import CACHE, Sample, Tiny
from oracle import Rules, predict
from support import FAMILIES, FEW, cache_of, close, enable, generate, schedule, small, snapshot, state_of, unchanged
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import reroute
from reroute.errors import RerouteError, UnsupportedCacheError
from reroute.methods import FastV, PDrop
from reroute.rankers import RankInputs, ScoreRanker
from reroute.transformers import router
from reroute_kernels import BackendUnavailable, PagedPool


@pytest.fixture(autouse=True)
def _called() -> None:
    """Transformers adds hooks of its own in a first call."""
    for few in map(small, FAMILIES):
        few.model(**few.inputs([few.prompt(0, 9)]))


def whole(model: Any) -> Any:
    """Classes, attributes and hooks of all modules, and the state of the configuration."""
    classes = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    return classes, snapshot(model), copy.deepcopy(model.config.to_dict())


def process() -> Any:
    """What is routed without being named."""
    return PreTrainedModel.__call__, GenerationMixin.generate


# --- enable -------------------------------------------------------------------------------------------------------


def changed(owner: Any, name: str, value: Any) -> Callable[[Tiny], Any]:
    """A model with another attribute: ``owner`` finds whose."""

    @contextmanager
    def change(few: Tiny) -> Iterator[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner(few.model), name, value, raising=False)
            yield few.model

    return change


def replaced(owner: Any, name: str, module: Any) -> Callable[[Tiny], Any]:
    """A model with another module, or none."""

    @contextmanager
    def change(few: Tiny) -> Iterator[Any]:
        parent = owner(few.model)
        plain = parent._modules[name]
        parent._modules[name] = module(plain) if callable(module) else module
        try:
            yield few.model
        finally:
            parent._modules[name] = plain

    return change


class Wrapped(nn.Module):
    """What hides a layer's parts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@contextmanager
def listed_twice(few: Tiny) -> Iterator[Any]:
    layers = few.model.model.language_model.layers
    plain = layers[2]
    layers[2] = layers[1]
    try:
        yield few.model
    finally:
        layers[2] = plain


@contextmanager
def shared(few: Tiny, part: Callable[[Any], nn.Module], name: str) -> Iterator[Any]:
    """Another model, of which a part is routed as one of ``few``'s."""
    other = models.llava(layers=5) if not few.is_qwen else models.qwen(layers=5)
    part(other.model)._modules[name] = part(few.model)._modules[name]
    with enable(few, FEW):
        yield other.model


class Wrapper(nn.Module):
    """PEFT's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        return self.model


def text(model: Any) -> Any:
    return model.config.get_text_config()


def decoder(model: Any) -> Any:
    return model.model.language_model


def layer(model: Any) -> Any:
    return decoder(model).layers[1]


SETTINGS: dict[str, dict[str, Any]] = {
    "unknown method": {"method": "fastvv"},
    "unknown action": {"action": "prune"},
    "unknown backend": {"backend": "cuda"},
    "a budget out of reach": {"keep": 0.01},
    "a budget above 1": {"keep": 1.5},
    "a budget as text": {"keep": "0.33"},
    "a budget and a schedule": {"keep": 0.5, "schedule": reroute.Schedule((2,), (0.5,))},
    "a layer that is not there": {"schedule": reroute.Schedule((2, 5), (0.5, 0.5))},
    "a removed token that returns": {"schedule": reroute.Schedule((1, 3), (0.2, 0.5)), "action": "remove"},
    "renumbered, but routed": {"schedule": reroute.Schedule((2,), (0.5,), position_mode="renumbered")},
    "a method for deeper models": {"method": FastV(layer=9, ratio=0.5)},
    "a method for another depth": {"method": PDrop((2, 4), (0.5,))},
    "a config and single settings": {"config": reroute.RoutingConfig(keep=0.5), "keep": 0.5},
    "a backend that cannot run": {"backend": "triton"},
    "a pool of another width": {"pool": PagedPool(32, torch.float32, "cpu")},
    "a pool as text": {"pool": "256MiB"},
}

MODELS: dict[str, Callable[[Tiny], Any]] = {
    "an unknown model": changed(lambda model: type(model.config), "model_type", "mystery"),
    "an unknown decoder": changed(lambda model: type(text(model)), "model_type", "mystery"),
    "attention with unknown masks": changed(text, "_attn_implementation", "flex_attention"),
    "sliding windows": changed(text, "layer_types", ["full_attention"] * 4 + ["sliding_attention"]),
    "tensor parallelism": changed(lambda model: model, "_tp_size", 2),
    "no decoder": replaced(lambda model: model.model, "language_model", None),
    "no base model": replaced(lambda model: model, "model", None),
    "a wrapped layer": replaced(lambda model: decoder(model).layers, "2", Wrapped),
    "a layer without its norm": replaced(layer, "input_layernorm", None),
    "a layer without attention": replaced(layer, "self_attn", None),
    "attention without queries": replaced(lambda model: layer(model).self_attn, "q_proj", None),
    "attention without keys": replaced(lambda model: layer(model).self_attn, "k_proj", None),
    "a layer listed twice": listed_twice,
    "a shared decoder": lambda few: shared(few, lambda model: model.model, "language_model"),
    "a shared layer": lambda few: shared(few, lambda model: decoder(model).layers, "3"),
    "a shared base model": lambda few: shared(few, lambda model: model, "model"),
}


def check_refused(model: Any, settings: dict[str, Any], watched: Any) -> None:
    """``enable`` refuses; ``watched`` and all that is routed in the process are as before."""
    before, running, handle = whole(watched), process(), reroute.handle_of(model)
    with pytest.raises((RerouteError, BackendUnavailable)):
        reroute.enable(model, **settings)
    assert whole(watched) == before
    assert process() == running
    assert reroute.handle_of(model) is handle


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(few: Tiny, case: str) -> None:
    """Of a plain model; of one that is routed, whose handle goes on."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    plain = few.model(**given).logits
    check_refused(few.model, SETTINGS[case], few.model)
    assert torch.equal(few.model(**given).logits, plain)
    with enable(few, FEW) as handle:
        expected = few.model(**given).logits
        for _ in range(2):
            check_refused(few.model, SETTINGS[case], few.model)
        assert torch.equal(few.model(**given).logits, expected)
        assert handle.totals().prefills == 2
    assert torch.equal(few.model(**given).logits, plain)


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_refused(few: Tiny, case: str) -> None:
    """They are as they were, and so is the one that they share a part with."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    before, plain = whole(few.model), few.model(**given).logits
    with MODELS[case](few) as model:
        check_refused(model, {"schedule": reroute.Schedule((1, 3), (0.5, 0.25))}, model)
        check_refused(model, {"keep": 0.7}, few.model)
    assert whole(few.model) == before
    assert torch.equal(few.model(**given).logits, plain)
    enable(few, FEW).disable()


def test_wrappers_that_are_refused(few: Tiny) -> None:
    for model in (Wrapper(few.model), few.model.model, decoder(few.model), nn.Linear(1, 1)):
        before = {name: type(module) for name, module in model.named_modules()}, snapshot(model)
        with pytest.raises(RerouteError):
            reroute.enable(model)
        assert ({name: type(module) for name, module in model.named_modules()}, snapshot(model)) == before


def test_m_rope_that_is_refused() -> None:
    few = small("qwen")
    check_refused(few.model, {"method": PDrop.official(), "action": "remove"}, few.model)


@pytest.mark.parametrize("case", [{"method": "fastvv"}, {"keep": 7.0}, {"backend": "triton"}, {"keep": "1"}])
def test_process_wide_settings_that_are_refused(few: Tiny, case: dict[str, Any]) -> None:
    """Nothing is routed then, or what was before."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    before, running = whole(few.model), process()
    with pytest.raises((RerouteError, BackendUnavailable)):
        reroute.enable(**case)
    assert process() == running
    few.model(**given)
    assert whole(few.model) == before
    reroute.enable(schedule=reroute.Schedule((1,), (0.25,)))
    running = process()
    with pytest.raises((RerouteError, BackendUnavailable)):
        reroute.enable(**case)
    assert process() == running
    few.model(**given)
    handle = reroute.handle_of(few.model)
    assert handle is not None
    assert handle.stats().kept == ((4,),)


# --- attaching ----------------------------------------------------------------------------------------------------


class Failing:
    """``function``, whose call number ``number`` raises instead."""

    def __init__(self, function: Callable[..., Any], number: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, number, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left == 0:
            self.left = -1
            raise self.error
        self.left -= 1
        return self.function(*args, **kwargs)


ERRORS = (RuntimeError("of the test"), KeyboardInterrupt(), RerouteError("of the test"))


@pytest.mark.parametrize("name", ["intercept", "_forget_compiled"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_attaching_that_fails(few: Tiny, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step: a plain model stays plain, and one that is routed stays so, by the same handle."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    function = getattr(router, name)
    steps = few.num_layers + 3 if name == "intercept" else 1
    before, plain = whole(few.model), few.model(**given).logits
    for step in range(steps):
        monkeypatch.setattr(router, name, Failing(function, step, error))
        with pytest.raises(type(error)):
            reroute.enable(few.model, keep=0.7)
        monkeypatch.undo()
        assert whole(few.model) == before
        assert reroute.handle_of(few.model) is None
    assert torch.equal(few.model(**given).logits, plain)
    with enable(few, FEW) as handle:
        expected, routed = few.model(**given).logits, whole(few.model)
    handle = enable(few, FEW)
    routed = whole(few.model)
    for step in range(steps):
        monkeypatch.setattr(router, name, Failing(function, step, error))
        with pytest.raises(type(error)):
            reroute.enable(few.model, keep=0.7)
        monkeypatch.undo()
        assert whole(few.model) == routed
        assert handle.is_enabled
        assert reroute.handle_of(few.model) is handle
    assert torch.equal(few.model(**given).logits, expected)
    assert handle.totals().prefills == 1
    handle.disable()
    assert whole(few.model) == before


def test_disabling_that_is_interrupted(few: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is plain nevertheless, and can be routed again."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    before, plain = whole(few.model), few.model(**given).logits
    handle = enable(few, FEW)
    monkeypatch.setattr(router, "_forget_compiled", Failing(router._forget_compiled, 0, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        handle.disable()
    monkeypatch.undo()
    assert whole(few.model) == before
    assert not handle.is_enabled
    handle.disable()
    assert torch.equal(few.model(**given).logits, plain)
    with enable(few, FEW):
        assert not torch.equal(few.model(**given).logits, plain)
    assert whole(few.model) == before


def test_a_model_without_generate(few: Tiny) -> None:
    """A scoring head on the base model: it is routed as a whole, or stays as it is."""

    class Scorer(type(few.model.model).__bases__[0]):  # type: ignore[misc]
        def __init__(self, base: Any, config: Any) -> None:
            super().__init__(config)
            self.model, self.score = base, nn.Linear(64, 1)

        def forward(self, **given: Any) -> Tensor:
            score: Tensor = self.score(self.model(**given).last_hidden_state[:, -1])
            return score

    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    scorer = Scorer(few.model.model, few.model.config).eval()
    before, plain = whole(scorer), scorer(**given)
    with enable(few, FEW):
        states = few.model.model(**given).last_hidden_state
    with reroute.enable(scorer, schedule=reroute.Schedule((1, 3), (0.5, 0.25))) as handle:
        assert torch.equal(scorer(**given), scorer.score(states[:, -1]))
        assert handle.totals().prefills == 1
        check_refused(few.model, {"keep": 0.7}, few.model)  # they share the base model
    assert whole(scorer) == before
    assert torch.equal(scorer(**given), plain)


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
    for cache in (StaticCache(config=config, max_cache_len=64), sliding):
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
    cases: dict[str, tuple[dict[str, Any], Any]] = {
        "chunks": ({**given, "prefill_chunk_size": 8}, refusing.empty),
        "no question": (cut, refusing.empty),
        "a static cache": (given, static),
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
    "scores of another shape": ({"method": FastV(layer=1, ranker=Odd())}, nullcontext, RerouteError),
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
