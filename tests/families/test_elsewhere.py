"""Models whose parts are in other places: calls of every kind come to routing, once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from dense import near
from models import CACHE
from pictured import Pictured
from pictured_elsewhere import ELSEWHERE
from test_pictures import LAYERS, RATIOS, generate
from tiny_types import MARKED, TYPES, build, configuration
from torch import Tensor

import reroute
from reroute.errors import RerouteError, UnsupportedModelError

SCHEDULE = reroute.Schedule(LAYERS, RATIOS)
WHOLE = pytest.mark.parametrize("name", ["llama4", "kosmos2_5"])
"""Those whose whole model is its own base."""


def routed(name: str) -> tuple[Pictured, dict[str, Tensor], Tensor]:
    """A model, a prompt for it, and its routed logits."""
    family = ELSEWHERE[name]()
    given = family.inputs([family.prompt(0, 3, 5)])
    with reroute.enable(family.tiny.model, schedule=SCHEDULE):
        return family, given, family.tiny.model(**given, use_cache=False).logits


@torch.no_grad()
@WHOLE
def test_every_way_to_call_a_model_that_is_its_own_base(name: str) -> None:
    """By its forward, as wrappers do; where others have put one of theirs there; and one call inside of another."""
    family, given, expected = routed(name)
    model = family.tiny.model
    plain = model(**given, use_cache=False).logits
    assert not torch.equal(plain, expected)
    with reroute.enable(model, schedule=SCHEDULE, trace=True) as handle:
        assert torch.equal(model.forward(**given, use_cache=False).logits, expected)
        of_class = model.forward
        model.forward = lambda *args, **kwargs: of_class(*args, **kwargs)
        try:
            assert torch.equal(model(**given, use_cache=False).logits, expected)
        finally:
            del model.forward
        inner: list[Tensor] = []
        hook = model.register_forward_pre_hook(
            lambda *_: inner.append(of_class(**given, use_cache=False).logits) if not inner else None
        )
        assert torch.equal(model(**given, use_cache=False).logits, expected)
        hook.remove()
        assert handle.totals().prefills == 4, "each call is routed, and once"
    assert torch.equal(model(**given, use_cache=False).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama4", "chameleon"])
def test_answers_rank_nothing(name: str) -> None:
    """Labels come to the whole model: the prompt ends where the answer begins."""
    family, given, _ = routed(name)
    model, answer = family.tiny.model, torch.tensor([[11, 12, 13]])
    longer = {**given, "input_ids": torch.cat([given["input_ids"], answer], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    labels = torch.full_like(longer["input_ids"], -100)
    labels[:, -3:] = answer
    with reroute.enable(model, schedule=SCHEDULE, trace=True) as handle:
        model(**given, use_cache=False)
        alone = [stage.kept[0].tolist() for stage in handle.trace or ()]
        model(**longer, labels=labels, use_cache=False)
        assert [stage.kept[0].tolist() for stage in handle.trace or ()] == alone


@torch.no_grad()
@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_model_of_the_process(name: str) -> None:
    """And copies of routed ones are plain."""
    family, given, expected = routed(name)
    model = copy.deepcopy(family.tiny.model)
    with reroute.enable(model, schedule=SCHEDULE):
        plain = copy.deepcopy(model)
        assert torch.equal(model(**given, use_cache=False).logits, expected)
    assert type(plain) is type(family.tiny.model)
    reroute.enable(schedule=SCHEDULE)
    try:
        assert torch.equal(plain(**given, use_cache=False).logits, expected)
    finally:
        reroute.disable()


@torch.no_grad()
@pytest.mark.parametrize("name", ELSEWHERE)
def test_launches_ahead_and_attention_to_record(name: str) -> None:
    """All layers of these show what their last token attends to, but for those with a state."""
    family, given, _ = routed(name)
    with reroute.enable(family.tiny.model, keep=0.6) as handle:
        handle.warm_up(visual=16)
    if name == "nemotron_h_omni":
        with pytest.raises(RerouteError, match="keeps a state and does not attend"):
            reroute.record_attention(family.tiny.model, given)
    elif name == "llama4":
        with pytest.raises(RerouteError, match="longer than what the last token sees"):
            reroute.record_attention(family.tiny.model, given)
    else:
        record = reroute.record_attention(family.tiny.model, given)
        assert record.num_layers == len(family.tiny.layers)


@torch.no_grad()
def test_pictures_that_an_argument_marks() -> None:
    family, given, _ = routed("kosmos2_5")
    model, marks = family.tiny.model, given[MARKED["kosmos-2.5"]]
    with reroute.enable(model, schedule=SCHEDULE) as handle:
        with pytest.raises(RerouteError, match=r"pass visual_mask=image_embeds_position_mask.bool\(\)"):
            handle.plan(given["input_ids"])
        plan = handle.plan(visual_mask=marks.bool())
        assert plan is not None
        assert plan.visual_counts == (9,)
        text = {name: given[name] for name in ("input_ids", "attention_mask")}
        model(**text, use_cache=False)
        with pytest.warns(UserWarning, match="none in image_embeds_position_mask"), pytest.raises(RuntimeError):
            model(**{**given, MARKED["kosmos-2.5"]: 0 * marks}, use_cache=False)
        with pytest.raises(RerouteError, match="Chunked prefill cannot be routed"):
            model.generate(**given, prefill_chunk_size=4, max_new_tokens=1)
        with pytest.raises(RerouteError, match="or embeds positions"):
            reroute.enable(model, method=reroute.methods.PDrop.official(), action="remove")


@torch.no_grad()
@pytest.mark.parametrize("name", ["chameleon", "kosmos2_5"])
def test_turns_that_choose_again(name: str) -> None:
    """The next turn has text alone, and ranks as a prompt of both does."""
    family, given, _ = routed(name)
    model, more = family.tiny.model, torch.tensor([[21, 22, 23]])
    ids = torch.cat([given["input_ids"], more], 1)
    both = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.tiny.marks is not None:
        both[family.tiny.marks] = torch.nn.functional.pad(given[family.tiny.marks], (0, 3))
    with reroute.enable(model, schedule=SCHEDULE, reopens=True, trace=True) as handle:
        expected = model(**both, use_cache=False).logits[:, -3:]
        once = [stage.kept[0].tolist() for stage in handle.trace or ()]
        cache = getattr(model(**given, use_cache=True), CACHE)
        again = model(input_ids=more, attention_mask=both["attention_mask"], use_cache=True, **{CACHE: cache})
        assert [stage.kept[0].tolist() for stage in handle.trace or ()] == once
        near(again.logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_same_answer_with_beams_and_without_a_cache(name: str) -> None:
    """Without a cache Transformers' own beams mix up the pictures of Llama 4."""
    family, beams = ELSEWHERE[name](), 1 if name == "llama4" else 2
    prompt = family.prompt(0, 3, 5)
    schedule = reroute.Schedule((2, 4), (0.5, 0.3))
    with reroute.enable(family.tiny.model, schedule=schedule):
        cached = generate(family, prompt, num_beams=beams).sequences
        assert torch.equal(cached, generate(family, prompt, num_beams=beams, use_cache=False).sequences)


