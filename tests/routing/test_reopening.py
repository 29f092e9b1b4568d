"""Later turns that choose again: each is what a fresh prompt of the whole conversation would be."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attentions import FLASH, FLEX, attention_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import CACHE, NAMES, TRANSFORMERS, Sample, Tiny, text
from models import tiny as shared
from oracle import MARGIN, Rules, predict
from support import (
    FEW,
    RULES,
    NoWaiting,
    any_prompt,
    any_rules,
    cache_of,
    close,
    enable,
    generate,
    kv_lengths,
    labels_after,
    new_tokens,
    same_decisions,
)
from threads import together
from torch import Tensor
from turns import first, is_fresh, turn

from reroute.errors import RerouteError
from reroute.transformers.cache import RoutedLayer
from reroute.transformers.context import RoutedPrefill
from reroute.transformers.decoding import RoutedDecode

EARLY = Rules((3, 5), (0.5, 0.25), score_layer_offset=-1)
"""Scores a layer earlier: a layer between runs all tokens again, dense."""


@pytest.mark.parametrize("rules", [*RULES, EARLY])
def test_a_later_turn_is_a_fresh_prompt_of_the_conversation(tiny: Tiny, rules: Rules) -> None:
    """Three turns, the last of them with a new picture: logits, decisions, and what the cache holds."""
    said, *parts = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 6), tiny.prompt(2, 2, tiny.grid, 3)
    with enable(tiny, rules, reopens=True) as handle:
        cache = first(tiny, [said])
        for part in parts:
            logits = turn(tiny, cache, [said], [part])
            said += part
            expected = predict(tiny, said, rules)
            close(logits[0], expected.logits[-len(part) :])
            same_decisions(handle.trace, [expected])
            assert kv_lengths(cache) == expected.kv_lengths
            lacks = [isinstance(layer, RoutedLayer) for layer in cache.layers]
            assert lacks == [index >= rules.layers[0] for index in range(tiny.num_layers)]
            assert cache.get_seq_length() == len(said)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_conversation_from_its_beginning_on(few: Tiny, attention: str) -> None:
    """No row is missing and none is a filler, and yet eager attention has to be shown what comes before."""
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with attention_of(few, attention), enable(few, FEW, reopens=True):
        logits = turn(few, first(few, [said]), [said], [new])
    is_fresh(logits[0], few, said, new, FEW)


@settings(max_examples=25)
@given(st.data())
def test_any_conversation(data: st.DataObject) -> None:
    """Any schedule, prompts, turns and steps between them."""
    name = data.draw(st.sampled_from(NAMES))
    tiny = shared(name)
    rules = data.draw(any_rules(renumbered=name != "qwen" and data.draw(st.booleans())))
    said = data.draw(any_prompt(name, pictures=(1, 2)))
    n = len(said.visual)
    assume(any(rules.count(n, stage) < n for stage in range(len(rules.layers))))  # else it is not routed
    with enable(tiny, rules, reopens=True):
        cache = first(tiny, [said])
        for _ in range(data.draw(st.integers(1, 3))):
            new = data.draw(any_prompt(name, pictures=(0, 1)))
            assume(len(new) > 1)
            expected = predict(tiny, said + new, rules)
            assume(expected.margin > MARGIN)
            close(turn(tiny, cache, [said], [new])[0], expected.logits[-len(new) :])
            said += new
            assert kv_lengths(cache) == expected.kv_lengths
            step = data.draw(st.sampled_from([(), (7,)]))
            if step:
                logits = turn(tiny, cache, [said], [text(*step)])
                close(logits[0], predict(tiny, said, rules, then=step).logits[-1:])
                said += text(*step)


def test_it_is_the_same_bit_for_bit_from_layer_0_on(few: Tiny) -> None:
    """Nothing ran before the first decision, and what runs then is what a fresh prompt runs."""
    rules = Rules((0, 3), (0.3, 0.6))
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, rules, reopens=True):
        cache = first(few, [said])
        fresh = few.model(**few.inputs([said + new], positions=True)).logits
        assert torch.equal(turn(few, cache, [said], [new]), fresh[:, -len(new) :])


@pytest.mark.parametrize("rules", [FEW, Rules((1, 3), (0.5, 0.25), "remove"), Rules((0, 3), (0.3, 0.6))])
def test_another_question_on_a_cache_that_was_cropped_to_the_picture(few: Tiny, rules: Rules) -> None:
    said, other = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    picture = Sample(said.ids[:-4], said.visual, said.pixels, said.grids)
    with enable(few, rules, reopens=True):
        cache = first(few, [said])
        turn(few, cache, [said], [few.prompt(3, 2)])
        cache.crop(-6)
        logits = turn(few, cache, [picture], [other])
    is_fresh(logits[0], few, picture, other, rules)
    assert kv_lengths(cache) == predict(few, picture + other, rules).kv_lengths


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", [FEW, Rules((2, 4), (0.5, 0.25), score_layer_offset=-1)])
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH, FLEX])
def test_batches_with_padding(few: Tiny, side: str, rules: Rules, attention: str) -> None:
    """One picture, two, and none; rows end where they end."""
    before = [few.prompt(0, 5, few.grid, 4), few.prompt(1, 1, few.grid, 2, few.grid, 3), few.prompt(2, 9)]
    new = [few.prompt(10 + i, 3) for i in range(3)]
    with attention_of(few, attention), enable(few, rules, reopens=True):
        cache = first(few, before, side)
        logits = turn(few, cache, before, new, side)
        step = few.follow(before, [one + text(7) for one in new], side)
        step = {k: v if k == "attention_mask" else v[..., -1:] for k, v in step.items()}
        after = few.model(**step, **{CACHE: cache}).logits
    for b, (said, part) in enumerate(zip(before, new, strict=True)):
        is_fresh(logits[b], few, said, part, rules)
        close(after[b, 0], predict(few, said + part, rules, then=[7]).logits[-1])


MOVES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "copy": (copy.deepcopy, [0, 1]),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_is_kept_moves_with_the_cache(few: Tiny, move: str) -> None:
    before = [few.prompt(0, 5, few.grid, 4), few.prompt(1, 1, few.grid, 2, few.grid, 3)]
    act, order = MOVES[move]
    new = [few.prompt(10 + i, 3) for i in range(len(order))]
    mask = few.inputs(before)["attention_mask"][order]
    with enable(few, FEW, reopens=True):
        cache = first(few, before)
        other = act(cache)
        moved = cache if other is None else other
        inputs = few.follow([before[b] for b in order], new)
        inputs["attention_mask"] = torch.cat([mask, torch.ones(len(order), 3, dtype=torch.long)], 1)
        logits = few.model(**inputs, **{CACHE: moved}).logits
    for row, b, part in zip(logits, order, new, strict=True):
        is_fresh(row, few, before[b], part, FEW)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_goes_on_with_a_conversation(few: Tiny, beams: int) -> None:
    """The second answer, by steps that do not choose again, is that of a fresh prompt; so is a third one."""
    if beams > 1 and few.is_qwen and TRANSFORMERS < (5, 24):
        pytest.skip("this release cannot repeat placeholders whose pictures came earlier")
    said = few.prompt(0, 5, few.grid, 4)
    with enable(few, FEW, reopens=True) as handle:
        output = generate(few, [said], 4)
        for seed in (1, 2):
            whole = Sample(tuple(output.sequences[0].tolist()), said.visual, said.pixels, said.grids)
            new = whole + few.prompt(seed, 5)
            inputs = {k: v for k, v in few.inputs([new]).items() if k in ("input_ids", "attention_mask")}
            cache, prefills = copy.deepcopy(cache_of(output)), handle.totals().prefills
            cache.batch_repeat_interleave(beams)
            follows = generate(few, inputs, 4, num_beams=beams, **{CACHE: cache})
            assert handle.totals().prefills == prefills + 1
            fresh = generate(few, [new], 4, num_beams=beams)
            assert new_tokens(follows, len(new)) == new_tokens(fresh, len(new))
            output = generate(few, inputs, 4, **{CACHE: cache_of(output)})


def test_drafts_do_not_choose(few: Tiny) -> None:
    """Assisted generation verifies several tokens at once, by what was chosen for the prompt."""
    said = few.prompt(0, 5, few.grid) + text(*[9, 10, 11] * 4)
    with enable(few, FEW, reopens=True) as handle:
        drafted = generate(few, [said], 6, prompt_lookup_num_tokens=3)
        assert handle.totals().prefills == 1
        assert new_tokens(drafted, len(said)) == new_tokens(generate(few, [said], 6), len(said))


def test_answers_do_not_rank(few: Tiny) -> None:
    """Labels of a later turn end its prompt."""
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    whole = said + new
    with enable(few, FEW, reopens=True) as handle:
        cache = first(few, [said])
        few.model(**few.follow([said], [new]), labels=labels_after(new, 3), **{CACHE: cache})
        same_decisions(handle.trace, [predict(few, whole, FEW, query=len(whole) - 4)])


def test_samples_without_a_picture_are_left(few: Tiny) -> None:
    """There is nothing to choose, and nobody is told that a picture was not found."""
    before, new = [few.prompt(0, 5, few.grid, 4), few.prompt(2, 9)], few.prompt(5, 3)
    with enable(few, FEW, reopens=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = first(few, before, "right")
        cache.batch_select_indices(torch.tensor([1]))
        inputs = few.follow(before, [new, new], "right")
        row = {name: value[..., 1:, :] for name, value in inputs.items()}
        logits = few.model(**row, **{CACHE: cache}).logits
    close(logits[0], predict(few, before[1] + new, FEW).logits[-3:])


def test_a_single_token_is_a_step(few: Tiny) -> None:
    said, step = few.prompt(0, 5, few.grid, 4), text(9)
    with enable(few, FEW, reopens=True):
        logits = turn(few, first(few, [said]), [said], [step])
    close(logits[0], predict(few, said, FEW, then=step.ids).logits[-1:])


def test_hidden_states_are_those_of_the_turn(few: Tiny) -> None:
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW, reopens=True):
        inputs = few.follow([said], [new])
        states = few.model(**inputs, **{CACHE: first(few, [said])}, output_hidden_states=True).hidden_states
    for state, expected in zip(states, predict(few, said + new, FEW).hidden, strict=True):
        close(state[0], expected[-6:])


def test_a_picture_after_a_turn_of_text(few: Tiny) -> None:
    """What came before the first picture stays in the cache as it is."""
    words, said, new = few.prompt(3, 4), few.prompt(0, 2, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW, reopens=True):
        cache = first(few, [words])
        turn(few, cache, [words], [said])
        logits = turn(few, cache, [words + said], [new])
    close(logits[0], predict(few, [words, said + new], FEW).logits[-6:])


def test_placeholders_without_a_picture_are_text(few: Tiny) -> None:
    """For Transformers too; a fresh prompt that has them cannot be asked, so the embedded one is."""
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    token = said.ids[said.visual[0]]
    odd = Sample((*new.ids[:2], token, *new.ids[3:]), (), (), ())
    with enable(few, FEW, reopens=True) as handle:
        cache, inputs = first(few, [said]), few.follow([said], [new])
        inputs["input_ids"][0, 2] = token
        logits = few.model(**inputs, **{CACHE: cache}).logits
        assert handle.stats().visual == (len(said.visual),)
    embeds = torch.cat([few.embeds(said), few.model.get_input_embeddings()(torch.tensor(odd.ids))])
    close(logits[0], predict(few, said + new, FEW, embeds=embeds).logits[-6:])


def test_two_threads(few: Tiny) -> None:
    """Each with a conversation of its own."""
    said, new = [few.prompt(b, 5, few.grid, 4 + b) for b in range(2)], few.prompt(5, 6)
    with enable(few, FEW, reopens=True):

        def talk(b: int) -> Tensor:
            return turn(few, first(few, [said[b]]), [said[b]], [new])

        for logits, its in zip(together([partial(talk, b % 2) for b in range(6)]), said * 3, strict=True):
            is_fresh(logits[0], few, its, new, FEW)


def test_no_operation_waits(few: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is done at layers, in a batch with padding: turn, step, and a turn again."""
    ran: list[str] = []

    def guard(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def guarded(*args: Any) -> Any:
            ran.append(name)
            with NoWaiting():
                return original(*args)

        monkeypatch.setattr(owner, name, guarded)

    for owner in (RoutedPrefill, RoutedDecode):
        for name in ("before_layer", "after_layer", "finish"):
            guard(owner, name)
    said = [few.prompt(0, 5, few.grid, 4), few.prompt(1, 1, few.grid, 2, few.grid, 3)]
    mask = few.inputs(said)["attention_mask"]
    with enable(few, FEW, reopens=True):
        cache, columns = first(few, said), mask
        for length in (3, 1, 2):
            new = [few.prompt(10 + length + i, length) for i in range(2)]
            inputs = few.follow(said, new)
            columns = torch.cat([columns, torch.ones(2, length, dtype=torch.long)], 1)
            inputs["attention_mask"] = columns
            logits = few.model(**inputs, **{CACHE: cache}).logits
            said = [a + b for a, b in zip(said, new, strict=True)]
    for b in range(2):
        close(logits[b], predict(few, said[b], FEW).logits[-2:])
    assert len(ran) > 40


def test_with_a_plan_made_ahead(few: Tiny) -> None:
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW, reopens=True) as handle:
        cache, inputs = first(few, [said]), few.follow([said], [new])
        plan = handle.plan(inputs["input_ids"], inputs["attention_mask"], cache)
        with handle.using(plan):
            logits = few.model(**inputs, **{CACHE: cache}).logits
        with handle.at(reopens=False):
            other = first(few, [said])
        with handle.using(plan), pytest.raises(RerouteError, match="not for this cache"):
            few.model(**inputs, **{CACHE: other})
    is_fresh(logits[0], few, said, new, FEW)


