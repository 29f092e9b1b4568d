"""Labels end the prompt of their call, however they come; a plan that was made ahead must know them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Sample, Tiny
from oracle import predict
from support import (
    FEW,
    close,
    enable,
    labels_after,
    rows,
    same_decisions,
)
from torch import Tensor, nn

import reroute
from reroute.errors import RerouteError

PROMPT, ANSWER = 26, 4


@pytest.fixture
def labelled(few: Tiny) -> tuple[Sample, dict[str, Tensor], Tensor]:
    """A prompt with its answer, the arguments without labels, and the labels."""
    sample = few.prompt(3, 5, few.grid, 5, ANSWER)
    assert len(sample) == PROMPT + ANSWER
    labels = labels_after(sample, PROMPT)
    expected = [predict(few, sample, FEW, query=query).decisions[0][0].kept for query in (PROMPT - 1, None)]
    assert expected[0] != expected[1], "choose another seed: the answer chooses as the question does"
    return sample, few.inputs([sample]), labels


def in_order(model: Any, given: dict[str, Any], last: str) -> list[Any]:
    """Positional arguments of ``model`` up to the one named ``last``."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return [given.get(name) for name in names[: names.index(last) + 1]]


class Wrapper(nn.Module):
    """Calls what it wraps as FSDP1, DeepSpeed and many trainers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **given: Any) -> Any:
        return self.inner.forward(**given)


def by_a_hook(model: Any, given: dict[str, Any], labels: Tensor) -> Any:
    """A hook gives the labels: they are no argument of the outermost call."""
    add = lambda module, args, kwargs: (args, {**kwargs, "labels": labels})
    handle = model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        return model(**given)
    finally:
        handle.remove()


def by_an_own_forward(model: Any, given: dict[str, Any], labels: Tensor) -> Any:
    """As accelerate's: an attribute of the module, which calls the class's."""
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    try:
        return model(**given, labels=labels)
    finally:
        del model.forward


def positional(model: Any, given: dict[str, Any], labels: Tensor) -> Any:
    """Labels, and all before them, without their names."""
    named = {**given, "labels": labels}
    values = in_order(model, named, "labels")
    left = {name: value for name, value in named.items() if not any(value is other for other in values)}
    return model(*values, **left)


WITH_LABELS: dict[str, Callable[[Any, dict[str, Any], Tensor], Any]] = {
    "model()": lambda model, given, labels: model(**given, labels=labels),
    "model.forward()": lambda model, given, labels: model.forward(**given, labels=labels),
    "the class's forward": lambda model, given, labels: type(model).forward(model, **given, labels=labels),
    "a wrapper": lambda model, given, labels: Wrapper(model)(**given, labels=labels),
    "positional": positional,
    "a hook": by_a_hook,
    "an own forward": by_an_own_forward,
    "without a cache": lambda model, given, labels: model(**given, labels=labels, use_cache=False),
    "no mask": lambda model, given, labels: model(
        **{name: value for name, value in given.items() if name != "attention_mask"}, labels=labels
    ),
}


@pytest.mark.parametrize("way", WITH_LABELS)
def test_labels_end_the_prompt(few: Tiny, labelled: Any, way: str) -> None:
    """However they come. The call after it has none."""
    sample, given, labels = labelled
    question, answer = (predict(few, sample, FEW, query=query) for query in (PROMPT - 1, None))
    with enable(few, FEW) as handle:
        output = WITH_LABELS[way](few.model, given, labels)
        same_decisions(handle.trace, [question])
        close(output.logits[0], question.logits)
        states = few.model.model(**given).last_hidden_state
        same_decisions(handle.trace, [answer])
        close(states[0], answer.hidden[-1])


def test_labels_of_a_forward_that_was_replaced_before(few: Tiny, labelled: Any) -> None:
    """As accelerate's ``dispatch_model`` does it: the forward that it calls knows nothing of routing."""
    sample, given, labels = labelled
    question, plain = predict(few, sample, FEW, query=PROMPT - 1), few.model.forward
    few.model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    try:
        with enable(few, FEW) as handle:
            close(few.model(**given, labels=labels).logits[0], question.logits)
            same_decisions(handle.trace, [question])
    finally:
        del few.model.forward


