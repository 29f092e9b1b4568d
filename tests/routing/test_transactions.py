"""Everything is checked, then everything is changed: what is refused, or fails halfway, leaves all as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Tiny
from support import FAMILIES, FEW, enable, small, snapshot
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from unfit_models import MODELS, Wrapper, decoder, whole

import reroute
from reroute.errors import RerouteError
from reroute.methods import FastV, PDrop
from reroute.transformers import router
from reroute_kernels import BackendUnavailable, PagedPool


@pytest.fixture(autouse=True)
def _called() -> None:
    """Transformers adds hooks of its own in a first call."""
    for few in map(small, FAMILIES):
        few.model(**few.inputs([few.prompt(0, 9)]))


def process() -> Any:
    """What is routed without being named."""
    return PreTrainedModel.__call__, GenerationMixin.generate


# --- enable -------------------------------------------------------------------------------------------------------


SETTINGS: dict[str, dict[str, Any]] = {
    "unknown method": {"method": "fastvv"},
    "unknown action": {"action": "prune"},
    "unknown backend": {"backend": "cuda"},
    "a budget out of reach": {"method": "pdrop", "keep": 0.01},
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
