"""The divergence of routed runs, against a plain recomputation: each prompt alone, its answer token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CACHE, Tiny
from torch import Tensor

import reroute
from reroute import Schedule
from reroute.calibration import objective as objective_module
from reroute.calibration.dense import Model, answer, refer
from reroute.calibration.objective import CAP, Objective
from reroute.calibration.prompts import Prompt, Prompts
from reroute.core.schedule import Action
from reroute.rankers import RaterAttention
from reroute.transformers import adapter_of

Inputs = dict[str, Tensor]
LENGTH = 6
SCHEDULES = [
    (Schedule((2, 4, 6), (0.5, 0.25, 0.5)), "route"),
    (Schedule((0, 3), (0.25, 0.125)), "route"),
    (Schedule((3, 6), (0.25, 0.125)), "remove"),
    (Schedule((4,), (0.25,), (RaterAttention(),)), "remove"),  # it looks at the input of layer 0 too
]


@torch.no_grad()
def alone(model: Any, inputs: Inputs, answer: list[int]) -> Tensor:
    """Log-probabilities (T, V) of the tokens of ``answer``, given those before: a prefill and decoding steps."""
    output = model(**inputs, use_cache=True)
    found, mask = [output.logits[:, -1]], inputs["attention_mask"]
    position = inputs["input_ids"].shape[1]
    offset = getattr(model.model, "rope_deltas", None)
    for token in answer[:-1]:
        mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
        place = torch.tensor([[position]]) + (0 if offset is None else offset)
        ids = place[None].expand(3, 1, 1) if offset is not None else place
        step = {"input_ids": torch.tensor([[token]]), "attention_mask": mask, "position_ids": ids}
        output = model(**step, **{CACHE: output[CACHE]}, use_cache=True)
        found.append(output.logits[:, -1])
        position += 1
    return torch.cat(found).float().log_softmax(-1)


def recomputed(few: Tiny, inputs: Inputs, answer: list[int], schedule: Schedule, action: Action) -> float:
    dense = alone(few.model, inputs, answer)
    with reroute.enable(few.model, schedule=schedule, action=action):
        routed = alone(few.model, inputs, answer)
    return float((dense.exp() * (dense - routed)).sum(-1).mean().clamp(max=CAP))


@pytest.fixture(scope="module")
def read(few: Tiny, prompts: list[Inputs]) -> tuple[Prompt, ...]:
    return Prompts.read(prompts, adapter_of(few.model).visual_ids).all


@pytest.fixture(scope="module")
def model(few: Tiny) -> Model:
    return Model.of(few.model, adapter_of(few.model))


@pytest.fixture(scope="module")
def answers(model: Model, read: tuple[Prompt, ...]) -> list[list[int]]:
    return answer(model, read, LENGTH, max_tokens=100)


def test_answers_are_those_of_each_prompt_alone(few: Tiny, prompts: list[Inputs], answers: list[list[int]]) -> None:
    eos = few.model.generation_config.eos_token_id
    for inputs, found in zip(prompts, answers, strict=True):
        output = few.model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)[0]
        assert output[inputs["input_ids"].shape[1] :].tolist() == found
        assert all(token not in eos for token in found[:-1])
    assert len({len(found) for found in answers}) > 1, "some end early, for the tests below"


@pytest.mark.parametrize(("schedule", "action"), SCHEDULES)
def test_the_divergence_is_that_of_each_prompt_alone(
    few: Tiny,
    prompts: list[Inputs],
    read: tuple[Prompt, ...],
    model: Model,
    answers: list[list[int]],
    schedule: Schedule,
    action: Action,
) -> None:
    expected = [recomputed(few, x, y, schedule, action) for x, y in zip(prompts, answers, strict=True)]
    for last, max_tokens in ((0, 100), (5, 1000)):  # with and without layers that are passed over
        with reroute.enable(few.model, keep=1.0) as handle:
            found = Objective(model, handle, refer(model, read, answers, last, max_tokens))(schedule, action)
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert max(expected) > 0.05


def test_few_logits_at_once_make_no_difference(
    few: Tiny, read: tuple[Prompt, ...], model: Model, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = SCHEDULES[0][0]
    with reroute.enable(few.model, keep=1.0) as handle:
        objective = Objective(model, handle, refer(model, read, answers, 0, 1000))
        expected = objective(schedule, "route")
        monkeypatch.setattr(objective_module, "CHUNK", 3 * model.head.weight.shape[0])
        assert objective(schedule, "route") == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert objective(Schedule((2,), (1.0,)), "route") == pytest.approx([0.0] * len(read), abs=1e-5)
        monkeypatch.setattr(objective_module, "CAP", 0.01)
        assert max(objective(schedule, "route")) == 0.01


def test_layers_before_the_first_decision_do_not_run(
    few: Tiny, read: tuple[Prompt, ...], model: Model, answers: list[list[int]]
) -> None:
    """And run again afterwards."""
    ran: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(model.layers)
    ]
    try:
        with reroute.enable(few.model, keep=1.0) as handle:
            objective = Objective(model, handle, refer(model, read, answers, 2, 1000))
            ran.clear()
            objective(Schedule((3,), (0.5,)), "route")
        assert ran == list(range(2, 8)), "layer 2 is the last whose input is held"
        ran.clear()
        few.model(**few.inputs([few.prompt(0, 3, few.grid, 4)]))
        assert ran == list(range(8))
    finally:
        for hook in hooks:
            hook.remove()
    assert all("forward" not in vars(layer) for layer in model.layers)