def test_labels_of_a_batch(few: Tiny) -> None:
    """Each sample's own; one without a picture, and one whose labels leave no question."""
    samples = [few.prompt(3, 5, few.grid, 5, ANSWER), few.prompt(4, 9), few.prompt(5, 2, few.grid, 8)]
    given = few.inputs(samples)
    mask, labels = given["attention_mask"], given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[0, :-ANSWER] = -100
    labels[2, : -len(samples[2]) + 2] = -100
    expected = [predict(few, samples[0], FEW, query=PROMPT - 1), *(predict(few, s, FEW) for s in samples[1:])]
    with enable(few, FEW) as handle:
        output = few.model(**given, labels=labels)
    same_decisions(handle.trace, expected)
    for row, result in zip(rows(output.logits, mask), expected, strict=True):
        close(row, result.logits)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_what_comes_without_its_name(few: Tiny, name: str) -> None:
    """Of the whole model and of the base model: a mask that is not seen would make padding rank the picture."""
    samples = [few.prompt(3, 5, few.grid, 5), few.prompt(4, 2, few.grid, 4)]
    given = few.inputs(samples, side="right", positions=True)
    for model in (few.model, few.model.model):
        named = {key: value for key, value in given.items() if value is not None}
        values = in_order(model, named, name)
        left = {key: value for key, value in named.items() if not any(value is other for other in values)}
        with enable(few, FEW) as handle:
            model(*values, **left)
        same_decisions(handle.trace, [predict(few, sample, FEW) for sample in samples])


def test_a_plan_with_labels(few: Tiny, labelled: Any) -> None:
    """It serves calls with the labels, calls whose loss has taken them out, and calls of the base model."""
    sample, given, labels = labelled
    question = predict(few, sample, FEW, query=PROMPT - 1)
    with enable(few, FEW) as handle:
        plan = handle.plan(given["input_ids"], given["attention_mask"], labels=labels)
        calls: tuple[Callable[[], Tensor], ...] = (
            lambda: few.model(**given, labels=labels).logits[0],
            lambda: few.model.forward(**given, labels=labels).logits[0],
            lambda: few.model(**given).logits[0],
            lambda: few.model.lm_head(few.model.model(**given).last_hidden_state)[0],
        )
        for call in calls:
            with handle.using(plan):
                close(call(), question.logits)
            same_decisions(handle.trace, [question])


def test_a_plan_without_the_labels_of_its_call(few: Tiny, labelled: Any) -> None:
    """In whatever way they come; labels of a call without a plan may come again inside."""
    sample, given, labels = labelled
    answer = predict(few, sample, FEW)
    with enable(few, FEW) as handle:
        plan = handle.plan(given["input_ids"], given["attention_mask"])
        for way, call in WITH_LABELS.items():
            with handle.using(plan), pytest.raises(RerouteError, match="does not know the labels of this call"):
                call(few.model, given, labels)
            assert handle.totals().prefills == 0, way
        with handle.using(plan):
            close(few.model(**given).logits[0], answer.logits)


def test_a_plan_of_text_knows_all_labels(few: Tiny) -> None:
    """There is nothing to rank."""
    given = few.inputs([few.prompt(3, 9)])
    plain = few.model(**given, labels=given["input_ids"]).logits
    with enable(few, FEW) as handle, handle.using(handle.plan(given["input_ids"])):
        assert torch.equal(few.model(**given, labels=given["input_ids"]).logits, plain)


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_plan_that_keeps_everything_knows_all_labels(few: Tiny, labelled: Any, is_planned: bool) -> None:
    """Nothing is ranked, whether the plan was made with them or without."""
    _, given, labels = labelled
    plain = few.model(**given, labels=labels)
    with reroute.enable(few.model, keep=1) as handle:
        plan = handle.plan(given["input_ids"], given["attention_mask"], labels=labels if is_planned else None)
        with handle.using(plan):
            output = few.model(**given, labels=labels)
        assert torch.equal(output.logits, plain.logits)
        assert torch.equal(output.loss, plain.loss)
        assert handle.totals().prefills == 1
