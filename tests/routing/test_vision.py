"""Rankers that look at the vision tower: what they see is what the tower computes, and only while they may ask."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import models
import pytest
import torch
from models import CACHE, Sample, Tiny
from oracle import Rules
from support import cache_of, close, enable, generate, snapshot
from torch import Tensor
from towers import UNROLLED, layers_of, outputs_of_tower, tower_of

import reroute
from reroute.errors import RerouteError, UnsupportedModelError
from reroute.rankers import RankContext, RankInputs, ScoreRanker, TowerShape, Vision
from reroute_kernels import Selection

RULES = Rules((0, 3), (0.5, 0.25))


@dataclass(frozen=True)
class Looking(ScoreRanker):
    """Ranks by the attention of the tower, after ``look`` has had its turn."""

    needs_vision: ClassVar[bool] = True
    look: Callable[[Vision], None] | None = field(default=None, compare=False)
    asks_for: tuple[int, ...] | None = None

    def tower_states(self, tower: TowerShape) -> tuple[int, ...]:
        return tuple(range(tower.num_layers + 1)) if self.asks_for is None else self.asks_for

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        assert inputs.vision is not None
        if self.look is not None:
            self.look(inputs.vision)
        attention = inputs.vision.attention(0)
        return [its.sum(0)[index].float() for its, index in zip(attention, inputs.visual_indices, strict=True)]


@pytest.fixture(params=["llava-gqa", "qwen"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return models.tiny(request.param)


def batch(tiny: Tiny) -> list[Sample]:
    """One picture, two, none."""
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 6)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_ranker_sees_what_the_tower_computes(tiny: Tiny, attention: str) -> None:
    samples, seen = batch(tiny), []
    depth = len(layers_of(tiny))

    def look(vision: Vision) -> None:
        shape = vision.shape
        states = [vision.states(i) for i in (*range(shape.num_layers), -1)]
        features = torch.cat([torch.cat(vision.states(i)) for i in shape.features], -1)
        seen.append((vision.grids, states, [vision.attention(i) for i in range(depth)], vision.project(features)))

    expected = [outputs_of_tower(tiny, sample) for sample in samples]
    tiny.model.set_attn_implementation(attention)
    try:
        with enable(tiny, RULES, Looking(look)):
            tiny.model(**tiny.inputs(samples))
    finally:
        tiny.model.set_attn_implementation("sdpa")
    assert len(seen) == len(RULES.layers)
    grids, states, weights, projected = seen[0]
    assert grids == [[tiny.grid], [tiny.grid] * 2, []]
    for b, pictures in enumerate(expected):
        for i, state in enumerate(states):
            own = [its[i] for its, _ in pictures]
            close(state[b], torch.cat(own) if own else state[b][:0])
        for i, attended in enumerate(weights):
            own = [its[i] for _, its in pictures]
            close(attended[b], torch.cat(own, 1) if own else attended[b][:, :0])
    close(projected, torch.cat([tiny.embeds(sample)[list(sample.visual)] for sample in samples]))


def test_keys_are_those_of_the_layer(tiny: Tiny) -> None:
    sample, seen, projected = tiny.prompt(0, 5, tiny.grid, 4), [], []
    attention = layers_of(tiny)[1].attn if tiny.is_qwen else layers_of(tiny)[1].self_attn
    projection = attention.qkv if tiny.is_qwen else attention.k_proj
    hook = projection.register_forward_hook(lambda m, args, out: projected.append(out))
    try:
        with enable(tiny, RULES, Looking(lambda vision: seen.append(vision.keys(1)[0]))):
            tiny.model(**tiny.inputs([sample]))
    finally:
        hook.remove()
    keys = projected[0].chunk(3, -1)[1].view(16, 4, -1).mean(1)[UNROLLED] if tiny.is_qwen else projected[0][0, 1:]
    close(seen[0].flatten(1), keys)


@pytest.mark.parametrize("action", ["route", "remove"])
def test_a_sample_is_ranked_alike_alone_and_in_a_batch(tiny: Tiny, action: Any) -> None:
    samples, kept = batch(tiny), []
    with enable(tiny, Rules((0, 3), (0.5, 0.25), action), Looking()) as handle:
        for some in (samples, *[[sample] for sample in samples[:2]]):
            generate(tiny, some, 3)
            assert handle.trace is not None
            kept.append([[its.tolist() for its in stage.kept] for stage in handle.trace])
    together, *alone = kept
    assert [[one, two, []] for (one,), (two,) in zip(*alone, strict=True)] == together


def test_a_later_turn_sees_its_own_pictures(tiny: Tiny) -> None:
    first, second = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)
    seen: list[Tensor] = []
    with enable(tiny, RULES, Looking(lambda vision: seen.append(vision.states(1)[0]))):
        cache = cache_of(tiny.model(**tiny.inputs([first]), use_cache=True))
        tiny.model(**tiny.follow([first], [second]), **{CACHE: cache})
        tiny.model(**tiny.inputs([second]))
    close(seen[2], seen[4])
    assert not torch.allclose(seen[0], seen[2])


@dataclass(frozen=True)
class Comparing(Looking):
    """Makes sure that what the projector makes of the tower's states is what the decoder begins with."""

    def select(self, context: RankContext) -> Selection:
        assert context.vision is not None
        features = context.vision.states(context.vision.shape.features[0])
        for its, found in zip(features, context.candidates_of(context.hidden()), strict=True):
            close(context.vision.project(its), found)
            self.seen.append(len(found))
        return super().select(context)

    seen: list[int] = field(default_factory=list, compare=False)