# --- what it costs, and when nothing is kept ------------------------------------------------------------------------


def test_stats(few: Tiny) -> None:
    """Before the first decision the turn runs alone; states and all that goes with them are counted."""
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    n = len(said.visual)
    with enable(few, FEW, reopens=True) as handle:
        cache = first(few, [said])
        whole = handle.stats()
        turn(few, cache, [said], [new])
        stats = handle.stats()
        first(few, [said + new])
        fresh = handle.stats()
    half, quarter = n // 2, n // 4
    assert whole.avg_tokens == (n + 2 * half + 2 * quarter) / 5
    assert stats.avg_tokens == (2 * half + 2 * quarter) / 5
    assert stats.visual == (n,)
    width, rope = 64, few.model.model.language_model.layers[0].self_attn.head_dim
    per_token = 4 * width + 2 * 4 * rope + 8 + 1
    assert whole.state_bytes in (len(said) * per_token, len(said) * (per_token - 8))  # with position ids or without
    assert stats.state_bytes * len(said) == whole.state_bytes * (len(said) + 6)
    assert "states for later turns" in str(stats)
    assert fresh.prefill_flops > stats.prefill_flops > stats.prefill_flops_dense
    assert stats.scoring_flops == fresh.scoring_flops
    assert stats.layer_lengths == fresh.layer_lengths


