"""The main families with pictures that are merged: generation, batches, and the plain model at keep=1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import near, predict
from pictured import PICTURED, Pictured, Prompt
from pictured_elsewhere import ELSEWHERE

import reroute
from reroute.errors import RerouteError

LAYERS, RATIOS = (2, 4, 5), (0.5, 0.3, 0.6)
TOKENS, MARGIN = 3, 1e-6
FAMILIES = {**PICTURED, **ELSEWHERE}


def generate(family: Pictured, *prompts: Prompt, **settings: Any) -> Any:
    given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **settings}
    return family.tiny.model.generate(**family.inputs(prompts), **given, max_new_tokens=TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("action", ["route", "remove"])
def test_generation(name: str, action: Any) -> None:
    family = FAMILIES[name]()
    ratios = RATIOS if action == "route" else tuple(sorted(RATIOS, reverse=True))
    one, two = family.prompt(0, 3, 5), family.prompt(1, 2, 4) if family.pads else family.prompt(1, 2, 6)
    schedule, runs = reroute.Schedule(LAYERS, ratios), []
    with reroute.enable(family.tiny.model, schedule=schedule, action=action, trace=True) as handle:
        for prompts in ((one,), (one, two)):
            runs.append((prompts, generate(family, *prompts), handle.trace))
    for prompts, output, trace in runs:
        assert trace is not None
        for b, prompt in enumerate(prompts):
            ids = [*prompt.ids, *output.sequences[b, -TOKENS:-1].tolist()]
            pictures: Any = prompt.pictures
            expected = predict(family.tiny, ids, LAYERS, ratios, prompt=len(prompt.ids), action=action, **pictures)
            assert expected.margin > MARGIN, "choose another seed: this selection is a matter of rounding"
            assert [stage.kept[b].tolist() for stage in trace] == expected.kept
            logits = torch.stack([step[b] for step in output.logits])
            near(logits, expected.logits[len(prompt.ids) - 1 :])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_is_the_plain_model(name: str) -> None:
    family = FAMILIES[name]()
    prompts = family.prompt(0, 3, 5), family.prompt(1, 2, 4)
    plain = generate(family, *prompts)
    with reroute.enable(family.tiny.model, keep=1.0):
        same(generate(family, *prompts), plain)
    same(generate(family, *prompts), plain)


def test_decisions_before_the_last_features() -> None:
    """DeepStack adds features to the whole prompt, behind layers 0 and 1."""
    model = PICTURED["qwen3_vl"]().tiny.model
    with pytest.raises(RerouteError, match="the last ones before layer 2, and the first layer that routes is 1"):
        reroute.enable(model, schedule=reroute.Schedule((1, 4), (0.5, 0.5)))
    reroute.enable(model, schedule=reroute.Schedule((2, 4), (0.5, 0.5))).disable()


def same(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_calibration_of_models_that_are_told_more_than_embeddings(name: str) -> None:
    """Features between layers, and which tokens see each other both ways."""
    family = PICTURED[name]()
    prompts = [family.inputs([family.prompt(seed, 3, 5)]) for seed in range(4)]
    with pytest.raises(RerouteError, match="told more of pictures than their embeddings"):
        reroute.calibrate(family.tiny.model, prompts, keep=0.6, evaluations=2, max_new_tokens=2)


@pytest.mark.parametrize("name", ["llama4", "chameleon", "kosmos2_5"])
def test_calibration_of_models_whose_parts_are_elsewhere(name: str) -> None:
    family = ELSEWHERE[name]()
    prompts = [family.inputs([family.prompt(seed, 3, 5)]) for seed in range(4)]
    with pytest.raises(RerouteError, match="here these are not parts of their own"):
        reroute.calibrate(family.tiny.model, prompts, keep=0.6, evaluations=2, max_new_tokens=2)


def test_calibration_of_models_with_features_that_come_as_embeddings() -> None:
    family = PICTURED["mistral3"]()
    prompts = [family.inputs([family.prompt(seed, 3, 5)]) for seed in range(4)]
    reroute.calibrate(family.tiny.model, prompts, keep=0.6, evaluations=2, max_new_tokens=2)
