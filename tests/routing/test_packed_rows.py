"""A row is one prompt: several in one row, and arguments per token that nobody knows, are refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attentions import FLASH, FLEX, attention_of
from models import CACHE, Sample, Tiny, tiny
from oracle import Rules, predict
from support import FEW, cache_of, close, enable, generate, refuses, rows, same_decisions, small
from torch import Tensor
from transformers import DynamicCache

from reroute.errors import RerouteError

PACKED = "Several prompts are packed in one row"
ACTIONS = (FEW, Rules(FEW.layers, FEW.ratios, "remove"))
FORMS = [("llava", "text"), ("qwen", "text"), ("qwen", "three"), ("qwen", "four")]
"""Position ids of each family: (B, L), or (3, B, L) of M-RoPE, or these behind those of the text."""


def prompts(tiny: Tiny) -> list[Sample]:
    return [tiny.prompt(0, 3, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 5)]


def whole(tiny: Tiny) -> Sample:
    """Both prompts in one row."""
    first, second = prompts(tiny)
    return first + second


def position_ids(tiny: Tiny, form: str, starts: tuple[int, ...] = (0, 0)) -> Tensor:
    """Of prompts that are packed in one row, each from its number in ``starts`` on."""
    samples = prompts(tiny)[: len(starts)]
    text = torch.cat([torch.arange(len(s)) + start for s, start in zip(samples, starts, strict=True)])[None]
    if form == "text":
        return text
    three = torch.cat([tiny.positions(s) + start for s, start in zip(samples, starts, strict=True)], 1)[:, None]
    return three if form == "three" else torch.cat([text[None], three])


def without_mask(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "attention_mask"}


# --- position ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH, FLEX])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("family", "form"), FORMS)
def test_position_ids_that_begin_anew(family: str, form: str, masked: bool, attention: str) -> None:
    tiny = small(family)
    given: dict[str, Any] = {**tiny.inputs([whole(tiny)]), "position_ids": position_ids(tiny, form)}
    given = given if masked else without_mask(given)
    for rules in ACTIONS:
        cache = DynamicCache()
        given[CACHE] = cache
        with attention_of(tiny, attention):
            for part in (tiny.model, tiny.model.model):
                refuses(tiny, RerouteError, PACKED, functools.partial(part, **given), rules)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH, FLEX])
@pytest.mark.parametrize("rules", ACTIONS)
def test_what_the_refusal_says_to_do(few: Tiny, rules: Rules, attention: str) -> None:
    """Each prompt in a row of its own."""
    samples = prompts(few)
    given = few.inputs(samples)
    with attention_of(few, attention), enable(few, rules) as handle:
        output = few.model(**given)
        same_decisions(handle.trace, [predict(few, sample, rules) for sample in samples])
    for logits, sample in zip(rows(output.logits, given["attention_mask"]), samples, strict=True):
        close(logits, predict(few, sample, rules).logits)


@pytest.mark.parametrize("starts", [(3, 0), (7, 3), (0, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("family", "form"), FORMS)
def test_prompts_that_begin_anywhere(family: str, form: str, masked: bool, starts: tuple[int, int]) -> None:
    """They need not begin where the row did."""
    tiny = small(family)
    given = {**tiny.inputs([whole(tiny)]), "position_ids": position_ids(tiny, form, starts)}
    given = given if masked else without_mask(given)
    refuses(tiny, RerouteError, PACKED, lambda: tiny.model(**given), FEW)


@pytest.mark.parametrize("rows_of_batch", [(0, 1), (1, 0)])
def test_one_packed_row_in_a_batch(few: Tiny, rows_of_batch: tuple[int, int]) -> None:
    """Whichever it is, pictures or not: here of text, beside a picture."""
    words = few.prompt(5, 20)
    sample = few.prompt(0, 3, few.grid, 1)
    assert len(words) == len(sample)
    packed = torch.arange(20) % 12
    ids = [few.positions(sample), packed.expand(3, -1) if few.is_qwen else packed]
    samples = [sample, words]
    given = few.inputs([samples[i] for i in rows_of_batch])
    given["position_ids"] = torch.stack([ids[i] for i in rows_of_batch], dim=-2)
    refuses(few, RerouteError, PACKED, lambda: few.model(**given), FEW)


def test_prompts_with_padding_between_them(few: Tiny) -> None:
    """As they are laid out in blocks of equal length."""
    first, second = prompts(few)
    pad = Sample((0, 0))
    given = few.inputs([first + pad + second])
    given["attention_mask"][0, len(first) : len(first) + 2] = 0
    parts = [few.positions(s) for s in (first, second)]
    gap = torch.zeros_like(parts[0][..., :2])
    given["position_ids"] = torch.cat([parts[0], gap, parts[1]], -1).unsqueeze(-2)
    refuses(few, RerouteError, PACKED, lambda: few.model(**given), FEW)


@pytest.mark.parametrize(("family", "form"), [("llava", "text"), ("qwen", "four")])
def test_gaps_are_borders_unless_there_is_a_mask(family: str, form: str) -> None:
    """Without a mask Transformers takes every step but 1 for a border; with one, a gap is a gap."""
    tiny = small(family)
    sample, cut = prompts(tiny)[0], 21
    ids = position_ids(tiny, form, (0,))
    ids[..., cut:] += 5
    given = {**tiny.inputs([sample]), "position_ids": ids}
    refuses(tiny, RerouteError, PACKED, lambda: tiny.model(**without_mask(given), use_cache=False), FEW)
    one = ids[0] if form == "text" else ids[1:, 0]
    with enable(tiny, FEW) as handle:
        expected = predict(tiny, sample, FEW, positions=one)
        close(tiny.model(**given).logits[0], expected.logits)
        same_decisions(handle.trace, [expected])


@pytest.mark.parametrize(("family", "form"), FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_one_prompt_with_position_ids_of_its_own(family: str, form: str, masked: bool) -> None:
    """It need not begin at 0, and M-RoPE stands still in a picture."""
    tiny = small(family)
    sample = prompts(tiny)[0]
    ids = position_ids(tiny, form, (2,))
    given = {**tiny.inputs([sample]), "position_ids": ids}
    with enable(tiny, FEW) as handle:
        output = tiny.model(**(given if masked else without_mask(given)), use_cache=False)
    one = {"text": lambda: ids[0], "three": lambda: ids[:, 0], "four": lambda: ids[1:, 0]}[form]()
    one = one.expand(3, -1) if tiny.is_qwen and form == "text" else one
    expected = predict(tiny, sample, FEW, positions=one)
    close(output.logits[0], expected.logits)
    same_decisions(handle.trace, [expected])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked_end", [False, True])
def test_the_position_ids_that_generate_makes(few: Tiny, side: str, masked_end: bool) -> None:
    """From the mask: padding has filler numbers, and so has what follows a prompt that ends in padding."""
    samples = [few.prompt(0, 3, few.grid, 4), few.prompt(1, 9), few.prompt(2, 1, few.grid, 2)]
    given = few.inputs(samples, side)
    if masked_end:
        given["attention_mask"][:, -1] = 0
    for settings in ({}, {"use_cache": False}):
        with enable(few, FEW) as handle:
            output = generate(few, given, 3, **settings)
            assert handle.totals().prefills == (3 if settings else 1)
        if side == "left" and not masked_end:
            for b, sample in enumerate(samples):
                tokens = output.sequences[b, -3:].tolist()
                expected = predict(few, sample, FEW, then=tokens[:-1])
                close(torch.stack(output.logits)[:, b], expected.logits[len(sample) - 1 :])


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH, FLEX])
def test_packed_text_is_the_plain_model_s(few: Tiny, attention: str) -> None:
    """Nothing is routed, so nothing is asked of its rows."""
    sample = few.prompt(0, 15)
    ids = (torch.arange(15) % 9)[None]
    given = without_mask(few.inputs([sample]))
    given["position_ids"] = torch.cat([ids[None], ids.expand(3, 1, -1)]) if few.is_qwen else ids
    with attention_of(few, attention):
        plain = few.model(**given, use_cache=False).logits
        del given["position_ids"]
        assert not torch.equal(few.model(**given, use_cache=False).logits, plain), "it is not packed"
        given["position_ids"] = torch.cat([ids[None], ids.expand(3, 1, -1)]) if few.is_qwen else ids
        with enable(few, FEW):
            assert torch.equal(few.model(**given, use_cache=False).logits, plain)


# --- borders and other arguments for each token -------------------------------------------------------------------

BORDERS: dict[str, Callable[[int], Any]] = {
    "cu_seq_lens_q": lambda n: torch.tensor([0, 9, n], dtype=torch.int32),
    "cu_seq_lens_k": lambda n: torch.tensor([0, 9, n], dtype=torch.int32),
    "cu_seqlens": lambda n: torch.tensor([0, 9, n]),
    "seq_idx": lambda n: torch.zeros(1, n, dtype=torch.int32),
}


@pytest.mark.parametrize("name", BORDERS)
def test_borders(few: Tiny, name: str) -> None:
    """Flash attention would take them for those of the rows that run; other attention does not look at them."""
    sample = prompts(few)[0]
    given = {**few.inputs([sample]), name: BORDERS[name](len(sample))}
    message = f"{name} was given: {PACKED}"
    refuses(few, RerouteError, message, lambda: few.model(**given), FEW)
    refuses(few, RerouteError, message, lambda: few.model.model(**given), FEW)
    ids = given["input_ids"]
    with enable(few, FEW) as handle, handle.using(handle.plan(ids)), pytest.raises(RerouteError, match=message):
        few.model(**given)


@pytest.mark.parametrize("name", BORDERS)
def test_borders_after_a_routed_prompt(few: Tiny, name: str) -> None:
    """Text that follows it: the layers hold other rows than the borders count."""
    first, second = prompts(few)[0], few.prompt(2, 4)
    with enable(few, FEW):
        cache = cache_of(few.model(**few.inputs([first]), use_cache=True))
        given = few.follow([first], [second])
        with pytest.raises(RerouteError, match=f"{name} was given: {PACKED}"):
            few.model(**given, **{CACHE: cache, name: BORDERS[name](len(first) + 4)})
        assert cache.get_seq_length() == len(first)
        close(few.model(**given, **{CACHE: cache}).logits[0], predict(few, [first, second], FEW).logits[len(first) :])


L, SHORT = 25, 9
PER_TOKEN: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.zeros(2, L),
    "for each query and key": lambda: torch.zeros(1, 1, L, L),
    "for all rows at once": lambda: torch.zeros(L),
    "the batch flattened": lambda: torch.zeros(2 * L, 3),
    "flattened without padding": lambda: torch.zeros(L + SHORT, dtype=torch.int64),
    "a list": lambda: [torch.zeros(3), torch.zeros(2, L)],
    "a tuple of lists": lambda: ([torch.zeros(2, L)], None),
    "a dict": lambda: {"scale": 1.0, "weights": torch.zeros(2, L)},
    "an array": lambda: np.zeros((2, L)),
}


@pytest.mark.parametrize("kind", PER_TOKEN)
def test_unknown_arguments_for_each_token(few: Tiny, kind: str) -> None:
    given = few.inputs([few.prompt(0, 5, few.grid, 4), few.prompt(1, SHORT)])
    assert given["input_ids"].shape == (2, L)
    value = PER_TOKEN[kind]()
    for rules in ACTIONS:
        refuses(
            few, RerouteError, "my_bias has an entry for each token", lambda: few.model(**given, my_bias=value), rules
        )
    with enable(few, FEW) as handle:
        plan = handle.plan(given["input_ids"], given["attention_mask"])
        with handle.using(plan), pytest.raises(RerouteError, match="my_bias has an entry for each token"):
            few.model(**given, my_bias=value)


@pytest.mark.parametrize("turns", ["text after picture", "picture after picture", "picture after text"])
def test_unknown_arguments_for_each_key(few: Tiny, turns: str) -> None:
    """Columns for what routed layers do not hold."""
    words, picture = few.prompt(2, 7), few.prompt(3, 2, few.grid, 3)
    second, first = (words if part == "text" else picture for part in turns.split(" after "))
    with enable(few, FEW):
        cache = cache_of(few.model(**few.inputs([first]), use_cache=True))
        given = few.follow([first], [second])
        keys = torch.zeros(1, len(first) + len(second))
        with pytest.raises(RerouteError, match="my_bias has an entry for each token"):
            few.model(**given, **{CACHE: cache}, my_bias=keys)
        assert cache.get_seq_length() == len(first)
        output = few.model(**given, **{CACHE: cache})
    close(output.logits[0], predict(few, [first, second], FEW).logits[len(first) :])


HARMLESS: dict[str, Any] = {
    "a number": 3,
    "a fraction": 0.5,
    "a word": "text",
    "nothing": None,
    "a flag": True,
    "a scalar tensor": torch.tensor(25),
    "another size": torch.zeros(3, 7),
    "a list": [torch.zeros(3), 25, None],
    "an empty dict": {},
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_other_arguments_pass(few: Tiny, kind: str) -> None:
    sample = few.prompt(0, 5, few.grid, 4)
    seen = []
    layer = few.model.model.language_model.layers[-1]
    look = layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["mine"]), with_kwargs=True)
    try:
        with enable(few, FEW) as handle:
            output = few.model(**few.inputs([sample]), mine=HARMLESS[kind])
            same_decisions(handle.trace, [predict(few, sample, FEW)])
    finally:
        look.remove()
    close(output.logits[0], predict(few, sample, FEW).logits)
    assert seen[0] is HARMLESS[kind]


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_kinds_of_tokens_pass(few: Tiny, name: str) -> None:
    """Processors give them; no layer reads them."""
    sample = few.prompt(0, 5, few.grid, 4)
    given = {name: torch.zeros(1, len(sample), dtype=torch.long), **few.inputs([sample])}
    with enable(few, FEW):
        close(few.model(**given).logits[0], predict(few, sample, FEW).logits)


def test_text_may_have_any_arguments(few: Tiny) -> None:
    given = few.inputs([few.prompt(0, 9)])
    plain = few.model(**given).logits
    with enable(few, FEW):
        assert torch.equal(few.model(**given, my_bias=torch.zeros(1, 9)).logits, plain)


@pytest.mark.parametrize("name", ["llava-mha", "llava-gqa", "qwen"])
def test_nothing_is_left_over(name: str) -> None:
    """A server goes on after a refused request."""
    model = tiny(name)
    good, bad = model.prompt(0, 5, model.grid, 4), whole(model)
    ids = position_ids(model, "three" if model.is_qwen else "text")
    with enable(model, FEW) as handle:
        for _ in range(3):
            with pytest.raises(RerouteError, match=PACKED):
                model.model(**model.inputs([bad]), position_ids=ids)
            same = model.model(**model.inputs([good])).logits[0]
            close(same, predict(model, good, FEW).logits)
        assert handle.totals().prefills == 3