@pytest.mark.skipif("nemotron_h_omni" not in TYPES, reason="a later release has it")
def test_tokens_of_videos_that_a_model_drops_itself() -> None:
    model: Any = copy.deepcopy(build("nemotron_h_omni").model)
    model.video_pruning_rate = 0.5
    with pytest.raises(UnsupportedModelError, match="drops tokens of videos itself"):
        reroute.enable(model)


@pytest.mark.skipif("nemotron_h_omni" not in TYPES, reason="a later release has it")
def test_a_part_that_takes_more_than_rows() -> None:
    model: Any = copy.deepcopy(build("nemotron_h_omni", layers=8).model)
    layer = model.language_model.model.layers[5]
    kind = type(layer.mixer)

    class Odd(kind):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: Tensor, others: Any = None) -> Any:
            return super().forward(hidden_states)

    layer.mixer.__class__ = Odd
    with pytest.raises(UnsupportedModelError, match=r"Decoder layer 5 .*MLP alone, and its Odd takes hidden"):
        reroute.enable(model, schedule=reroute.Schedule((2,), (0.5,)))


def test_parts_are_not_whole_models() -> None:
    with torch.device("meta"):
        model: Any = getattr(transformers, TYPES["llama4"])(configuration("llama4"))
    with pytest.raises(UnsupportedModelError, match="its configuration names no visual tokens"):
        reroute.enable(model.language_model)
