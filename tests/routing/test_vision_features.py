"""Rankers that look at the vision tower: features that were made ahead, and what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar

import models
import pytest
import torch
from models import Tiny
from support import close, enable, generate, mixed_batch, tiny_models
from torch import Tensor
from towers import RULES, Looking, layers_of, tower_of

import reroute
from reroute import Schedule
from reroute.errors import RerouteError, UnsupportedModelError
from reroute.rankers import LastTokenAttention, RankContext, Ranker
from reroute.rankers.vision import UNSEEN

tiny = tiny_models("llava-gqa", "qwen")


def test_states_that_no_tower_has(tiny: Tiny) -> None:
    for index in (3, -4):
        with pytest.raises(RerouteError, match="has the hidden states 0 to 2, or -3 to -1"):
            enable(tiny, RULES, Looking(asks_for=(index,)))


class Forgetful(Looking):
    """Looks without having asked to."""

    needs_vision: ClassVar[bool] = False


@pytest.mark.parametrize("first", [LastTokenAttention(), Looking()], ids=["alone", "beside_one_that_asked"])
def test_a_ranker_that_did_not_ask_for_pictures(tiny: Tiny, first: Ranker) -> None:
    schedule, given = Schedule((0, 3), (0.5, 0.25), (first, Forgetful())), mixed_batch(tiny)
    with (
        reroute.enable(tiny.model, schedule=schedule),
        pytest.raises(RerouteError, match=r"vision\.attention .* set needs_vision = True"),
    ):
        tiny.model(**tiny.inputs(given))


class Noting(Looking):
    """Looks while it makes a note, where there are no pictures."""

    def looks_before(self, layer: int) -> tuple[int, ...]:
        return (layer - 1,)

    def note(self, context: RankContext) -> list[Any]:
        return context.vision.grids


def test_notes_see_no_pictures(tiny: Tiny) -> None:
    schedule, given = Schedule((2,), (0.5,), (Noting(),)), mixed_batch(tiny)
    with (
        reroute.enable(tiny.model, schedule=schedule),
        pytest.raises(RerouteError, match=r"vision\.grids .* While it makes a note, no ranker is shown them"),
    ):
        tiny.model(**tiny.inputs(given))


def test_pictures_that_are_not_shown_have_no_other_attributes() -> None:
    assert not hasattr(UNSEEN, "__deepcopy__")
    assert not hasattr(UNSEEN, "pixels")


def image_features(tiny: Tiny, given: dict[str, Tensor]) -> Any:
    names = [name for name in ("pixel_values", "image_grid_thw") if name in given]
    return tiny.model.model.get_image_features(*map(given.pop, names), return_dict=True)


def test_pictures_that_come_as_features(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    given = tiny.inputs([sample])
    embeds = tiny.embeds(sample)[None]
    match = "in this call they come as features of which nothing is kept"
    with enable(tiny, RULES, Looking()) as handle:
        plan = handle.plan(given["input_ids"])
        with handle.using(plan), pytest.raises(RerouteError, match=match):
            tiny.model(inputs_embeds=embeds)
        base, made = tiny.model.model, image_features(tiny, dict(given))
        try:
            base.get_image_features = lambda *args, **kwargs: made
            with pytest.raises(RerouteError, match=match):
                tiny.model(**given)
        finally:
            del base.get_image_features
        tiny.model(**given)
        assert handle.stats().prefills == 1


encoder_outputs = pytest.mark.skipif(models.TRANSFORMERS < (5, 20), reason="it has no mm_encoder_outputs")


@encoder_outputs
def test_features_that_were_made_ahead(tiny: Tiny) -> None:
    """By the model under these settings they have with them what was kept; others, or parts of them, do not."""
    samples = mixed_batch(tiny)
    given = {**tiny.inputs(samples), "position_ids": tiny.inputs(samples, positions=True)["position_ids"]}
    plain = image_features(tiny, dict(given))
    with enable(tiny, RULES, Looking()):
        expected = tiny.model(**given).logits
        features = image_features(tiny, given)
        assert torch.equal(tiny.model(**given, mm_encoder_outputs={"image": features}).logits, expected)
        refused = [plain]
        for pick in ([1, 0, 2], [0, 2, 2]):
            changed = image_features(tiny, dict(tiny.inputs(samples)))
            changed.pooler_output = [changed.pooler_output[i] for i in pick]
            refused.append(changed)
        for made in refused:
            with pytest.raises(RerouteError, match="of which nothing is kept"):
                tiny.model(**given, mm_encoder_outputs={"image": made})


@encoder_outputs
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_generate_has_made_is_let_go_once_it_was_ranked(tiny: Tiny, use_cache: bool) -> None:
    """Without a cache the same features come again in each step."""
    kept: list[Any] = []
    hooks = [layers_of(tiny)[0].register_forward_pre_hook(lambda module, args: kept.append(weakref.ref(args[0])))]
    hooks.append(tiny.model.lm_head.register_forward_hook(lambda *_: kept.append(kept[0]() is None)))
    given = [tiny.prompt(0, 5, tiny.grid, 4)]
    try:
        with enable(tiny, RULES, Looking()):
            output = generate(tiny, given, 3, use_cache=use_cache)
            gc.collect()
    finally:
        for hook in hooks:
            hook.remove()
    assert kept[1:] == [use_cache] * 3
    assert kept[0]() is None
    assert output.sequences.shape[1] == 25 + 3


@encoder_outputs
def test_pictures_of_several_answers_to_one_prompt(tiny: Tiny) -> None:
    """``generate`` repeats what it has made of them."""
    seen: list[list[Tensor]] = []
    samples = mixed_batch(tiny)[:2]
    with enable(tiny, RULES, Looking(lambda vision: seen.append(vision.states(1)))):
        tiny.model(**tiny.inputs(samples))
        generate(tiny, samples, 3, num_beams=2, num_return_sequences=2)
    together, repeated = seen[0], seen[2]
    assert len(repeated) == 2 * len(samples)
    for b, states in enumerate(together):
        close(repeated[2 * b], states)
        close(repeated[2 * b + 1], states)


def test_a_tower_that_runs_more_often(tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    tower = tower_of(tiny)

    def run_again(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        hook.remove()
        tower(*args, **kwargs)

    hook = tower.register_forward_hook(run_again, with_kwargs=True)
    with (
        enable(tiny, RULES, Looking()),
        pytest.raises(RerouteError, match="runs more often in this forward than it has pictures"),
    ):
        tiny.model(**given)


def test_placeholders_that_are_padding() -> None:
    tiny = models.tiny("llava-gqa")
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    given["attention_mask"][0, 5] = 0
    with (
        enable(tiny, RULES, Looking()),
        pytest.raises(RerouteError, match="another number of patches than there are placeholders"),
    ):
        tiny.model(**given)


def test_features_of_another_layer() -> None:
    tiny = models.tiny("llava-gqa")
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    with enable(tiny, RULES, Looking()):
        with pytest.raises(RerouteError, match="vision_feature_layer=-1 is given for this call"):
            tiny.model(**given, vision_feature_layer=-1)
        with pytest.raises(RerouteError, match="vision_feature_layer=-1 is given for this call"):
            tiny.model.generate(**given, vision_feature_layer=-1, max_new_tokens=1)


def test_a_visual_token_of_cls() -> None:
    tiny = models.llava()
    tiny.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(RerouteError, match="makes a visual token of CLS too"):
        enable(tiny, RULES, Looking())


def test_a_tower_of_another_kind() -> None:
    tiny = models.llava()

    class Other(torch.nn.Module):
        pass

    tiny.model.model.vision_tower = Other()
    with pytest.raises(UnsupportedModelError, match="Other is not a vision tower that is known"):
        enable(tiny, RULES, Looking())
    with enable(tiny, RULES):
        pass