def test_nothing_is_kept_unless_wanted(few: Tiny) -> None:
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW) as handle:
        cache = first(few, [said])
        assert handle.stats().state_bytes == 0
        logits = turn(few, cache, [said], [new])
    close(logits[0], predict(few, [said, new], FEW).logits[-6:])
    assert all(getattr(layer, "earlier", None) is None for layer in cache.layers)


def test_a_call_need_not_choose_again(few: Tiny) -> None:
    """``handle.at`` goes on with what was chosen, and a later turn may choose again."""
    said, new, more = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6), few.prompt(2, 3)
    with enable(few, FEW, reopens=True) as handle:
        cache = first(few, [said])
        with handle.at(reopens=False):
            close(turn(few, cache, [said], [new])[0], predict(few, [said, new], FEW).logits[-6:])
        is_fresh(turn(few, cache, [said + new], [more])[0], few, said + new, more, FEW)


def test_it_is_freed_with_the_cache(few: Tiny) -> None:
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW, reopens=True):
        cache = first(few, [said])
        kept = [weakref.ref(layer.earlier.hidden) for layer in cache.layers if getattr(layer, "earlier", None)]
        turn(few, cache, [said], [new])
        gc.collect()
        assert [its() for its in kept] == [None]
        kept = [weakref.ref(layer.earlier.hidden) for layer in cache.layers if getattr(layer, "earlier", None)]
        cache.reset()
        gc.collect()
        assert [its() for its in kept] == [None]
        logits = few.model(**few.inputs([said], positions=True), **{CACHE: cache}).logits
    close(logits[0], predict(few, said, FEW).logits)
