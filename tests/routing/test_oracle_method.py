"""The oracle baseline: what the plain model attends to, recorded ahead, decides."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from models import Sample, Tiny
from support import close, generate, mixed_batch, snapshot, tiny_models
from torch import Tensor

import reroute
from reroute.errors import RerouteError
from reroute.methods import FastV, Oracle, PDrop

tiny = tiny_models("llava-gqa", "qwen")


def attended(tiny: Tiny, given: dict[str, Tensor], samples: list[Sample]) -> list[Tensor]:
    """Per sample (layers, N): as the plain model returns it."""
    tiny.model.set_attn_implementation("eager")
    try:
        attentions = torch.stack(tiny.model(**given, output_attentions=True).attentions)
    finally:
        tiny.model.set_attn_implementation("sdpa")
    length = given["input_ids"].shape[1]
    places = [[length - len(sample) + i for i in sample.visual] for sample in samples]
    return [attentions[:, b, :, -1, its].mean(1) for b, its in enumerate(places)]


def test_a_record_is_the_attention_of_the_plain_model(tiny: Tiny) -> None:
    samples = mixed_batch(tiny)
    given = tiny.inputs(samples)
    tiny.model(**given)
    before = snapshot(tiny.model)
    record = reroute.record_attention(tiny.model, given)
    assert snapshot(tiny.model) == before
    assert (record.num_layers, record.counts) == (8, (16, 32, 0))
    for scores, expected in zip(record.scores, attended(tiny, given, samples), strict=True):
        close(scores, expected)


@pytest.mark.parametrize("action", ["route", "remove"])
def test_it_decides_by_all_layers_that_a_decision_is_for(tiny: Tiny, action: Any) -> None:
    """By those of the stage, or by all from there on where nothing comes back."""
    samples = mixed_batch(tiny)
    given = tiny.inputs(samples)
    expected = attended(tiny, given, samples)
    method = Oracle(reroute.record_attention(tiny.model, given), like=PDrop((1, 4), (0.5, 0.25)))
    with reroute.enable(tiny.model, method=method, action=action, trace=True) as handle:
        tiny.model(**given)
    assert handle.trace is not None
    assert handle.stats().scoring_flops == 0
    for stage, last in zip(handle.trace, (4, 8), strict=True):
        layers = slice(stage.layer, last if action == "route" else 8)
        for b in range(2):
            its = expected[b][layers].mean(0)[stage.candidates[b]]
            close(stage.scores[b], its)
            best = its.sort(descending=True, stable=True).indices[: len(stage.kept[b])]
            assert torch.equal(stage.kept[b], stage.candidates[b][best.sort().values])


@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_a_row_of_a_batch_is_the_sample_alone(tiny: Tiny, action: Any, keep: float) -> None:
    samples = mixed_batch(tiny)
    plain = tiny.model(**tiny.inputs(samples)).logits
    logits = []
    for some in (samples, samples[:1], samples[1:2]):
        method = Oracle(reroute.record_attention(tiny.model, tiny.inputs(some)))
        with reroute.enable(tiny.model, method=method, action=action, keep=keep):
            if len(some) == 3:
                assert torch.equal(tiny.model(**tiny.inputs(some)).logits, plain) == (keep == 1)
            logits.append(torch.stack(generate(tiny, some, 3).logits, 1))
    together, first, second = logits
    close(together[0], first[0])
    close(together[1], second[0])


def test_answers_that_are_there_do_not_rank(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    record = reroute.record_attention(tiny.model, tiny.inputs([sample]))
    with_answer = tiny.inputs([sample + models.text(3, 4)])
    labels = torch.full_like(with_answer["input_ids"], -100)
    labels[0, -2:] = 3
    close(reroute.record_attention(tiny.model, {**with_answer, "labels": labels}).scores[0], record.scores[0])


def test_what_it_cannot_serve(tiny: Tiny) -> None:
    one, two, none = mixed_batch(tiny)
    record = reroute.record_attention(tiny.model, tiny.inputs([one]))
    with reroute.enable(tiny.model, method=Oracle(record, like=FastV()), action="remove") as handle:
        for others in ([two], [one, one]):
            with pytest.raises(RerouteError, match=r"recorded for prompts of \(16,\) visual tokens, and here"):
                tiny.model(**tiny.inputs(others))
        tiny.model(**tiny.inputs([none]))
        tiny.model(**tiny.inputs([one]))
        assert handle.stats().prefills == 1
        with pytest.raises(RerouteError, match="The model is routed: record its attention before"):
            reroute.record_attention(tiny.model, tiny.inputs([one]))
    with pytest.raises(RerouteError, match="No attention was recorded"):
        reroute.record_attention(tiny.model, tiny.inputs([none]))
    assert reroute.handle_of(tiny.model) is None
    shallow = models.llava(layers=4)
    with pytest.raises(RerouteError, match="recorded in 8 layers, and the model has 4"):
        reroute.enable(shallow.model, method=Oracle(record))
    for wrong in ({"record": record.scores}, {"record": record, "like": "pdrop"}):
        with pytest.raises(RerouteError, match=r"Oracle takes what reroute\.record_attention"):
            Oracle(**wrong)
    with pytest.raises(RerouteError, match="cannot be stored"):
        Oracle(record).schedule(8, "route").to_json()
