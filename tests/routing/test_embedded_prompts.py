"""Prompts as ``inputs_embeds``: a mask says which tokens are visual."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from models import CACHE, Sample, Tiny
from oracle import predict
from support import RULES, cache_of, close, enable, generate, new_tokens, rows, same_decisions, tiny_models
from torch import Tensor
from transformers import StaticCache

from reroute.errors import RerouteError

tiny = tiny_models("llava-gqa", "qwen")


def embedded(tiny: Tiny, samples: list[Sample], side: str = "left") -> tuple[dict[str, Tensor], Tensor]:
    """What a model is called with that never sees an id, and which tokens are visual."""
    given = tiny.inputs(samples, side, positions=True)
    ids, mask = given["input_ids"], given["attention_mask"]
    states = tiny.model.get_input_embeddings()(ids).clone()
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for b, sample in enumerate(samples):
        places = mask[b].nonzero().flatten()
        states[b, places] = tiny.embeds(sample)
        visual[b, places[list(sample.visual)]] = True
    return {"inputs_embeds": states, "attention_mask": mask, "position_ids": given["position_ids"]}, visual


def samples_of(tiny: Tiny) -> list[Sample]:
    """One picture, two, none."""
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 6)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", RULES)
def test_a_prefill(tiny: Tiny, rules: Any, side: str) -> None:
    """A batch is what the oracle makes of each sample, and what the model makes of ids."""
    samples = samples_of(tiny)
    given, visual = embedded(tiny, samples, side)
    with enable(tiny, rules) as handle:
        plan = handle.plan(visual_mask=visual, attention_mask=given["attention_mask"])
        with handle.using(plan):
            logits = tiny.model(**given).logits
        trace = handle.trace
        by_ids = tiny.model(**tiny.inputs(samples, side, positions=True)).logits
    expected = [predict(tiny, sample, rules) for sample in samples]
    same_decisions(trace, expected)
    for row, result in zip(rows(logits, given["attention_mask"]), expected, strict=True):
        close(row, result.logits)
    close(logits[given["attention_mask"].bool()], by_ids[given["attention_mask"].bool()])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("count", [1, 3])
def test_generation(tiny: Tiny, count: int, cache: str) -> None:
    samples, rules = samples_of(tiny)[:count], RULES[0]
    given, visual = embedded(tiny, samples)
    settings: dict[str, Any] = {}
    if cache == "static":
        settings[CACHE] = StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=80)
    if tiny.is_qwen:  # generate takes the text positions in front of the three of M-RoPE
        given["position_ids"] = torch.cat([given["attention_mask"].cumsum(-1)[None] - 1, given["position_ids"]])
    with enable(tiny, rules) as handle:
        plan = handle.plan(visual_mask=visual, attention_mask=given["attention_mask"])
        with handle.using(plan):
            output = generate(tiny, given, 4, **settings)
        assert handle.stats().prefills == 1
    for b, sample in enumerate(samples):
        tokens = new_tokens(output, 0, b)
        assert len(tokens) == 4
        if tiny.is_qwen:
            tokens = tokens[:1]  # it counts the positions of what follows anew, with routing and without
        expected = predict(tiny, sample, rules, then=tokens[:-1]).logits[-len(tokens) :]
        close(torch.stack([step[b] for step in output.logits[: len(tokens)]]), expected)


def test_steps_after_an_embedded_prompt(tiny: Tiny) -> None:
    """With positions of their own they are the oracle's."""
    sample, new, rules = samples_of(tiny)[0], tiny.prompt(9, 1), RULES[1]
    given, visual = embedded(tiny, [sample])
    with enable(tiny, rules) as handle, handle.using(handle.plan(visual_mask=visual)):
        cache = cache_of(tiny.model(**given, use_cache=True))
        logits = tiny.model(**tiny.follow([sample], [new]), **{CACHE: cache}).logits
    close(logits[0], predict(tiny, [sample, new], rules).logits[-1:])


def test_labels(tiny: Tiny) -> None:
    """An answer that is there does not rank."""
    sample, rules = tiny.prompt(0, 5, tiny.grid, 7), RULES[0]
    query = len(sample) - 4
    labels = torch.tensor([[-100] * (query + 1) + list(sample.ids[query + 1 :])])
    given, visual = embedded(tiny, [sample])
    with enable(tiny, rules) as handle, handle.using(handle.plan(visual_mask=visual, labels=labels)):
        logits = tiny.model(**given, labels=labels).logits
    close(logits[0], predict(tiny, sample, rules, query=query).logits)


def test_other_masks() -> None:
    tiny = models.tiny("llava-gqa")
    ids = tiny.inputs([samples_of(tiny)[0]])["input_ids"]
    visual = ids == models.PICTURE
    with enable(tiny, RULES[0]) as handle:
        for arguments in ({}, {"input_ids": ids, "visual_mask": visual}):
            with pytest.raises(RerouteError, match="Give either input_ids or visual_mask"):
                handle.plan(**arguments)
        for wrong in (visual.long(), visual[0], visual[..., None]):
            with pytest.raises(RerouteError, match=r"is a tensor \(batch, length\) of bool"):
                handle.plan(visual_mask=wrong)
        with pytest.raises(RerouteError, match=r"labels are of \(1, 3\) tokens"):
            handle.plan(visual_mask=visual, labels=ids[:, :3])
        assert handle.plan(visual_mask=torch.zeros_like(visual)) is None
