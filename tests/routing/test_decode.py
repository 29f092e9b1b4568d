"""Promise 3: decoding, by whatever way of generating, equals the full-length oracle."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import CACHE, NAMES, START, TRANSFORMERS, Sample, Tiny, text
from models import tiny as shared
from oracle import MARGIN, Rules, predict
from support import (
    RULES,
    any_prompt,
    any_rules,
    assistant_model,
    cache_of,
    close,
    enable,
    generate,
    kv_lengths,
    new_tokens,
    same_decisions,
)
from torch import Tensor

STEPS = 5


def prompts(tiny: Tiny) -> list[Sample]:
    small = (2, 5) if tiny.is_qwen else tiny.grid
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1, tiny.grid, 2, small, 3), tiny.prompt(3, 9)]


def prompts_of_groups(tiny: Tiny) -> list[Sample]:
    """Two prompts for several sequences each, which Transformers gives the pictures of their prompt.

    Before 5.19 it does so only where every prompt has one, before 5.18 only behind the token that opens Qwen's.
    """
    if TRANSFORMERS >= (5, 19):
        return prompts(tiny)[:2]
    return [tiny.prompt(b, 5 + b) + text(START) + tiny.prompt(b, tiny.grid, 4) for b in range(2)]


def check(tiny: Tiny, samples: Sequence[Sample], rules: Rules, output: Any) -> None:
    """Every logit of every step, given the tokens that were generated; and these are the argmax where it is clear."""
    length = max(map(len, samples))
    for b, sample in enumerate(samples):
        tokens = new_tokens(output, length, b)
        expected = predict(tiny, sample, rules, then=tokens[:-1]).logits[-len(tokens) :]
        close(torch.stack([step[b] for step in output.logits]), expected)


def check_greedy(output: Any, length: int) -> None:
    for step, logits in enumerate(output.logits):
        first, second = logits.topk(2).values.unbind(-1)
        clear = first - second > 1e-3
        assert torch.equal(logits.argmax(-1)[clear], output.sequences[:, length + step][clear])


# --- generate() ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("batch", [slice(0, 1), slice(0, 3)], ids=["one", "batch"])
def test_greedy(tiny: Tiny, rules: Rules, batch: slice) -> None:
    samples = prompts(tiny)[batch]
    with enable(tiny, rules) as handle:
        output = generate(tiny, samples, STEPS)
    check(tiny, samples, rules, output)
    check_greedy(output, max(map(len, samples)))
    same_decisions(handle.trace, [predict(tiny, sample, rules) for sample in samples])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 2.0}], ids=["greedy", "sampled"])
def test_without_a_cache(tiny: Tiny, rules: Rules, sampling: dict[str, Any]) -> None:
    """The prompt is run again for every token; its decisions must not see what was generated."""
    samples = prompts(tiny)
    outputs = []
    with enable(tiny, rules):
        for use_cache in (True, False):
            torch.manual_seed(0)
            outputs.append(generate(tiny, samples, STEPS, use_cache=use_cache, **sampling))
    cached, uncached = outputs
    assert torch.equal(cached.sequences, uncached.sequences)
    close(torch.stack(uncached.logits), torch.stack(cached.logits))
    check(tiny, samples, rules, cached)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search(tiny: Tiny, rules: Rules, use_cache: bool) -> None:
    """The score of every beam is what the oracle makes of its tokens, so each kept its own cache rows."""
    samples = prompts_of_groups(tiny)
    length = max(map(len, samples))
    settings = {"num_beams": 3, "num_return_sequences": 3, "use_cache": use_cache, "output_scores": True}
    with enable(tiny, rules):
        output = generate(tiny, samples, 4, **settings)
    for i, score in enumerate(output.sequences_scores):
        sample, tokens = samples[i // 3], output.sequences[i, length:].tolist()
        logits = predict(tiny, sample, rules, then=tokens[:-1]).logits[-len(tokens) :]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        close(score, chosen.mean())
    greedy = torch.tensor([sum(o) for o in output.sequences[:, length:].tolist()])
    assert len(set(greedy.tolist())) > 1, "the beams are all alike: this test proves nothing"


def test_several_sequences_per_prompt(tiny: Tiny) -> None:
    samples = prompts_of_groups(tiny)
    length = max(map(len, samples))
    torch.manual_seed(0)
    with enable(tiny, RULES[0]):
        output = generate(tiny, samples, 4, do_sample=True, num_return_sequences=2)
    for i in range(4):
        tokens = new_tokens(output, length, i)
        expected = predict(tiny, samples[i // 2], RULES[0], then=tokens[:-1]).logits[-len(tokens) :]
        close(torch.stack([step[i] for step in output.logits]), expected)


@pytest.mark.parametrize("rules", RULES)
def test_prompt_lookup(tiny: Tiny, rules: Rules) -> None:
    """Drafted tokens are in the first forward, after the prompt; they must neither be the query nor in its pool."""
    for seed in range(3):
        words = tiny.prompt(seed, 4)
        sample = tiny.prompt(seed + 10, 2, tiny.grid, 1) + words + tiny.prompt(seed + 20, 3) + words
        with enable(tiny, rules) as handle:
            greedy = generate(tiny, [sample], 8).sequences
            drafted = generate(tiny, [sample], 8, prompt_lookup_num_tokens=3).sequences
        assert torch.equal(drafted, greedy)
        same_decisions(handle.trace, [predict(tiny, sample, rules)])


def test_assistant_model(tiny: Tiny) -> None:
    if tiny.is_qwen:
        pytest.skip("Transformers hands the assistant arguments that only Qwen2.5-VL knows")
    if TRANSFORMERS < (5, 18):
        pytest.skip("Transformers hands the assistant the picture")
    assistant, sample = assistant_model(), prompts(tiny)[0]
    with enable(tiny, RULES[0]) as handle:
        greedy = generate(tiny, [sample], 8).sequences
        helped = generate(tiny, [sample], 8, assistant_model=assistant).sequences
    assert torch.equal(helped, greedy)
    same_decisions(handle.trace, [predict(tiny, sample, RULES[0])])


def test_an_assistant_that_is_routed_too() -> None:
    """Its cache is cropped into the question of its own routed prompt."""
    tiny, assistant = models.llava(layers=4), models.llava(layers=3)
    assistant.model.generation_config.num_assistant_tokens = 3
    sample = prompts(tiny)[0]
    with enable(tiny, Rules((1, 2), (0.5, 0.25))):
        greedy = generate(tiny, [sample], 8).sequences
        with enable(assistant, Rules((1,), (0.5,))) as other:
            helped = generate(tiny, [sample], 8, assistant_model=assistant.model).sequences
            assert not other.stats().prefills  # it does not get the picture, and without one placeholders are text
    assert torch.equal(helped, greedy)


# --- step by step, without generate() -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_step_by_step(tiny: Tiny, side: str, rules: Rules, attention: str) -> None:
    samples = prompts(tiny)
    chosen = [tiny.prompt(90 + b, STEPS).ids for b in range(len(samples))]
    expected = [predict(tiny, s, rules, then=t) for s, t in zip(samples, chosen, strict=True)]
    tiny.model.set_attn_implementation(attention)
    done = list(samples)
    with enable(tiny, rules):
        given = tiny.inputs(samples, side, positions=True)
        cache = cache_of(tiny.model(**given, use_cache=True))
        for step in range(STEPS):
            new = [text(tokens[step]) for tokens in chosen]
            given = follow(tiny, samples, done, new, side)
            logits = tiny.model(**given, **{CACHE: cache}, use_cache=True).logits
            done = [d + n for d, n in zip(done, new, strict=True)]
            for b, result in enumerate(expected):
                close(logits[b, -1], result.logits[len(done[b]) - 1])
        assert cache.get_seq_length() == max(map(len, samples)) + STEPS
    tiny.model.set_attn_implementation("sdpa")


def follow(
    tiny: Tiny, samples: Sequence[Sample], done: Sequence[Sample], new: Sequence[Sample], side: str
) -> dict[str, Tensor]:
    """Like ``Tiny.follow``, where padding lies between the prompts and what has followed since."""
    given = tiny.follow(done, new)
    past = tiny.inputs(samples, side)["attention_mask"]
    later = torch.ones(len(new), len(done[0]) - len(samples[0]) + len(new[0]), dtype=torch.long)
    given["attention_mask"] = torch.cat([past, later], dim=1)
    return given


@pytest.mark.parametrize("side", ["left", "right"])
def test_several_tokens_at_once(tiny: Tiny, side: str) -> None:
    samples = prompts(tiny)
    chosen = [tiny.prompt(90 + b, STEPS) for b in range(len(samples))]
    with enable(tiny, RULES[0]):
        cache = cache_of(tiny.model(**tiny.inputs(samples, side, positions=True), use_cache=True))
        logits = tiny.model(**follow(tiny, samples, samples, chosen, side), **{CACHE: cache}).logits
    for b, (sample, tokens) in enumerate(zip(samples, chosen, strict=True)):
        close(logits[b], predict(tiny, sample, RULES[0], then=tokens.ids).logits[-STEPS:])


# --- later turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
def test_later_turn_of_text(tiny: Tiny, rules: Rules) -> None:
    sample, question = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(7, 6)
    with enable(tiny, rules):
        first = generate(tiny, [sample], 4)
        answer = new_tokens(first, len(sample))
        whole = sample + text(*answer) + question
        given = tiny.inputs([whole])
        del given["pixel_values"]  # the picture is in the cache
        second = generate(tiny, given, 4, **{CACHE: cache_of(first)})
    then = new_tokens(second, len(whole))
    calls = [sample, *(text(t) for t in answer[:-1]), text(answer[-1]) + question]
    expected = predict(tiny, calls, rules, then=then[:-1])
    close(torch.cat(second.logits), expected.logits[-4:])
    assert kv_lengths(cache_of(second)) == expected.kv_lengths


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_turn_with_a_picture(tiny: Tiny, rules: Rules, attention: str) -> None:
    """Only its own tokens are ranked; in each layer they see what earlier turns left there."""
    turns = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 3), tiny.prompt(2, 2, tiny.grid, 5), tiny.prompt(3, 4)]
    expected = predict(tiny, turns, rules)
    tiny.model.set_attn_implementation(attention)
    with enable(tiny, rules) as handle:
        cache, before, logits = None, Sample(()), []
        for i, turn in enumerate(turns):
            given = tiny.follow([before], [turn])
            output = tiny.model(**given, **{CACHE: cache}, use_cache=True)
            cache = cache_of(output)
            logits.append(output.logits[0])
            before += turn
            if turn.visual:
                same_decisions(handle.trace, [expected.decisions[i]])
    tiny.model.set_attn_implementation("sdpa")
    close(torch.cat(logits), expected.logits)
    assert kv_lengths(cache) == expected.kv_lengths


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("words", [4, 40])
def test_later_turn_with_a_picture_in_either_spelling(tiny: Tiny, rules: Rules, words: int) -> None:
    """``generate()`` may be given all ids or only those that the cache lacks, fewer than it holds or more."""
    sample, turn = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, words)
    for spelling in ("all", "new"):
        with enable(tiny, rules) as handle:
            first = generate(tiny, [sample], 4)
            *told, last = new_tokens(first, len(sample))
            before, new = sample + text(*told), text(last) + turn
            given = tiny.follow([before], [new])
            if spelling == "all":
                whole = tiny.inputs([before + new])
                given |= {name: whole[name] for name in ("input_ids", "mm_token_type_ids") if name in whole}
            second = generate(tiny, given, 4, **{CACHE: cache_of(first)})
        then = new_tokens(second, given["input_ids"].shape[1])
        expected = predict(tiny, [sample, *(text(t) for t in told), new], rules, then=then[:-1])
        same_decisions(handle.trace, [expected.decisions[-4]])
        close(torch.cat(second.logits), expected.logits[-4:])
        assert kv_lengths(cache_of(second)) == expected.kv_lengths


@pytest.mark.parametrize("side", ["left", "right"])
def test_later_pictures_in_a_batch(tiny: Tiny, side: str) -> None:
    """Rows with and without a picture in either turn, so that fillers of both turns lie in the cache."""
    first = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 3), tiny.prompt(2, 1, tiny.grid, 2, tiny.grid, 6)]
    second = [tiny.prompt(3, 4, tiny.grid, 2), tiny.prompt(4, 2, tiny.grid, 4), tiny.prompt(5, 22)]
    third = [tiny.prompt(6 + b, 2) for b in range(3)]
    with enable(tiny, RULES[1]):
        cache = cache_of(tiny.model(**tiny.inputs(first, side, positions=True), use_cache=True))
        found = []
        done = list(first)
        for turn in (second, third):
            given = follow(tiny, first, done, turn, side)
            output = tiny.model(**given, **{CACHE: cache}, use_cache=True)
            done = [d + t for d, t in zip(done, turn, strict=True)]
            found.append(output.logits)
    for b, calls in enumerate(zip(first, second, third, strict=True)):
        expected = predict(tiny, calls, RULES[1]).logits[len(first[b]) :]
        close(torch.cat([logits[b] for logits in found]), expected)


def test_picture_after_a_turn_of_text(tiny: Tiny) -> None:
    """The cache is an ordinary one until then."""
    turns = [tiny.prompt(0, 7), tiny.prompt(1, 3, tiny.grid, 4)]
    with enable(tiny, RULES[0]):
        cache = cache_of(tiny.model(**tiny.inputs(turns[:1]), use_cache=True))
        output = tiny.model(**tiny.follow(turns[:1], turns[1:]), **{CACHE: cache})
    expected = predict(tiny, turns, RULES[0])
    close(output.logits[0], expected.logits[7:])
    assert kv_lengths(cache) == expected.kv_lengths


def test_one_cache_continued_twice(tiny: Tiny) -> None:
    """A prefix may be kept and continued in different ways, as prompt caching does."""
    sample, ways = tiny.prompt(0, 5, tiny.grid, 4), [tiny.prompt(1, 3), tiny.prompt(2, 5)]
    with enable(tiny, RULES[0]):
        prefix = cache_of(tiny.model(**tiny.inputs([sample]), use_cache=True))
        for way in ways:
            cache = copy.deepcopy(prefix)
            logits = tiny.model(**tiny.follow([sample], [way]), **{CACHE: cache}).logits[0]
            close(logits, predict(tiny, [sample, way], RULES[0]).logits[len(sample) :])


def test_text_prompt_after_a_picture_is_plain(tiny: Tiny) -> None:
    picture, words = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 9)
    plain = tiny.model(**tiny.inputs([words])).logits
    tokens = generate(tiny, [words], 4)
    with enable(tiny, RULES[0]):
        generate(tiny, [picture], 4)
        assert torch.equal(tiny.model(**tiny.inputs([words])).logits, plain)
        again = generate(tiny, [words], 4)
    assert torch.equal(again.sequences, tokens.sequences)
    assert torch.equal(torch.stack(again.logits), torch.stack(tokens.logits))


# --- anything -----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.data())
def test_any_generation(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    tiny = shared(name)
    samples = data.draw(st.lists(any_prompt(name), min_size=1, max_size=2))
    rules = data.draw(any_rules())
    assume(all(predict(tiny, sample, rules).margin > MARGIN for sample in samples))
    use_cache = data.draw(st.booleans())
    with enable(tiny, rules):
        check(tiny, samples, rules, generate(tiny, samples, 3, use_cache=use_cache))


@settings(max_examples=30)
@given(st.data())
def test_any_conversation(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    tiny = shared(name)
    turns = data.draw(st.lists(any_prompt(name, pictures=(0, 2)), min_size=2, max_size=3))
    rules = data.draw(any_rules())
    expected = predict(tiny, turns, rules)
    assume(expected.margin > MARGIN)
    with enable(tiny, rules):
        cache, before, logits = None, Sample(()), []
        for turn in turns:
            output = tiny.model(**tiny.follow([before], [turn]), **{CACHE: cache}, use_cache=True)
            cache = cache_of(output)
            logits.append(output.logits[0])
            before += turn
    close(torch.cat(logits), expected.logits)
    assert kv_lengths(cache) == expected.kv_lengths