def test_states_are_those_of_the_visual_token(tiny: Tiny) -> None:
    samples = [tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 6), tiny.prompt(0, 5, tiny.grid, 4)]
    ranker = Comparing()
    with enable(tiny, Rules((0,), (0.5,)), ranker):
        generate(tiny, samples, 2)
    assert ranker.seen == [32, 0, 16]


def test_images_between_videos() -> None:
    """Each kind is scattered to placeholders of its own: a video of two frames, an image, a video; an image."""
    tiny = models.tiny("qwen")
    image, other = tiny.prompt(0, (3, 2)), tiny.prompt(1, (2, 2))
    videos = {(2, 4, 6): 12, (1, 6, 4): 6}
    pixels = [torch.randn(4 * tokens, image.pixels[0].shape[1]) for tokens in videos.values()]
    first, second = ((models.VIDEO,) * tokens for tokens in videos.values())
    rows = [[*first, 1, *image.ids, 2, *second, 3, 4], [5, *other.ids, 6, *[models.PAD] * 22]]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    kinds = (ids == models.PICTURE).long() + 2 * (ids == models.VIDEO).long()
    ranker = Comparing()
    with enable(tiny, Rules((0,), (0.5,)), ranker):
        tiny.model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=kinds,
            pixel_values=torch.cat([*image.pixels, *other.pixels]),
            image_grid_thw=torch.tensor([*image.grids, *other.grids]),
            pixel_values_videos=torch.cat(pixels),
            video_grid_thw=torch.tensor(list(videos)),
        )
    assert ranker.seen == [24, 4]


# --- nothing is kept that was not asked for ---------------------------------------------------------------------------


def intercepted(tiny: Tiny) -> bool:
    return any("_reroute" in vars(layer) for layer in layers_of(tiny))


def test_without_such_a_ranker_the_tower_is_left_alone(tiny: Tiny) -> None:
    before = snapshot(tiny.model)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    with enable(tiny, RULES) as handle:
        assert not intercepted(tiny)
        with handle.at(schedule=reroute.Schedule((0,), (0.5,), (Looking(),))):
            assert intercepted(tiny)
            tiny.model(**given)
        with handle.at(keep=0.5):
            tiny.model(**given)
    assert not intercepted(tiny)
    with enable(tiny, Rules((0,), (1.0,)), Looking()):
        assert not intercepted(tiny)
        tiny.model(**given)
    enable(tiny, RULES, Looking())
    assert intercepted(tiny)
    with enable(tiny, RULES):
        assert not intercepted(tiny)
    assert snapshot(tiny.model) == before


