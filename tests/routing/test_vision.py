"""Rankers that look at the vision tower: what they see is what the tower computes, and only while they may ask."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import models
import pytest
import torch
from models import CACHE, Tiny
from oracle import Rules
from support import cache_of, close, enable, generate, mixed_batch, snapshot, tiny_models
from torch import Tensor
from towers import RULES, UNROLLED, Looking, layers_of, outputs_of_tower

import reroute
from reroute.errors import RerouteError
from reroute.rankers import RankContext, RankInputs, ScoreRanker, Vision
from reroute_kernels import Selection

tiny = tiny_models("llava-gqa", "qwen")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_ranker_sees_what_the_tower_computes(tiny: Tiny, attention: str) -> None:
    samples, seen = mixed_batch(tiny), []
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
    samples, kept = mixed_batch(tiny), []
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
        scores = [
            torch.cat([torch.eye(*grid).flatten() for grid in its] or [torch.zeros(0)]) for its in context.vision.grids
        ]
        return context.best(scores)

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        raise AssertionError


def test_where_visual_tokens_lie(tiny: Tiny) -> None:
    with enable(tiny, Rules((2,), (0.25,)), Diagonal()) as handle:
        tiny.model(**tiny.inputs(mixed_batch(tiny)))
    assert [kept.tolist() for kept in handle.trace[0].kept] == [[0, 5, 10, 15], [0, 5, 10, 15, 16, 21, 26, 31], []]
