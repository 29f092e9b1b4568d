"""What is no model, prompt, plan or callback is refused with a sentence that says what is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Tiny
from support import tiny_models

import reroute
from reroute.errors import RerouteError

tiny = tiny_models("llava-gqa")
NO_MODELS = ["llava-hf/llava-1.5-7b-hf", 3, torch.nn.Linear, {"model": None}]


@pytest.mark.parametrize("function", [reroute.enable, reroute.disable, reroute.handle_of])
@pytest.mark.parametrize("wrong", NO_MODELS)
def test_no_model(function: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(RerouteError, match="Pass the model itself, as AutoModel"):
        function(wrong)


def test_the_handle_is_not_the_model(tiny: Tiny) -> None:
    with reroute.enable(tiny.model, keep=0.5) as handle:
        with pytest.raises(RerouteError, match=r"Pass the model itself.*not <Handle"):
            reroute.disable(handle)
        assert repr(handle) == "<Handle: diverse, route, keep=0.5, backend torch, enabled>"
    assert repr(handle) == "<Handle: diverse, route, keep=0.5, backend torch, disabled>"


def test_a_part_is_not_the_model(tiny: Tiny) -> None:
    """Nothing would be disabled, and nothing said."""
    handle = reroute.enable(tiny.model)
    with pytest.raises(RerouteError, match="LlavaModel is a part of a model that is routed"):
        reroute.disable(tiny.model.model)
    assert handle.is_enabled
    reroute.disable(torch.nn.Linear(1, 1))  # is not routed, as asked for


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"input_ids are a tensor \(batch, length\).*not \[\[1, 2\]\]"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"not \(3,\) of torch\.int64"),
        ({"visual_mask": [[True]]}, r"visual_mask is a tensor \(batch, length\) of bool.*not \[\[True\]\]"),
    ],
)
def test_no_prompt(tiny: Tiny, wrong: dict[str, Any], message: str) -> None:
    with reroute.enable(tiny.model, keep=0.5) as handle, pytest.raises(RerouteError, match=message):
        handle.plan(**wrong)


@pytest.mark.parametrize("shape", [(1, 3), (3, 12)])
def test_a_mask_of_another_prompt(tiny: Tiny, shape: tuple[int, int]) -> None:
    inputs = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    message = r"The attention_mask is of \(\d+, \d+\) tokens, and the prompt has"
    with reroute.enable(tiny.model, keep=0.5) as handle, pytest.raises(RerouteError, match=message):
        handle.plan(inputs["input_ids"], torch.ones(shape, dtype=torch.int64))


def test_no_plan_and_no_callback(tiny: Tiny) -> None:
    with reroute.enable(tiny.model, keep=0.5) as handle:
        with pytest.raises(RerouteError, match="What is used is a plan"):
            handle.using("plan")
        with pytest.raises(RerouteError, match="A callback is a function of one argument, the stats, not 3"):
            handle.on_prefill(3)