def test_settings_of_one_call_look_and_those_of_another_do_not(tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    looks = reroute.Schedule((0,), (0.5,), (Looking(),))
    with reroute.enable(tiny.model, schedule=looks):
        expected = tiny.model(**given).logits
    with enable(tiny, RULES) as handle:
        plain = tiny.model(**given).logits
        with handle.at(schedule=looks):
            assert torch.equal(tiny.model(**given).logits, expected)
        assert torch.equal(tiny.model(**given).logits, plain)


class Stop(Exception):
    pass


@pytest.mark.parametrize("ends", ["after the decisions", "in the decoder", "in the tower", "in the ranker"])
def test_what_is_kept_is_gone_with_the_call(tiny: Tiny, ends: str) -> None:
    kept: list[weakref.ref[Any]] = []

    def stop(*_: Any) -> None:
        if ends != "after the decisions":
            raise Stop

    def watch(module: Any, args: Any) -> None:
        kept.append(weakref.ref(args[0]))

    look = stop if ends == "in the ranker" else None
    places = {"in the decoder": tiny.model.model.language_model.layers[1], "in the tower": layers_of(tiny)[1]}
    hooks = [layers_of(tiny)[0].register_forward_pre_hook(watch)]
    if ends in places:
        hooks.append(places[ends].register_forward_pre_hook(stop))
    try:
        with enable(tiny, RULES, Looking(look)), torch.no_grad():
            if ends == "after the decisions":
                tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
            else:
                with pytest.raises(Stop) as caught:
                    tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
                if ends != "in the decoder":  # else not even its traceback has them
                    del caught
            gc.collect()
            assert len(kept) == 1
            assert kept[0]() is None
    finally:
        for hook in hooks:
            hook.remove()


def test_only_states_that_were_asked_for_are_kept(tiny: Tiny) -> None:
    def look(vision: Vision) -> None:
        for index in (1, 2):
            with pytest.raises(RerouteError, match=f"Hidden state {index} of the vision tower was not kept"):
                vision.states(index)

    with enable(tiny, RULES, Looking(look, asks_for=(0,))):
        tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))


def test_states_are_let_go_behind_the_last_ranker_that_looks(tiny: Tiny) -> None:
    kept: list[Any] = []
    hooks = [layers_of(tiny)[0].register_forward_pre_hook(lambda module, args: kept.append(weakref.ref(args[0])))]
    layer = tiny.model.model.language_model.layers[0]
    hooks.append(layer.register_forward_hook(lambda *_: kept.append(kept[0]() is None)))
    schedule = reroute.Schedule((0, 3), (0.5, 0.25), (Looking(), reroute.rankers.LastTokenAttention()))
    try:
        with reroute.enable(tiny.model, schedule=schedule), torch.no_grad():
            tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
    finally:
        for hook in hooks:
            hook.remove()
    assert kept[1] or models.TRANSFORMERS < (5, 20)  # which keep all states of LLaVA's tower themselves


# --- grids alone ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagonal(ScoreRanker):
    """The diagonal of each picture."""

    needs_vision: ClassVar[bool] = True

    def select(self, context: RankContext) -> Selection:
        assert context.vision is not None
        scores = [
            torch.cat([torch.eye(*grid).flatten() for grid in its] or [torch.zeros(0)]) for its in context.vision.grids
        ]
        return context.best(scores)

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        raise AssertionError


def test_where_visual_tokens_lie(tiny: Tiny) -> None:
    with enable(tiny, Rules((2,), (0.25,)), Diagonal()) as handle:
        tiny.model(**tiny.inputs(batch(tiny)))
    assert [kept.tolist() for kept in handle.trace[0].kept] == [[0, 5, 10, 15], [0, 5, 10, 15, 16, 21, 26, 31], []]


# --- refused ----------------------------------------------------------------------------------------------------------


def test_states_that_no_tower_has(tiny: Tiny) -> None:
    for index in (3, -4):
        with pytest.raises(RerouteError, match="has the hidden states 0 to 2, or -3 to -1"):
            enable(tiny, RULES, Looking(asks_for=(index,)))


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
    samples = batch(tiny)
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
    samples = batch(tiny)[:2]
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
