"""Models under torch.compile: the hooks run as they are, what lies between them is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from models import Tiny

import reroute
from reroute.errors import RerouteError

SCHEDULE = reroute.Schedule((1, 2), (0.5, 0.25))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(tiny: Tiny, model: Any) -> torch.Tensor:
    """Of a batch with padding."""
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)]
    with torch.no_grad():
        result: torch.Tensor = model(**tiny.inputs(samples)).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first"), [("llava", "compile"), ("qwen", "enable")])
@pytest.mark.filterwarnings("ignore")
def test_routing_under_compile(name: str, first: str) -> None:
    """Whichever comes first; and ``disable`` gives the plain model back."""
    tiny: Tiny = getattr(models, name)(layers=3)
    plain = logits(tiny, tiny.model)
    with reroute.enable(tiny.model, schedule=SCHEDULE):
        routed = logits(tiny, tiny.model)
    assert not torch.equal(routed, plain)
    if first == "compile":
        tiny.model.compile(backend="eager")
        torch.testing.assert_close(logits(tiny, tiny.model), plain)
    handle = reroute.enable(tiny.model, schedule=SCHEDULE)
    if first == "enable":
        tiny.model.compile(backend="eager")
    torch.testing.assert_close(logits(tiny, tiny.model), routed)
    assert handle.stats().prefills == 1
    handle.disable()
    torch.testing.assert_close(logits(tiny, tiny.model), plain)


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("wrapper", "function")]


@pytest.mark.parametrize("how", ["forward", *SLOW])
@pytest.mark.filterwarnings("ignore")
def test_what_ran_compiled_before_is_routed_too(how: str) -> None:
    tiny = models.llava(layers=3)
    compiled: Any = torch.compile(tiny.model.forward if how == "forward" else tiny.model, backend="eager")
    if how == "forward":
        tiny.model.forward = compiled
    elif how == "function":
        compiled = torch.compile(lambda **given: tiny.model(**given), backend="eager")
    call = tiny.model if how == "forward" else compiled
    plain = logits(tiny, call)
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        routed = logits(tiny, call)
        torch.testing.assert_close(logits(tiny, tiny.model), routed)
    assert handle.stats().prefills == 2
    torch.testing.assert_close(logits(tiny, call), plain)


def test_layers_that_were_replaced_after_enable() -> None:
    tiny = models.llava(layers=3)
    with reroute.enable(tiny.model, schedule=SCHEDULE):
        layers = tiny.model.model.language_model.layers
        for i, other in enumerate(models.llava(layers=3).model.model.language_model.layers):
            layers[i] = other
        with pytest.raises(RerouteError, match="has changed since"):
            logits(tiny, tiny.model)


def test_what_compile_returns_can_be_enabled() -> None:
    """Its forward and its ``generate`` are routed, and so are those of the model inside."""
    tiny = models.llava(layers=3)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    wrapper: Any = torch.compile(tiny.model, backend="eager")
    with reroute.enable(wrapper, schedule=SCHEDULE) as handle, torch.no_grad():
        tokens = [model.generate(**given, max_new_tokens=2, do_sample=False) for model in (wrapper, tiny.model)]
        assert handle.stats().prefills == 2
    assert torch.equal(*tokens)
    assert "generate" not in vars(tiny.model)
    reroute.enable(tiny.model, schedule=SCHEDULE)
    reroute.disable(wrapper)
    assert "generate" not in vars(tiny.model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "when"),
    [("model", "after enable"), ("base", "before enable"), ("decoder", "before enable"), ("decoder", "after enable")],
)
@pytest.mark.filterwarnings("ignore")
def test_a_part_that_torch_compile_wraps(part: str, when: str) -> None:
    """What it returns stands in the place of the part, or is called instead of the model; it outlives routing."""
    tiny, rules = models.llava(layers=2), reroute.Schedule((1,), (0.5,))
    plain = logits(tiny, tiny.model)
    with reroute.enable(tiny.model, schedule=rules):
        routed = logits(tiny, tiny.model)

    def wrap() -> Any:
        if part == "model":
            return torch.compile(tiny.model, backend="eager")
        base = tiny.model.model
        if part == "base":
            tiny.model.model = torch.compile(base, backend="eager")
        else:
            base.language_model = torch.compile(base.language_model, backend="eager")
        return tiny.model

    call = wrap() if when == "before enable" else tiny.model
    handle = reroute.enable(tiny.model, schedule=rules)
    call = wrap() if when == "after enable" else call
    torch.testing.assert_close(logits(tiny, call), routed)
    assert handle.stats().prefills == 1
    handle.disable()
    torch.testing.assert_close(logits(tiny, call), plain)
